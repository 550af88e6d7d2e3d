"""Label transfer: each location of a query takes the label of its nearest support locations.

Shape letters: N slices, C channels (background first), K classes, G embedding grid, h w pixels of a working map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.decoding import PromptKinds, decode_map, put_in, shares_json
from nnunet_sam2.labelling.leave_one_out import DiceTable, best_choices
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.memory import Place, SupportMemory, slice_descriptors, slice_features
from nnunet_sam2.labelling.nearest import nearest_labels, snap_to_edges
from nnunet_sam2.labelling.slice_check import SliceDice, check_slices
from nnunet_sam2.labelling.strategy import Query, Support
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend

_PIXELS_PER_CELL = 8
"""Resolution of the working map: finer than this, the frames only repeat the voxels of usual slices."""

_KINDS = PromptKinds(box=True, points=False, mask=True)
_SHARES = {"map": 0.0, "mean": 0.5, "decoder": 1.0}
"""How far a class's map moves towards the decoder's answer, by the name of the choice."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Say how labels are transferred; the defaults were chosen on held-out labelled cases of three data sets."""

    neighbours: int = 60
    """How many nearest memory entries vote on a location."""
    temperature: float = 0.05
    """Squared distance beyond the nearest entry's at which a vote has fallen to 1/e."""
    position_weight: float = 1.5
    """Factor on the in-plane position (0 to 1) beside the unit-length embedding."""
    slice_weight: float = 1.0
    """Factor on the slice's relative position (0 to 1)."""
    memory_slices: int = 40
    """Support slices that a query slice is compared with: the most similar ones at a like position."""
    edge_radius: float = 1.0
    """Reach of the edge filter in embedding cells; 0 leaves it out."""
    edge_softness: float = 1e-3
    """Variance of intensity (0 to 1, squared) below which the edge filter sees no edge."""
    decoder: str = "checked"
    """``checked``: SAM 2's decoder redraws the classes for which that helped on labelled cases; ``off``: never."""
    check_slices: int = 10
    """Slices of each labelled case on which the decoder is checked."""

    def __post_init__(self) -> None:
        for name in ("neighbours", "memory_slices", "check_slices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("position_weight", "slice_weight", "edge_radius"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("temperature", "edge_softness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.decoder not in ("checked", "off"):
            raise ValueError(f"decoder={self.decoder}: choose checked or off")


class Transfer:
    """Label a query by its nearest support locations in SAM 2's embedding space; one member, all classes at once.

    Every location of a slice, described by its normalised embedding, its in-plane position and the slice's relative
    position, takes the mean soft label of its nearest locations in the support slices. The map is then fitted to the
    edges of the image (`snap_to_edges`). For the classes that gain by it on labelled cases, each left out in turn, SAM
    2's decoder redraws the map from a box and mask prompt. Needs no video memory.
    """

    name: ClassVar[str] = "transfer"
    needs_memory: ClassVar[bool] = False

    def __init__(self, options: TransferOptions | None = None) -> None:
        self._options = options or TransferOptions()
        self._rows: dict[str, dict[str, DiceTable]] = {}
        self._memory: tuple[tuple[Any, ...], SupportMemory] | None = None

    @property
    def options(self) -> TransferOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Check on the labelled cases, each left out in turn, whether the decoder helps; see `Prepares`.

        With one support nothing can be checked, and the decoder is not used.
        """
        self._rows = {}
        if self._options.decoder == "checked" and len(supports) > 1:
            memory = self._memory_of(supports, class_values)
            for s, support in track(list(enumerate(supports)), what="checking the decoder", total=len(supports)):
                self._rows[support.case_id] = self._check(s, support, memory, class_values, backend)
        return {
            "decoder_check": {
                case_id: {name: {str(v): d for v, d in table.items()} for name, table in row.items()}
                for case_id, row in self._rows.items()
            }
        }

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the one member; see `Strategy.members`. Nothing is drawn from ``rng``."""
        if not supports:
            raise InputError(f"case {query.case_id} has no support to take labels from")
        memory = self._memory_of(supports, class_values)
        choices = best_choices(self._rows, class_values, default="map", without=query.case_id)
        shares = {k: _SHARES[choices[value]] for k, value in enumerate(class_values)}
        descriptors_nf = slice_descriptors(query.embeddings)

        def maps() -> Iterator[torch.Tensor]:
            for n in range(len(query.frames)):
                prob_chw = self._slice_map(query, n, descriptors_nf[n], memory)
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
                "memory_slices": min(self._options.memory_slices, len(memory)),
                "decoder_share": shares_json(shares, class_values),
                "prompts": asdict(_KINDS) if any(shares.values()) else None,
            },
        )

    def _slice_map(
        self, query: Query, n: int, descriptor_f: torch.Tensor, memory: SupportMemory, *, without: int | None = None
    ) -> torch.Tensor:
        """Return the soft map of one slice, (C, h, w), summing to one."""
        options = self._options
        depth = (n + 0.5) / len(query.frames)
        chosen = memory.choose(descriptor_f, depth, options.memory_slices, without=without)
        memory_mf, labels_mc = memory.rows(chosen)
        if not len(memory_mf):
            raise InputError(f"the supports have no judged voxel to label case {query.case_id} from")
        query_pf = slice_features(query.embeddings, n, self._place)
        label_pc = nearest_labels(
            query_pf, memory_mf, labels_mc, neighbours=options.neighbours, temperature=options.temperature
        )
        grid = round(len(label_pc) ** 0.5)
        side = grid * _PIXELS_PER_CELL
        prob_cgg = label_pc.T.reshape(1, -1, grid, grid)
        prob_chw = interpolate(prob_cgg, size=(side, side), mode="bilinear", align_corners=False)[0]
        radius = round(options.edge_radius * _PIXELS_PER_CELL)
        if radius < 1:
            return prob_chw
        image_hw = torch.from_numpy(query.frames.image(n)).mean(dim=0)
        guide = interpolate(image_hw[None, None], size=(side, side), mode="bilinear", antialias=True)[0, 0]
        return snap_to_edges(prob_chw, guide, radius=radius, softness=options.edge_softness)

    def _check(
        self, s: int, support: Support, memory: SupportMemory, class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, DiceTable]:
        query = support.as_query()
        descriptors_nf = slice_descriptors(query.embeddings)
        scores = {name: SliceDice(class_values) for name in _SHARES}
        for n in check_slices(support, class_values, self._options.check_slices):
            prob_chw = self._slice_map(query, n, descriptors_nf[n], memory, without=s)
            decoded = decode_map(backend, query.embeddings, n, prob_chw, _KINDS)
            for name, share in _SHARES.items():
                redrawn = put_in(prob_chw, decoded, dict.fromkeys(range(len(class_values)), share))
                scores[name].add(support, n, redrawn)
        return {name: score.table() for name, score in scores.items()}

    @property
    def _place(self) -> Place:
        return Place(position_weight=self._options.position_weight, slice_weight=self._options.slice_weight)

    def _memory_of(self, supports: Sequence[Support], class_values: tuple[int, ...]) -> SupportMemory:
        key = (class_values, *(id(support) for support in supports))
        if self._memory is None or self._memory[0] != key:
            self._memory = (key, SupportMemory(supports, class_values, self._place))
        return self._memory[1]
