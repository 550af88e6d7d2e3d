"""A picture of the bench's organs on CT: where labels reach what is asked of them, and where not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

SET_NAME, SUPPORTS = "btcv_ct", 3
ROWS = (
    ("auto", "embedded, 256 px: auto", "#1b6ca8"),
    ("deformable registration of the best scan", "deformable registration", "#e08e45"),
    ("copy of the most similar slice", "copy", "#b0b0b0"),
)


def draw_organs(cells: Mapping[str, Any], picture: Path) -> None:
    """Draw each part's Dice, the mean of the draws as a bar and each draw as a dot, and write an SVG file."""
    draws = [cell for key, cell in sorted(cells.items()) if key.startswith(f"{SET_NAME}/{SUPPORTS}/")]
    parts = list(draws[0][ROWS[0][1]]["classes"])
    figure, axes = plt.subplots(figsize=(9.6, 3.6), layout="constrained")
    width = 0.8 / len(ROWS)
    for n, (title, row, colour) in enumerate(ROWS):
        found = [draw[row] for draw in draws if row in draw]
        places = np.arange(len(parts)) + (n - (len(ROWS) - 1) / 2) * width
        dice_dp = np.array([[result["classes"][part] or 0.0 for part in parts] for result in found])
        count = f"{len(found)} draw{'s' if len(found) > 1 else ''}"
        axes.bar(places, dice_dp.mean(axis=0), width, color=colour, label=f"{title} ({count})")
        for dice_p in dice_dp:
            axes.plot(places, dice_p, ".", color="black", markersize=3)
    axes.set(ylabel="Dice", ylim=(0, 1), title=f"Abdominal CT, {SUPPORTS} labelled scans, four others a draw")
    axes.set_xticks(np.arange(len(parts)), parts, rotation=30, ha="right")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    # No date and fixed ids: the same results give the same file.
    with plt.rc_context({"svg.hashsalt": "organs", "svg.fonttype": "none"}):
        figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)
