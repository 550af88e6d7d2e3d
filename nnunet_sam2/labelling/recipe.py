"""How labels are transferred, in numbers, and which numbers suit a cohort.

Shape letters: P locations of a slice, F features, C channels (background first), h w pixels of a working map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.memory import Place
from nnunet_sam2.labelling.nearest import nearest, snap_to_edges, vote

PIXELS_PER_CELL = 8
"""Resolution of the working map: finer than this, the frames only repeat the voxels of usual slices."""

EDGE_SOFTNESS = 1e-3
"""Variance of intensity (0 to 1, squared) below which the edge filter sees no edge."""

NEIGHBOURS = 60
"""Votes on a location; with weights that fall with distance, more of them change little."""

_LEAST_GAIN = 0.003
"""Dice by which a recipe must beat the default on held-out cases; less than that is noise of a few slices."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hold the numbers that one transfer uses."""

    position_weight: float = 1.5
    slice_weight: float = 1.0
    sharpness: float = 0.2
    edge_radius: float = 1.0
    """In embedding cells; 0 leaves the edge filter out."""

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

SHARPNESSES = (0.1, 0.3)
EDGE_RADII = (0.0, 0.5, 1.0)


def candidate_recipes(fixed: Mapping[str, float | None]) -> list[Recipe]:
    """List the recipes to choose from; ``fixed`` are numbers that the user has set (None: free)."""

    def free(key: str, values: Sequence[float]) -> Sequence[float]:
        value = fixed.get(key)
        return values if value is None else (value,)

    places: Sequence[tuple[float, float]] = PLACES
    if fixed.get("position_weight") is not None or fixed.get("slice_weight") is not None:
        default = Recipe()
        position, depth = fixed.get("position_weight"), fixed.get("slice_weight")
        places = (
            (
                default.position_weight if position is None else position,
                default.slice_weight if depth is None else depth,
            ),
        )
    return [
        Recipe(position_weight=position, slice_weight=depth, sharpness=sharpness, edge_radius=radius)
        for (position, depth), sharpness, radius in product(
            places, free("sharpness", SHARPNESSES), free("edge_radius", EDGE_RADII)
        )
    ]


def choose_recipe(
    rows: Mapping[str, Mapping[str, DiceTable]],
    candidates: Sequence[Recipe],
    default: Recipe,
    class_values: Sequence[int],
    *,
    without: str | None = None,
) -> Recipe:
    """Choose the recipe with the best mean Dice over classes and checked cases, if it clearly beats the default.

    ``rows`` maps a case to the Dice that every recipe, by name, had on it. ``without`` leaves a case's own row out.
    """
    score = {}
    for recipe in (*candidates, default):
        found = [
            dice
            for case_id, row in rows.items()
            if case_id != without
            for value in class_values
            if (dice := row[recipe.name].get(value)) is not None
        ]
        score[recipe] = float(np.mean(found)) if found else 0.0
    best = max(candidates, key=lambda recipe: score[recipe])
    return best if score[best] > score[default] + _LEAST_GAIN else default


def soft_maps(
    query_pf: torch.Tensor,
    memory_mf: torch.Tensor,
    labels_mc: torch.Tensor,
    image_3ss: np.ndarray,
    recipes: Sequence[Recipe],
    *,
    neighbours: int = NEIGHBOURS,
) -> dict[Recipe, torch.Tensor]:
    """Transfer labels to one slice by each recipe; maps (C, h, w) that sum to one, 8 pixels a cell.

    ``query_pf`` and ``memory_mf`` are as from `slice_features`. What recipes have in common is computed once.
    """
    grid = round(len(query_pf) ** 0.5)
    side = grid * PIXELS_PER_CELL
    grey_ss = torch.from_numpy(image_3ss).mean(dim=0)[None, None]
    guide_hw = interpolate(grey_ss, size=(side, side), mode="bilinear", antialias=grey_ss.shape[-1] > side)[0, 0]
    maps: dict[Recipe, torch.Tensor] = {}
    for place in dict.fromkeys(recipe.place for recipe in recipes):
        scale_f = place.scale(query_pf.shape[1])
        excess_pk, index_pk = nearest(query_pf * scale_f, memory_mf * scale_f, neighbours)
        labels_pkc = labels_mc[index_pk]
        for sharpness in dict.fromkeys(r.sharpness for r in recipes if r.place == place):
            prob_pc = vote(excess_pk, labels_pkc, sharpness)
            coarse = prob_pc.T.reshape(1, -1, grid, grid)
            prob_chw = interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)[0]
            for recipe in recipes:
                if recipe.place == place and recipe.sharpness == sharpness:
                    radius = round(recipe.edge_radius * PIXELS_PER_CELL)
                    maps[recipe] = (
                        snap_to_edges(prob_chw, guide_hw, radius=radius, softness=EDGE_SOFTNESS) if radius else prob_chw
                    )
    return maps
