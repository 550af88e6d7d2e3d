"""`insert` with the paper's preset against the same pseudo-videos in sam2's own predictor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labeller_bench.setting import TITLES, Clock, Scene, dice, load_scene, make_backend, stock_arguments, table
from labeller_bench.stock import Insertion, StockPredictor
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import MetaSam2Backend

DATASET = "hippocampus"
INSERTIONS = 5
MEASURED = {"embedded": 3, "hiera_tiny": 1}
"""Supports with which the stock predictor runs, one insertion each, the one of middling length first; the other
insertions are taken to cost the same."""


def measure_insert(threads: int, models: tuple[str, ...], device: str) -> dict[str, Any]:
    """Time both in both number formats, turn by turn, in processor seconds of the same process."""
    torch.set_num_threads(threads)
    return {name: _measure(name, threads, device) for name in models}


def _measure(name: str, threads: int, device: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    reference: dict[tuple[str, int], np.ndarray] = {}
    for precision in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            first, again, stock = Clock(), Clock(), Clock()

            def fresh(folder: Path = Path(folder), precision: str = precision) -> MetaSam2Backend:
                return make_backend(name, threads=threads, precision=precision, cache_dir=folder, device=device)

            backend = fresh()
            with first.running():
                members, scene = _ours(backend)
            predictor = StockPredictor(backend._model, stock_arguments(backend), reduced=precision == "bfloat16")
            runs, stock_found = 0, {}
            for member in _measured(members, scene, MEASURED[name]):
                support = next(s for s in scene.supports if s.case_id == member.record["support"])
                place = member.record["classes"][str(scene.classes[0])]["place"]["before_query_slice"]
                found = np.full((len(scene.classes), len(scene.query.frames), *scene.query.frames.slice_shape_hw), -1.0)
                for reverse in (False, True):
                    insertion = Insertion(support=support, before=place, reverse=reverse)
                    with stock.running():
                        for n, prob_khw in predictor.probabilities(scene.query, insertion, scene.classes):
                            found[:, n] = prob_khw
                    runs += 1
                stock_found[member.name, place] = found
            later = fresh()
            with again.running():
                _ours(later)
        reference = reference or stock_found
        every = 2 * INSERTIONS * len(scene.supports)
        rows[precision] = {
            "slices": len(scene.query.frames),
            "support_slices": [len(s.frames) for s in scene.supports],
            "classes": len(scene.classes),
            "image_size": backend.spec.image_size,
            "stock_runs_measured": runs,
            "stock_runs": every,
            "stock_s": stock.cpu_s / runs * every,
            "first_s": first.cpu_s,
            "second_s": again.cpu_s,
            "first_wall_s": first.wall_s,
            "second_wall_s": again.wall_s,
            "stock_wall_s": stock.wall_s / runs * every,
            "ratio_first": stock.cpu_s / runs * every / first.cpu_s,
            "ratio_second": stock.cpu_s / runs * every / again.cpu_s,
            "ours_from_stock_float32": _differences(reference, _by_name(members, scene)),
            "stock_from_stock_float32": _differences(reference, stock_found),
        }
    return rows


def _ours(backend: MetaSam2Backend) -> tuple[list[Member], Scene]:
    """Read, encode and label as a user's run does; nothing is in memory yet."""
    scene = load_scene(DATASET, backend)
    strategy = make_strategy("insert", {"preset": "paper", "insertions": INSERTIONS})
    members = list(strategy.members(scene.query, scene.supports, scene.classes, backend, np.random.default_rng(3)))
    fuse(members, scene.classes)
    return members, scene


def _measured(members: list[Member], scene: Scene, count: int) -> list[Member]:
    middling = np.median([len(support.frames) for support in scene.supports])
    order = sorted(scene.supports, key=lambda support: abs(len(support.frames) - middling))
    return [next(m for m in members if m.record["support"] == s.case_id) for s in order[:count]]


def _by_name(members: list[Member], scene: Scene) -> dict[tuple[str, int], np.ndarray]:
    value = str(scene.classes[0])
    return {
        (m.name, m.record["classes"][value]["place"]["before_query_slice"]): np.stack(
            [scene.query.frames.slices_first(prob_zyx) for prob_zyx in m.prob_kzyx]
        )
        for m in members
    }


def _differences(
    reference: dict[tuple[str, int], np.ndarray], found: dict[tuple[str, int], np.ndarray]
) -> dict[str, float]:
    pairs = [(reference[key], found[key]) for key in reference]
    off = np.concatenate([np.abs(a - b).ravel() for a, b in pairs])
    masks = [np.concatenate([(p > 0.5).ravel() for p in side]) for side in zip(*pairs, strict=True)]
    return {
        "mean": float(off.mean()),
        "q999": float(np.quantile(off, 0.999)),
        "largest": float(off.max()),
        "dice": dice(*masks),
    }


def insert_table(result: dict[str, Any]) -> str:
    """Return the tables of time and of likeness."""
    times, likeness = [], []
    for name, rows in result["models"].items():
        for precision, row in rows.items():
            times.append(
                [
                    TITLES[name],
                    precision,
                    f"{row['stock_s']:.0f} ({row['stock_runs_measured']} of {row['stock_runs']} runs measured)",
                    f"{row['first_s']:.1f}",
                    f"{row['second_s']:.1f}",
                    f"**{row['ratio_first']:.1f}**",
                    f"**{row['ratio_second']:.1f}**",
                ]
            )
            for who, key in (("ours", "ours_from_stock_float32"), ("stock", "stock_from_stock_float32")):
                if (who, precision) != ("stock", "float32"):
                    d = row[key]
                    numbers = [f"{d['mean']:.1e}", f"{d['q999']:.1e}", f"{d['largest']:.1e}", f"{d['dice']:.4f}"]
                    likeness.append([TITLES[name], f"{who}, {precision}", *numbers])
    head = [
        "model",
        "products in",
        "stock CPU s",
        "ours CPU s",
        "with embeddings on disk",
        "ratio",
        "ratio, second run",
    ]
    other = ["model", "against stock in float32", "mean", "99.9 % below", "largest", "Dice of the masks"]
    return table(head, times) + "\n\n" + table(other, likeness)
