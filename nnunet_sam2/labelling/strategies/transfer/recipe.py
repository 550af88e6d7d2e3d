"""How labels are transferred, in numbers, and which numbers suit a cohort.

Shape letters: P locations of a slice, F features, C channels (background first), h w pixels of a working map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.strategies.transfer.ballots import Ballots
from nnunet_sam2.labelling.strategies.transfer.half_cells import (
    HalfCells,
    from_quarters,
    nearest_quarters,
    place_quarters,
)
from nnunet_sam2.labelling.strategies.transfer.memory import Place
from nnunet_sam2.labelling.strategies.transfer.nearest import nearest, snap_to_edges, vote, vote_weights

PIXELS_PER_CELL = 8
"""Resolution of the working map: finer than this, the frames only repeat the voxels of usual slices."""

EDGE_SOFTNESS = 1e-3
"""Variance of intensity (0 to 1, squared) below which the edge filter sees no edge."""

NEIGHBOURS = 60
"""Votes on a location; with weights that fall with distance, more of them change little."""

INDISTINCT = 0.01
"""Dice within which recipes count as equally good: what a few slices of a few cases leave to chance."""


Search = Callable[[torch.Tensor, Place, int], tuple[torch.Tensor, torch.Tensor]]
"""Unscaled locations (P, F + 3), weights of position, K -> what `nearest` returns."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hold the numbers that one transfer uses."""

    position_weight: float = 1.5
    slice_weight: float = 1.0
    sharpness: float = 0.1
    edge_radius: float = 0.5
    """In embedding cells; 0 leaves the edge filter out."""
    fine_weight: float = 0.3
    """Of the skip features beside the embedding, where half cells look for their neighbours."""

    @property
    def name(self) -> str:
        """Return a short text that tells recipes apart."""
        return " ".join(f"{key}={value:g}" for key, value in asdict(self).items())

    @property
    def place(self) -> Place:
        """Return the weights of position."""
        return Place(position_weight=self.position_weight, slice_weight=self.slice_weight)


PLACES = ((1.5, 1.0), (3.0, 2.0))
"""In-plane and through-plane weights to choose from: for free anatomy, and for crops that are aligned already."""

SHARPNESSES = (0.05, 0.2)
FINE_WEIGHTS = (0.3,)


def candidate_recipes(fixed: Mapping[str, float | None], default: Recipe) -> list[Recipe]:
    """List the recipes to choose from; ``fixed`` are numbers that the user has set (None: free).

    They differ in what cohorts differ in, how well subjects are aligned and how many neighbours agree. The rest is the
    default's: each number more to choose by is one more to be misled by.
    """

    def free(key: str, values: Sequence[float]) -> Sequence[float]:
        value = fixed.get(key)
        return values if value is None else (value,)

    places: Sequence[tuple[float, float]] = PLACES
    if fixed.get("position_weight") is not None or fixed.get("slice_weight") is not None:
        position, depth = fixed.get("position_weight"), fixed.get("slice_weight")
        places = (
            (
                default.position_weight if position is None else position,
                default.slice_weight if depth is None else depth,
            ),
        )
    return [
        Recipe(position_weight=position, slice_weight=depth, sharpness=sharpness, edge_radius=radius, fine_weight=fine)
        for (position, depth), sharpness, radius, fine in product(
            places,
            free("sharpness", SHARPNESSES),
            free("edge_radius", (default.edge_radius,)),
            free("fine_weight", FINE_WEIGHTS),
        )
    ]


def choose_recipes(
    rows: Mapping[str, Mapping[str, DiceTable]],
    candidates: Sequence[Recipe],
    default: Recipe,
    class_values: Sequence[int],
    *,
    without: Set[str] = frozenset(),
) -> list[Recipe]:
    """Choose the recipes that the checked cases cannot tell from the best one, best first; their maps are averaged.

    Few labelled cases rank recipes by chance: to pick the winner alone is to follow it, and where it does not clearly
    beat the default, the default stays. ``rows`` maps a case to the Dice that every recipe, by name, had on it.
    ``without`` leaves out the rows of a patient's cases.
    """
    score = {}
    for recipe in dict.fromkeys((default, *candidates)):
        found = [
            dice
            for case_id, row in rows.items()
            if case_id not in without
            for value in class_values
            if (dice := row[recipe.name].get(value)) is not None
        ]
        score[recipe] = float(np.mean(found)) if found else 0.0
    ranked = sorted(score, key=lambda recipe: -score[recipe])
    if score[ranked[0]] < score[default] + INDISTINCT:
        return [default]
    return [recipe for recipe in ranked if score[recipe] >= score[ranked[0]] - INDISTINCT]


def averaged(maps: Mapping[Recipe, torch.Tensor]) -> torch.Tensor:
    """Return the mean of the maps, (C, h, w)."""
    return torch.stack(list(maps.values())).mean(dim=0)


def soft_maps(
    query_pf: torch.Tensor,
    memory_mf: torch.Tensor,
    labels_mc: torch.Tensor,
    image_3ss: np.ndarray,
    recipes: Sequence[Recipe],
    *,
    neighbours: int = NEIGHBOURS,
    half_cells: HalfCells | None = None,
    search: Search | None = None,
    ballots: tuple[Ballots, torch.Tensor] | None = None,
) -> dict[Recipe, torch.Tensor]:
    """Transfer labels to one slice by each recipe; maps (C, h, w) that sum to one, 8 pixels a cell.

    ``query_pf`` and ``memory_mf`` are as from `slice_features`. With ``half_cells`` the neighbours found are searched
    once more at twice the resolution. With ``search`` the neighbours come from elsewhere, and of ``memory_mf`` only the
    coordinates are read. ``ballots`` are where each support's votes are counted, and the support of each memory entry
    (M,). What recipes have in common is computed once.
    """
    grid = round(len(query_pf) ** 0.5)
    side = grid * PIXELS_PER_CELL
    grey_ss = torch.from_numpy(image_3ss).mean(dim=0)[None, None]
    guide_hw = interpolate(grey_ss, size=(side, side), mode="bilinear", antialias=grey_ss.shape[-1] > side)[0, 0]
    maps: dict[Recipe, torch.Tensor] = {}
    for place in dict.fromkeys(recipe.place for recipe in recipes):
        if search is None:
            scale_f = place.scale(query_pf.shape[1])
            excess_pk, index_pk = nearest(query_pf * scale_f, memory_mf * scale_f, neighbours)
        else:
            excess_pk, index_pk = search(query_pf, place, neighbours)
        for fine_weight in dict.fromkeys(r.fine_weight for r in recipes if r.place == place):
            if half_cells is not None:
                found = _among_quarters(
                    query_pf, memory_mf, index_pk, half_cells, place, fine_weight, grid=grid, neighbours=neighbours
                )
            else:
                found = excess_pk, labels_mc[index_pk], index_pk
            alike = [r for r in recipes if r.place == place and r.fine_weight == fine_weight]
            for sharpness in dict.fromkeys(r.sharpness for r in alike):
                excess_qk, labels_qkc, entries_qk = found
                prob_pc = vote(excess_qk, labels_qkc, sharpness)
                if ballots is not None:
                    ballots[0].add(vote_weights(excess_qk, sharpness), labels_qkc, ballots[1][entries_qk])
                if half_cells is None:
                    coarse = prob_pc.T.reshape(-1, grid, grid)
                else:
                    coarse = from_quarters(prob_pc.reshape(-1, 4, prob_pc.shape[1]))
                prob_chw = interpolate(coarse[None], size=(side, side), mode="bilinear", align_corners=False)[0]
                for recipe in alike:
                    if recipe.sharpness == sharpness:
                        radius = round(recipe.edge_radius * PIXELS_PER_CELL)
                        maps[recipe] = (
                            snap_to_edges(prob_chw, guide_hw, radius=radius, softness=EDGE_SOFTNESS)
                            if radius
                            else prob_chw
                        )
    return maps


def _among_quarters(
    query_pf: torch.Tensor,
    memory_mf: torch.Tensor,
    index_pk: torch.Tensor,
    half_cells: HalfCells,
    place: Place,
    fine_weight: float,
    *,
    grid: int,
    neighbours: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the neighbours of every quarter of a cell: excess distances (4P, K), soft labels (4P, K, C), entries."""
    numbers_u, inverse = torch.unique(index_pk, return_inverse=True)
    features_u4f, labels_u4c = half_cells.entries(numbers_u)
    scale_f = torch.ones(features_u4f.shape[2] + 3)
    scale_f[query_pf.shape[1] - 3 : -3] = (fine_weight * half_cells.spread_ratio) ** 0.5
    scale_f[-3:] = place.scale(3)
    query = place_quarters(half_cells.query_p4f, query_pf[:, -3:], grid=grid)
    memory = place_quarters(features_u4f, memory_mf[numbers_u, -3:], grid=grid)
    excess_p4k, chosen_p4k = nearest_quarters(query, memory, inverse, neighbours, scale_f)
    chosen_qk = chosen_p4k.flatten(0, 1)
    return excess_p4k.flatten(0, 1), labels_u4c.flatten(0, 1)[chosen_qk], numbers_u[chosen_qk // 4]
