"""Label transfer: each location of a query takes the label of its nearest support locations.

Shape letters: N slices, C channels (background first), K classes, h w pixels of a working map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.leave_one_out import (
    DiceTable,
    best_choices,
    mean_dice,
    patients_by_case,
    places_of_patient,
    scans_of,
    several_patients,
)
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.option_checks import at_least
from nnunet_sam2.labelling.prompting.decoding import PromptKinds, decode_map, put_in
from nnunet_sam2.labelling.slice_check import SliceDice, check_slices
from nnunet_sam2.labelling.strategies.transfer.ballots import Ballots
from nnunet_sam2.labelling.strategies.transfer.index import require_faiss
from nnunet_sam2.labelling.strategies.transfer.memory import Place, SupportMemory, slice_descriptors, slice_features
from nnunet_sam2.labelling.strategies.transfer.recipe import (
    NEIGHBOURS,
    Recipe,
    averaged,
    candidate_recipes,
    choose_recipes,
    soft_maps,
)
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_KINDS = PromptKinds(box=True, points=False, mask=True)
_SHARES = {"map": 0.0, "mean": 0.5, "decoder": 1.0}
"""How far a class's map moves towards the decoder's answer, by the name of the choice."""

_CHECKED_CASES = 8
_VOXELS_FOR_EDGES = 4.0
"""Voxels along an embedding cell from which on a cell hides edges that the image shows."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Say how labels are transferred; what is None is chosen on the labelled cases, each patient left out in turn."""

    neighbours: int = NEIGHBOURS
    """How many nearest memory entries vote on a location."""
    memory_entries: int = 40960
    """Support locations that a query slice is compared with, from the most similar slices at a like position.

    Bounds time and memory whatever the number of supports: 40 slices at 512 pixels, 160 at 256.
    """
    index_above: int = 0
    """Support locations from which on all of them are searched by an approximate index instead of the most similar
    slices exactly; 0: never. Needs ``pip install 'nnunet_sam2[index]'``."""
    position_weight: float | None = None
    """Factor on the in-plane position (0 to 1) beside the unit-length embedding."""
    slice_weight: float | None = None
    """Factor on the slice's relative position (0 to 1)."""
    sharpness: float | None = None
    """How fast votes fall with distance: smaller is faster; see `vote`."""
    edge_radius: float | None = None
    """Reach of the edge filter in embedding cells; 0 leaves it out."""
    fine_weight: float | None = None
    """Factor on the image encoder's finer skip features, where half cells look for their neighbours."""
    half_cells: bool = True
    """Search among the neighbours once more at twice the embedding's resolution; see `half_cells`."""
    decoder: str = "checked"
    """``checked``: SAM 2's decoder redraws the classes for which that helped on labelled cases; ``off``: never."""
    check_slices: int = 24
    """Slices of labelled cases, all together, on which choices are made; 0 makes none and takes the defaults."""

    def __post_init__(self) -> None:
        at_least(self, 1, "neighbours", "memory_entries")
        at_least(self, 0, "check_slices", "index_above")
        for name in ("position_weight", "slice_weight", "edge_radius", "fine_weight"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.sharpness is not None and not self.sharpness > 0:
            raise ValueError(f"sharpness={self.sharpness} must be positive")
        if self.decoder not in ("checked", "off"):
            raise ValueError(f"decoder={self.decoder}: choose checked or off")
        if self.index_above:
            require_faiss()

    @property
    def fixed(self) -> dict[str, float | None]:
        """Return the numbers of a recipe that the user has set."""
        return {
            "position_weight": self.position_weight,
            "slice_weight": self.slice_weight,
            "sharpness": self.sharpness,
            "edge_radius": self.edge_radius,
            "fine_weight": self.fine_weight,
        }


class Transfer:
    """Label a query by its nearest support locations in SAM 2's embedding space; one member, all classes at once.

    Every location of a slice, described by its normalised embedding, its in-plane position and the slice's relative
    position, finds its nearest locations in the support slices; each quarter of it finds its own nearest among their
    quarters and takes the mean of their soft labels. The map is then fitted to the
    edges of the image (`snap_to_edges`). For the classes that gain by it on labelled cases, SAM 2's decoder redraws the
    map from a box and mask prompt. Needs no video memory.
    """

    name: ClassVar[str] = "transfer"
    needs_memory: ClassVar[bool] = False

    def __init__(self, options: TransferOptions | None = None) -> None:
        self._options = options or TransferOptions()
        self._recipe_rows: dict[str, dict[str, DiceTable]] = {}
        self._checked_default: Recipe | None = None
        self._decoder_rows: dict[str, dict[str, DiceTable]] = {}
        self._patients: dict[str, str] = {}
        self._memory: tuple[tuple[Any, ...], SupportMemory] | None = None

    @property
    def options(self) -> TransferOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Choose the recipe and the decoder's share on labelled cases, each patient left out in turn; see `Prepares`.

        With one patient nothing can be checked: the defaults are taken, and the decoder is not used.
        """
        self._recipe_rows, self._decoder_rows, self._checked_default = {}, {}, None
        self._patients = patients_by_case(supports)
        if self._options.check_slices and several_patients(supports):
            memory = self._memory_of(supports, class_values)
            chosen = np.linspace(0, len(supports) - 1, min(_CHECKED_CASES, len(supports))).round().astype(int)
            checked = [(places_of_patient(supports, s), supports[s]) for s in dict.fromkeys(chosen.tolist())]
            default = self._default(supports[0])
            recipes = list(dict.fromkeys([*candidate_recipes(self._options.fixed, default), default]))
            if len(recipes) > 1:
                for own, support in track(checked, what="choosing the recipe", total=len(checked)):
                    self._recipe_rows[support.case_id] = self._check_recipes(
                        own, support, memory, class_values, recipes, len(checked)
                    )
                self._checked_default = default
            if self._options.decoder == "checked":
                chosen_recipes = self._recipes(supports[0], class_values)
                for own, support in track(checked, what="checking the decoder", total=len(checked)):
                    self._decoder_rows[support.case_id] = self._check_decoder(
                        own, support, memory, class_values, chosen_recipes, len(checked), backend
                    )
        return {"recipe_check": _text_keys(self._recipe_rows), "decoder_check": _text_keys(self._decoder_rows)}

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
        *,
        places: Sequence[torch.Tensor] | None = None,
        weights: Place | None = None,
    ) -> Iterator[Member]:
        """Yield the one member; see `Strategy.members`. Nothing is drawn from ``rng``.

        ``places`` say for each support where its cells lie in the query, (N, P, 3); see `Alignment.cells`. ``weights``
        stand for the recipes' weights of position.
        """
        if not supports:
            raise InputError(f"case {query.case_id} has no support to take labels from")
        memory = self._memory_of(supports, class_values)
        own = scans_of(query, self._patients)
        recipes = self._recipes(supports[0], class_values, without=own)
        if weights is not None:
            recipes = list(dict.fromkeys(replace(recipe, **asdict(weights)) for recipe in recipes))
        if places is not None:
            memory = memory.placed(places, max(recipe.slice_weight for recipe in recipes))
        choices = best_choices(self._decoder_rows, class_values, default="map", without=own)
        shares = {k: _SHARES[choices[value]] for k, value in enumerate(class_values)}
        descriptors_nf = slice_descriptors(query.embeddings)
        ballots = Ballots(len(supports), len(class_values))

        def maps() -> Iterator[torch.Tensor]:
            for n in range(len(query.frames)):
                prob_chw = averaged(self._maps(query, n, descriptors_nf[n], memory, recipes, ballots=ballots))
                if any(shares.values()):
                    decoded = decode_map(backend, query.embeddings, n, prob_chw, _KINDS)
                    prob_chw = put_in(prob_chw, decoded, shares)
                yield prob_chw

        prob_czyx = query.frames.to_volume(maps())
        yield Member(
            name=self.name,
            prob_kzyx=prob_czyx[1:],
            background_zyx=prob_czyx[0],
            record={
                "supports": [support.case_id for support in supports],
                "recipes": [asdict(recipe) for recipe in recipes],
                "decoder_share": {str(value): shares[k] for k, value in enumerate(class_values)},
                "supports_agree": ballots.agreement(class_values),
                "prompts": asdict(_KINDS) if any(shares.values()) else None,
            },
        )

    def checked_dice(self, class_values: tuple[int, ...], *, without: Set[str] = frozenset()) -> DiceTable:
        """Return the mean Dice of what was chosen on the checked cases, for each class; None where nothing was checked.

        ``without`` leaves out a patient's cases. Choices were made on the same slices, so it is a little too high.
        """
        rows = self._decoder_rows or self._rows_of_recipe(class_values, without)
        choices = best_choices(rows, class_values, default="map", without=without)
        return {
            value: mean_dice([row[choices[value]] for case, row in rows.items() if case not in without], [value])[value]
            for value in class_values
        }

    def _rows_of_recipe(self, class_values: tuple[int, ...], without: Set[str]) -> dict[str, dict[str, DiceTable]]:
        if self._checked_default is None:
            return {}
        candidates = candidate_recipes(self._options.fixed, self._checked_default)
        best, *_ = choose_recipes(self._recipe_rows, candidates, self._checked_default, class_values, without=without)
        return {case_id: {"map": row[best.name]} for case_id, row in self._recipe_rows.items()}

    def _maps(
        self,
        query: Query,
        n: int,
        descriptor_f: torch.Tensor,
        memory: SupportMemory,
        recipes: Sequence[Recipe],
        *,
        without: Set[int] = frozenset(),
        ballots: Ballots | None = None,
    ) -> dict[Recipe, torch.Tensor]:
        """Return the soft map of one slice by each recipe, (C, h, w), summing to one."""
        # An index holds every support, so that those left out have to be searched around; that is only for checks.
        indexed = not without and not memory.is_placed and 0 < self._options.index_above < memory.locations
        if indexed:
            chosen: Sequence[int] = memory.slices
            memory_mf, labels_mc = memory.all_rows()
        else:
            depth = (n + 0.5) / len(query.frames)
            chosen = memory.choose(descriptor_f, depth, self._options.memory_entries, without=without)
            memory_mf, labels_mc = memory.rows(chosen)
        if not len(memory_mf):
            raise InputError(f"the supports have no judged voxel to label case {query.case_id} from")
        query_pf = slice_features(query.embeddings, n)
        counted = None if ballots is None else (ballots, memory.owners(chosen))
        image_3ss = query.frames.image(n)
        return soft_maps(
            query_pf,
            memory_mf,
            labels_mc,
            image_3ss,
            recipes,
            neighbours=self._options.neighbours,
            half_cells=memory.half_cells(query.embeddings, n, chosen) if self._options.half_cells else None,
            search=memory.search_all if indexed else partial(memory.search_among, chosen),
            ballots=counted,
        )

    def _check_recipes(
        self,
        own: Set[int],
        support: Support,
        memory: SupportMemory,
        class_values: tuple[int, ...],
        recipes: Sequence[Recipe],
        cases: int,
    ) -> dict[str, DiceTable]:
        query, scores = support.as_query(), {recipe: SliceDice(class_values) for recipe in recipes}
        descriptors_nf = slice_descriptors(query.embeddings)
        for n in self._slices(support, class_values, cases):
            for recipe, prob_chw in self._maps(query, n, descriptors_nf[n], memory, recipes, without=own).items():
                scores[recipe].add(support, n, prob_chw)
        return {recipe.name: score.table() for recipe, score in scores.items()}

    def _check_decoder(
        self,
        own: Set[int],
        support: Support,
        memory: SupportMemory,
        class_values: tuple[int, ...],
        recipes: Sequence[Recipe],
        cases: int,
        backend: Sam2Backend,
    ) -> dict[str, DiceTable]:
        query, scores = support.as_query(), {name: SliceDice(class_values) for name in _SHARES}
        descriptors_nf = slice_descriptors(query.embeddings)
        for n in self._slices(support, class_values, cases):
            prob_chw = averaged(self._maps(query, n, descriptors_nf[n], memory, recipes, without=own))
            decoded = decode_map(backend, query.embeddings, n, prob_chw, _KINDS)
            for name, share in _SHARES.items():
                redrawn = put_in(prob_chw, decoded, dict.fromkeys(range(len(class_values)), share))
                scores[name].add(support, n, redrawn)
        return {name: score.table() for name, score in scores.items()}

    def _slices(self, support: Support, class_values: tuple[int, ...], cases: int) -> list[int]:
        return check_slices(support, class_values, max(3, self._options.check_slices // cases))

    def _recipes(
        self, support: Support, class_values: tuple[int, ...], *, without: Set[str] = frozenset()
    ) -> list[Recipe]:
        # The rows hold the default of the supports that were checked; those of one query may be of another size.
        default = self._checked_default or self._default(support)
        if not set(self._recipe_rows) - without:
            return [default]
        candidates = candidate_recipes(self._options.fixed, default)
        return choose_recipes(self._recipe_rows, candidates, default, class_values, without=without)

    def _default(self, support: Support) -> Recipe:
        """Return what is taken where nothing can be checked; any labelled case tells how large a cell is in voxels."""
        grid = int(support.embeddings.top(0).shape[-1])
        hidden = min(support.frames.slice_shape_hw) / grid >= _VOXELS_FOR_EDGES
        default = Recipe() if hidden else replace(Recipe(), edge_radius=0.0)
        return replace(default, **{key: value for key, value in self._options.fixed.items() if value is not None})

    def _memory_of(self, supports: Sequence[Support], class_values: tuple[int, ...]) -> SupportMemory:
        # The memory holds the supports, so that their ids cannot be taken over by others.
        key = (class_values, *(id(support) for support in supports))
        if self._memory is None or self._memory[0] != key:
            self._memory = (key, SupportMemory(supports, class_values))
        return self._memory[1]


def _text_keys(rows: Mapping[str, Mapping[str, DiceTable]]) -> dict[str, dict[str, dict[str, float | None]]]:
    return {
        case_id: {name: {str(value): dice for value, dice in table.items()} for name, table in row.items()}
        for case_id, row in rows.items()
    }
