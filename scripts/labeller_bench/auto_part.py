"""`auto` against stock `insert`: seconds, and Dice with human labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from labeller_bench.setting import Clock, Scene, dice, load_scene, make_backend, stock_arguments, table
from labeller_bench.stock import Insertion, StockPredictor
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategy import Prepares
from nnunet_sam2.sam2.backend import MetaSam2Backend

DATASETS = ("hippocampus",)
QUERIES = 4
INSERTIONS = 5


def measure_auto(threads: int, device: str) -> dict[str, Any]:
    """Label the same queries by both with the model in the box, in the number format that it takes here."""
    torch.set_num_threads(threads)
    return {dataset: _measure(dataset, threads, device) for dataset in DATASETS}


def _measure(dataset: str, threads: int, device: str) -> dict[str, Any]:
    scores: dict[str, list[float]] = {"auto": [], "insert": []}
    clocks = {name: Clock() for name in ("auto", "insert", "stock")}
    stock_s = 0.0
    strategies = {"auto": make_strategy("auto", {}), "insert": make_strategy("insert", {"preset": "paper"})}
    # Each starts without embeddings and encodes for itself, as a run of its own would.
    backends = {name: make_backend("embedded", threads=threads, device=device) for name in strategies}
    for number in range(QUERIES):
        for name, strategy in strategies.items():
            with clocks[name].running():
                scene = load_scene(dataset, backends[name], query=number)
                if number == 0 and isinstance(strategy, Prepares):
                    # Once a cohort; the supports of one draw are the same for every query.
                    strategy.prepare(scene.supports, scene.classes, backends[name])
                labels = [support.label_zyx for support in scene.supports]
                fusion = FusionOptions(single_component_classes=single_component_classes(labels, scene.classes))
                if name == "insert":
                    fusion = replace(fusion, components="largest")
                members = strategy.members(
                    scene.query, scene.supports, scene.classes, backends[name], np.random.default_rng(number)
                )
                label_zyx = fuse(members, scene.classes, fusion).label_zyx
            scores[name].append(dice(label_zyx > 0, scene.truth_zyx > 0))
        stock_s += _stock_seconds(scene, backends["insert"], clocks["stock"])
    return {
        "queries": QUERIES,
        "supports": len(scene.supports),
        "precision": backends["auto"].spec.precision,
        "dice": {name: float(np.mean(values)) for name, values in scores.items()},
        "dice_each": scores,
        "auto_s": clocks["auto"].cpu_s / QUERIES,
        "insert_s": clocks["insert"].cpu_s / QUERIES,
        "stock_s": stock_s / QUERIES,
        "ratio": stock_s / clocks["auto"].cpu_s,
    }


def _stock_seconds(scene: Scene, backend: MetaSam2Backend, clock: Clock) -> float:
    """Time both ways of one insertion of one support under autocast, the faster of its formats, and scale to all."""
    predictor = StockPredictor(backend._model, stock_arguments(backend), reduced=True)
    middle = len(scene.query.frames) // 2
    before = clock.cpu_s
    for reverse in (False, True):
        insertion = Insertion(support=scene.supports[len(clock.laps) % 3], before=middle, reverse=reverse)
        with clock.running():
            for _ in predictor.probabilities(scene.query, insertion, scene.classes):
                pass
    return (clock.cpu_s - before) * INSERTIONS * len(scene.supports)


def auto_table(result: dict[str, Any]) -> str:
    """Return the table of seconds and Dice."""
    rows = [
        [
            name,
            f"{row['queries']} queries, {row['supports']} supports",
            f"{row['dice']['insert']:.3f}",
            f"{row['dice']['auto']:.3f}",
            f"{row['stock_s']:.0f}",
            f"{row['insert_s']:.1f}",
            f"{row['auto_s']:.1f}",
            f"**{row['ratio']:.1f}**",
        ]
        for name, row in result["sets"].items()
    ]
    head = ["set", "cases", "Dice of `insert`", "Dice of `auto`", "stock `insert` CPU s a case"]
    return table([*head, "our `insert`", "`auto`", "stock / `auto`"], rows)
