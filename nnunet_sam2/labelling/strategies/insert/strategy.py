"""Insert labelled slices into the query, or the query into a labelled volume, and let SAM 2's memory carry the masks.

Shape letters: N query slices, M support slices, K classes, S model size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.fusion import COMPONENTS, GIVEN, FusionOptions
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.option_checks import at_least, one_of
from nnunet_sam2.labelling.strategies.insert.plans import LEAST_TO_SWITCH, MODES, Asked, Pair, Plan
from nnunet_sam2.labelling.strategies.insert.sources import InsertSource, InsertSources
from nnunet_sam2.labelling.strategies.insert.videos import QUERY, Walk
from nnunet_sam2.labelling.strategies.transfer.memory import slice_descriptors
from nnunet_sam2.planes import resize
from nnunet_sam2.sam2.protocol import Sam2Backend, VideoWalk
from nnunet_sam2.support.cases import Query, Support

_INSERTIONS = 3
"""Places for each support where the user names no number: where there is room for so many."""
_MEMBERS_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class InsertOptions:
    """Say which pseudo-videos are made, and how many."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "mode": "la_to_un",
            "supports": None,
            "insertions": 5,
            "positions": "random",
            "prompted_slices": None,
            "whole_support": True,
            "both_directions": False,
            "components": "largest",
        }
    }
    """``paper``: SSL-MedSAM2 (arXiv 2512.11548) as released: all supports, five random places each, whole volumes, one
    visit a slice; mean probability above a half, and the largest component."""

    mode: str = "la_to_un"
    """``la_to_un``: support slices into the query; ``un_to_la``: the query into the support; ``switch``: half of the
    labelled slices and a run of the query change places; ``chunk``: each stretch of the query takes a place in the
    support."""
    supports: int | None = 4
    """How many supports to use, the most similar ones first; none means all, with time growing by their number."""
    insertions: int | None = None
    """Places for each support; one member comes of each. None: 3, or as many as there are."""
    positions: str = "matched"
    """``matched``: where slices look alike; ``random``: drawn (`chunk`: at the same relative place), as published."""
    prompted_slices: int | None = 8
    """At most so many slices of a class prompt, spread over its extent; none means all that show it."""
    whole_support: bool = False
    """Slices of the support without prompt stand in the videos too, and SAM 2 remembers what it finds on them."""
    both_directions: bool = True
    """Visit every query slice in both directions, where prompts allow, and average the two."""
    chunks: int = 5
    """Stretches of the query in mode ``chunk``."""
    components: str = GIVEN
    """Which 3D component of a class to keep: auto, largest, confident, none; ``given``: what --components says."""

    def __post_init__(self) -> None:
        one_of(self, mode=tuple(MODES), positions=("matched", "random"), components=(GIVEN, *COMPONENTS))
        at_least(self, 1, "supports", "insertions", "prompted_slices", "chunks")
        if self.mode == "chunk" and (self.insertions or 1) > 1:
            raise ValueError(f"insertions={self.insertions}: mode chunk gives one member a support; leave it out")
        if self.mode == "switch" and self.prompted_slices is not None and self.prompted_slices < LEAST_TO_SWITCH:
            raise ValueError(f"prompted_slices={self.prompted_slices}: mode switch needs at least {LEAST_TO_SWITCH}")


class Insert:
    """Label a query by pseudo-videos of it and a labelled volume (SSL-MedSAM2, arXiv 2512.11548), all classes.

    One member comes of each support and place. Different from the released code, unless the preset asks for it: places
    are matched to the anatomy; both directions cover the whole query when their mean is asked for; slices without the
    class are not inserted, so that memory starts with what is known. Always different: the memory of a prompted slice
    is computed once for all videos; directions are averaged as probabilities, for a mean of logits lets the direction
    that has lost the object veto the other; classes that a support does not show are taken from one that does; the
    modes that the released code does not call work (see `insert_plans`).
    """

    name: ClassVar[str] = "insert"
    needs_memory: ClassVar[bool] = True

    def __init__(self, options: InsertOptions | None = None) -> None:
        self._options = options or InsertOptions()
        self._sources = InsertSources(limit=self._options.prompted_slices, whole=self._options.whole_support)

    @property
    def options(self) -> InsertOptions:
        """Return the options."""
        return self._options

    def fusion(self, asked: FusionOptions) -> FusionOptions:
        """Return how the members are to be fused; see `BringsFusion`."""
        return asked.with_components(self._options.components)

    def check(self, case_id: str, slices: int) -> None:
        """Refuse a query with fewer slices than insertions; see `Limits`."""
        if self._options.mode == "la_to_un" and (self._options.insertions or 1) > slices:
            raise InputError(
                f"case {case_id} has {slices} slice{'s' * (slices != 1)}, and insertions={self._options.insertions} "
                f"would put a support twice at the same place; use --set insertions={slices}, or leave the case out"
            )

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield one member for each support and place; see `Strategy.members`.

        Raises `InputError` where no support shows any class at model size, where there are fewer places than asked
        for, and in mode ``switch`` where a class is on one slice of each support alone.
        """
        self.check(query.case_id, len(query.frames))
        options = self._options
        query_nf = slice_descriptors(query.embeddings).numpy()
        sources = [
            self._sources.source(support, class_values)
            for support in self._sources.most_similar(query_nf, supports, options.supports)
        ]
        lenders = {value: self._lenders(value, sources) for value in class_values}
        if not any(lenders.values()):
            cases = ", ".join(support.case_id for support in supports) or "none given"
            raise InputError(
                f"no slice of the supports ({cases}) shows a class at model size {query.frames.size}; "
                f"give other supports or a larger --image-size"
            )
        planned: list[_Planned] = []
        for number, source in enumerate(sources):
            chosen = {
                value: source if source in able else able[number % len(able)] for value, able in lenders.items() if able
            }
            # From one seed, so that classes with the same choice of places are put at the same ones.
            seed = int(rng.integers(2**63))
            plans = {v: self._plans(query_nf, chosen[v], v, np.random.default_rng(seed)) for v in chosen}
            count = max(len(found) for found in plans.values())
            if options.insertions is not None and options.mode != "chunk" and count < options.insertions:
                raise InputError(
                    f"support {source.support.case_id} and case {query.case_id} can be joined in mode {options.mode} "
                    f"at {count} places, not at insertions={options.insertions}; use --set insertions={count}"
                )
            for insertion in range(count):
                # A class with fewer places than another takes part in all members, or their mean would lack it.
                placed = {v: found[insertion % len(found)] for v, found in plans.items()}
                planned.append(_Planned(owner=source, chosen=chosen, placed=placed, insertion=insertion))
        # Members whose walks advance together share steps, and lie in memory together.
        member_bytes = 4 * len(class_values) * len(query.frames) * math.prod(query.frames.slice_shape_hw)
        together = max(1, _MEMBERS_BYTES // member_bytes)
        for start in range(0, len(planned), together):
            yield from self._members(query, planned[start : start + together], class_values, backend)

    def _lenders(self, value: int, sources: Sequence[InsertSource]) -> list[InsertSource]:
        """Return the supports that can prompt a class."""
        showing = [source for source in sources if source.prompts(value)]
        if self._options.mode != "switch":
            return showing
        able = [source for source in showing if len(source.prompts(value)) >= LEAST_TO_SWITCH]
        if showing and not able:
            cases = ", ".join(source.support.case_id for source in showing)
            raise InputError(
                f"class {value} is on a single slice of each support ({cases}); mode switch leaves half of a class's "
                f"slices in place and needs {LEAST_TO_SWITCH}: use --set mode=la_to_un"
            )
        return able

    def _plans(self, query_nf: np.ndarray, source: InsertSource, value: int, rng: np.random.Generator) -> list[Plan]:
        options = self._options
        pair = Pair(query_nf=query_nf, support_mf=source.descriptors_mf, support=source.inserted(value))
        asked = Asked(
            count=options.insertions or _INSERTIONS,
            matched=options.positions == "matched",
            twice=options.both_directions,
            chunks=options.chunks,
        )
        return MODES[options.mode](pair, asked, rng)

    def _members(
        self, query: Query, planned: Sequence[_Planned], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> Iterator[Member]:
        """Carry the classes of several members through all their videos at once."""
        shape_hw = query.frames.slice_shape_hw
        tallies = [{value: _Tally.empty(len(query.frames), shape_hw) for value in member.placed} for member in planned]
        asked: list[tuple[_Tally, Walk]] = []
        walks: list[VideoWalk] = []
        masks: dict[tuple[int, int], dict[int, np.ndarray]] = {}
        for member, tally in zip(planned, tallies, strict=True):
            for value, plan in member.placed.items():
                source = member.chosen[value]
                if (id(source), value) not in masks:
                    masks[id(source), value] = {m: source.mask(value, m)[None] for m in source.prompts(value)}
                for walk in plan.walks:
                    asked.append((tally[value], walk))
                    walks.append(_laid_out(query, source, masks[id(source), value], walk))
        for number, answer in backend.walk_many(walks):
            tally_of_class, walk = asked[number]
            prob_ss = torch.sigmoid(answer.logits_kss[0]).cpu().numpy()
            _, n = walk.slots[answer.frame]
            tally_of_class.add(n, prob_ss, float(answer.iou_k[0]), shape_hw)
        # Before a caller keeps what this yields.
        walks.clear()
        masks.clear()
        for member, tally in zip(planned, tallies, strict=True):
            prob_knhw = np.zeros((len(class_values), len(query.frames), *shape_hw), np.float32)
            classes: dict[str, Any] = {}
            for k, value in enumerate(class_values):
                if value not in member.placed:
                    classes[str(value)] = {"absent_in_all_supports": True}
                    continue
                found = tally.pop(value)
                prob_knhw[k] = found.mean()
                classes[str(value)] = {
                    **member.chosen[value].record(value),
                    "place": member.placed[value].place,
                    "slices_found": len(found.scores),
                    "estimated_iou": float(np.mean(found.scores)) if found.scores else None,
                }
            yield Member(
                name=f"insert:{member.owner.support.case_id}:{member.insertion}",
                prob_kzyx=query.frames.slices_back(prob_knhw),
                record={
                    "support": member.owner.support.case_id,
                    "insertion": member.insertion,
                    "mode": self._options.mode,
                    "classes": classes,
                },
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Planned:
    """Say how one member is made: which support lends each class, and where it is placed."""

    owner: InsertSource
    chosen: Mapping[int, InsertSource]
    placed: Mapping[int, Plan]
    insertion: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tally:
    """Add up what the walks of one class in one member say."""

    prob_nhw: np.ndarray
    visits_n: np.ndarray
    scores: list[float]

    @classmethod
    def empty(cls, slices: int, shape_hw: tuple[int, int]) -> _Tally:
        prob_nhw = np.zeros((slices, *shape_hw), np.float32)
        return cls(prob_nhw=prob_nhw, visits_n=np.zeros(slices, int), scores=[])

    def add(self, n: int, prob_ss: np.ndarray, iou: float, shape_hw: tuple[int, int]) -> None:
        self.prob_nhw[n] += resize(prob_ss[None], shape_hw)[0]
        self.visits_n[n] += 1
        if (prob_ss > 0.5).any():
            self.scores.append(iou)

    def mean(self) -> np.ndarray:
        self.prob_nhw[...] /= np.maximum(self.visits_n, 1)[:, None, None]
        return self.prob_nhw


def _laid_out(query: Query, source: InsertSource, masks: Mapping[int, np.ndarray], walk: Walk) -> VideoWalk:
    volumes = [query.embeddings if kind == QUERY else source.support.embeddings for kind, _ in walk.slots]
    return VideoWalk(
        video=[(embeddings, n) for embeddings, (_, n) in zip(volumes, walk.slots, strict=True)],
        masks_kss={t: masks[m] for t, (kind, m) in enumerate(walk.slots) if kind != QUERY and m in masks},
        reverse=walk.reverse,
        asked=frozenset(t for t, (kind, n) in enumerate(walk.slots) if kind == QUERY and n in walk.asked),
    )
