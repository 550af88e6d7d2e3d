"""Support slices as a memory of labelled locations.

Shape letters: N slices, P locations of a slice, M locations of several, F features, C channels (background first).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

from nnunet_sam2.labelling.strategies.transfer.half_cells import HalfCells, half_cell_features, into_quarters
from nnunet_sam2.labelling.strategies.transfer.index import ApproximateNearest
from nnunet_sam2.labelling.strategies.transfer.nearest import nearest
from nnunet_sam2.sam2.protocol import Embeddings
from nnunet_sam2.support.cases import Support

LEAST_JUDGED = 0.5
"""Part of a cell that a human must have judged for the cell to count as evidence."""

_POOLED = 4
_KEPT_LOCATIONS = 2**19
_KEPT_QUARTER_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class Place:
    """Say how much position counts beside appearance, as factors on coordinates from 0 to 1."""

    position_weight: float
    slice_weight: float

    def scale(self, features: int) -> torch.Tensor:
        """Return the factors for vectors as `slice_features` gives them."""
        coordinates = torch.tensor([self.position_weight, self.position_weight, self.slice_weight])
        return torch.cat([torch.ones(features - len(coordinates)), coordinates])


def slice_features(embeddings: Embeddings, index: int) -> torch.Tensor:
    """Return a slice's locations as unit-length embeddings with coordinates appended, (P, F + 3) float32.

    The coordinates are the in-plane position (row, column) and the slice's relative position in the volume, 0 to 1.
    """
    top = embeddings.top(index).cpu()
    features, height, width = top.shape
    appearance_pf = normalize(top.reshape(features, -1).T, dim=1)
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    depth_p1 = torch.full((len(appearance_pf), 1), (index + 0.5) / len(embeddings))
    return torch.cat([appearance_pf, torch.cartesian_prod(rows, columns), depth_p1], dim=1)


def slice_descriptors(embeddings: Embeddings) -> torch.Tensor:
    """Describe each slice by its embedding pooled to 4 x 4, unit length: (N, F) float32."""
    pooled = [adaptive_avg_pool2d(embeddings.top(n).cpu()[None], _POOLED).flatten() for n in range(len(embeddings))]
    return normalize(torch.stack(pooled), dim=1)


class SupportMemory:
    """Offer the labelled locations of the support slices that resemble a query slice."""

    def __init__(self, supports: Sequence[Support], class_values: tuple[int, ...]) -> None:
        self._supports = list(supports)
        self._class_values = class_values
        self._origin = [(s, n) for s, support in enumerate(self._supports) for n in range(len(support.frames))]
        self._depth_n = torch.tensor([(n + 0.5) / len(self._supports[s].frames) for s, n in self._origin])
        self._descriptors_nf = torch.cat([slice_descriptors(support.embeddings) for support in self._supports])
        self._locations = int(self._supports[0].embeddings.top(0).shape[1:].numel())
        self._cells: dict[int, np.ndarray] = {}
        self._slices: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._quarters: OrderedDict[int, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._half_labels: dict[int, np.ndarray] = {}
        self._spread_ratio: float | None = None
        self._all_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._indices: dict[Place, ApproximateNearest] = {}
        self._latest: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None
        self._counts: dict[int, int] = {}
        self._places_np3: torch.Tensor | None = None
        self._depth_weight = 1.0

    def placed(self, places_np3: Sequence[torch.Tensor], depth_weight: float) -> SupportMemory:
        """Return the memory with its locations elsewhere: (N, P, 3) for each support, e.g. where they lie in a query.

        Slices are chosen by their mean depth, whose difference counts by the factor ``depth_weight``. Features and
        labels are the same objects, so that this costs nothing.
        """
        view = copy.copy(self)
        view._places_np3 = torch.cat(list(places_np3))
        view._depth_n = view._places_np3[..., 2].mean(dim=1)
        view._depth_weight = depth_weight
        view._latest = None
        return view

    @property
    def is_placed(self) -> bool:
        """Say whether locations lie elsewhere than in their own volumes."""
        return self._places_np3 is not None

    def choose(
        self, descriptor_f: torch.Tensor, depth: float, entries: int, *, without: Set[int] = frozenset()
    ) -> list[int]:
        """Choose the slices that look most like the query slice at a like relative position, ascending.

        As many as have ``entries`` locations together, at least one. ``without`` leaves out supports by their places
        in the list.
        """
        score_n = self._descriptors_nf @ descriptor_f - (self._depth_weight * (self._depth_n - depth)).square()
        if without:
            score_n[torch.tensor([s in without for s, _ in self._origin])] = -torch.inf
        allowed = int(torch.isfinite(score_n).sum())
        count = max(1, entries // self._locations)
        return sorted(score_n.topk(min(count, allowed)).indices.tolist())

    def rows(self, slices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the locations of the chosen slices: features (M, F + 3) and soft labels (M, C).

        Locations that nobody has judged are left out; partly judged ones count by what was judged.
        """
        key = tuple(slices)
        if self._latest is None or self._latest[0] != key:
            parts = [self._slice(number) for number in key]
            features_mf = torch.cat([features for features, _ in parts])
            if self._places_np3 is not None:
                features_mf[:, -3:] = torch.cat([self._places_np3[number][self._kept(number)] for number in key])
            self._latest = (key, features_mf, torch.cat([labels for _, labels in parts]))
        return self._latest[1:]

    def owners(self, slices: Sequence[int]) -> torch.Tensor:
        """Return of which support, by its place in the list, each row of `rows` is, (M,)."""
        owner_n = torch.tensor([self._origin[number][0] for number in slices])
        return owner_n.repeat_interleave(torch.tensor([self._count(number) for number in slices]))

    def search_among(
        self, slices: Sequence[int], query_pf: torch.Tensor, place: Place, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find unscaled locations' neighbours among the rows of the chosen slices exactly; see `nearest`."""
        features_mf, _ = self.rows(slices)
        scale_f = place.scale(query_pf.shape[1])
        # Appearance has unit length and factors of one; factors on the position go to the query and into the lengths.
        norms_m = 1.0 + (features_mf[:, -3:] * scale_f[-3:]).square().sum(dim=1)
        return nearest(query_pf * scale_f.square(), features_mf, count, norms_m=norms_m)

    @property
    def slices(self) -> range:
        """Return the numbers of all slices."""
        return range(len(self._origin))

    @property
    def locations(self) -> int:
        """Return how many locations all slices have together, judged or not."""
        return len(self._origin) * self._locations

    def all_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `rows` of all slices returns, of the features the coordinates alone: (M, 3) and (M, C)."""
        if self._all_rows is None:
            parts = [self._slice(number) for number in self.slices]
            self._all_rows = (
                torch.cat([features[:, -3:] for features, _ in parts]),
                torch.cat([labels for _, labels in parts]),
            )
        return self._all_rows

    def search_all(self, query_pf: torch.Tensor, place: Place, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find locations' neighbours among the rows of all slices by an approximate index; see `ApproximateNearest`."""
        if place not in self._indices:

            def parts() -> Iterator[torch.Tensor]:
                for number in self.slices:
                    features_mf, _ = self._slice(number)
                    yield features_mf * place.scale(features_mf.shape[1])

            self._indices[place] = ApproximateNearest(parts, len(self.all_rows()[0]))
        return self._indices[place].nearest(query_pf * place.scale(query_pf.shape[1]), count)

    def half_cells(self, query: Embeddings, index: int, slices: Sequence[int]) -> HalfCells:
        """Return what the finer search for one query slice needs; entry numbers count the rows of `rows`."""

        def entries(numbers_u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            starts = np.cumsum([0, *(self._count(number) for number in slices)])
            bounds = torch.searchsorted(numbers_u, torch.from_numpy(starts)).tolist()
            features, labels = [], []
            for number, start, first, stop in zip(slices, starts, bounds[:-1], bounds[1:], strict=False):
                if first < stop:
                    mine = numbers_u[first:stop] - int(start)
                    features_p4f, labels_p4c = self._slice_quarters(number)
                    features.append(features_p4f.index_select(0, mine))
                    labels.append(labels_p4c.index_select(0, mine))
            return torch.cat(features), torch.cat(labels)

        return HalfCells(
            query_p4f=half_cell_features(query, index), entries=entries, spread_ratio=self._ratio_of_spreads()
        )

    def _ratio_of_spreads(self) -> float:
        if self._spread_ratio is None:
            embeddings = self._supports[0].embeddings
            chosen = np.linspace(0, len(embeddings) - 1, min(8, len(embeddings))).round().astype(int).tolist()
            unit = torch.cat([normalize(embeddings.top(n).cpu().float(), dim=0).flatten(1) for n in chosen], dim=1)
            fine = torch.cat([embeddings.high(n)[1].cpu().float().flatten(1) for n in chosen], dim=1)
            # Features that do not vary, as on a blank volume, have nothing to say whatever their weight.
            self._spread_ratio = float(unit.var(dim=1).sum() / fine.var(dim=1).sum().clamp_min(1e-12))
        return self._spread_ratio

    def _slice_quarters(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._quarters.get(number)
        if found is None:
            s, n = self._origin[number]
            _, parent_pc = self._slice(number)
            kept = self._kept(number)
            labels_p4c = into_quarters(torch.from_numpy(self._soft_half_labels(s)[n]))[kept]
            judged_p41 = labels_p4c.sum(dim=2, keepdim=True)
            # A quarter that nobody has judged takes what was judged in its cell.
            labels_p4c = torch.where(
                judged_p41 >= LEAST_JUDGED, labels_p4c / judged_p41.clamp_min(LEAST_JUDGED), parent_pc[:, None]
            )
            found = half_cell_features(self._supports[s].embeddings, n)[kept].half(), labels_p4c
            self._quarters[number] = found
            size = 2 * found[0].numel() + 4 * found[1].numel()
            if len(self._quarters) > 1 and len(self._quarters) * size > _KEPT_QUARTER_BYTES:
                self._quarters.popitem(last=False)
        self._quarters.move_to_end(number)
        return found

    def _judged(self, number: int) -> torch.Tensor:
        s, n = self._origin[number]
        return torch.from_numpy(self._soft_labels(s)[n].reshape(len(self._class_values) + 1, -1).T.copy())

    def _kept(self, number: int) -> torch.Tensor:
        return self._judged(number).sum(dim=1) >= LEAST_JUDGED

    def _count(self, number: int) -> int:
        """Return how many rows a slice has; kept, for its rows themselves may have been let go."""
        if number not in self._counts:
            self._counts[number] = len(self._slice(number)[0])
        return self._counts[number]

    def _slice(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._slices.get(number)
        if found is None:
            s, n = self._origin[number]
            features_pf = slice_features(self._supports[s].embeddings, n)
            labels_pc = self._judged(number)
            judged_p = labels_pc.sum(dim=1)
            kept = judged_p >= LEAST_JUDGED
            found = features_pf[kept], labels_pc[kept] / judged_p[kept, None]
            self._slices[number] = found
            if len(self._slices) * self._locations > _KEPT_LOCATIONS:
                self._slices.popitem(last=False)
        self._slices.move_to_end(number)
        return found

    def _soft_labels(self, s: int) -> np.ndarray:
        if s not in self._cells:
            support = self._supports[s]
            cell = support.frames.size // int(support.embeddings.top(0).shape[-1])
            self._cells[s] = support.frames.soft_cells(support.label_zyx, (0, *self._class_values), cell)
        return self._cells[s]

    def _soft_half_labels(self, s: int) -> np.ndarray:
        if s not in self._half_labels:
            support = self._supports[s]
            cell = support.frames.size // (2 * int(support.embeddings.top(0).shape[-1]))
            self._half_labels[s] = support.frames.soft_cells(support.label_zyx, (0, *self._class_values), cell)
        return self._half_labels[s]
