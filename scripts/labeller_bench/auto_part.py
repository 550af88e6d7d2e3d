"""`auto` against stock `insert`: seconds, and Dice with human labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from labeller_bench.setting import (
    QUERIES,
    SUPPORTS,
    Clock,
    Scene,
    class_values,
    dice,
    load_scene,
    load_supports,
    make_backend,
    stock_arguments,
    table,
)
from labeller_bench.stock import Insertion, StockPredictor
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategy import BringsFusion, Prepares
from nnunet_sam2.sam2.backend import MetaSam2Backend
from nnunet_sam2.support.cases import Support

DATASETS = ("hippocampus", "acdc")
OURS: dict[str, tuple[str, dict[str, str]]] = {
    "auto": ("auto", {}),
    "auto, views=one": ("auto", {"views": "one"}),
    "transfer": ("transfer", {}),
}
INSERTIONS = 5
COHORT = 30
"""Cases over which what is done once a cohort is spread."""


def measure_auto(threads: int, device: str) -> dict[str, Any]:
    """Label the same queries by both with the model in the box, in the number format that it takes here."""
    torch.set_num_threads(threads)
    return {dataset: _measure(dataset, threads, device) for dataset in DATASETS}


def _measure(dataset: str, threads: int, device: str) -> dict[str, Any]:
    strategies = {"insert": make_strategy("insert", {"preset": "paper"})}
    strategies |= {name: make_strategy(*wanted) for name, wanted in OURS.items()}
    # Each starts without embeddings and encodes for itself, as a run of its own would.
    backends = {name: make_backend("embedded", threads=threads, device=device) for name in strategies}
    once, cases = ({name: Clock() for name in strategies} for _ in range(2))
    scores: dict[str, list[float]] = {name: [] for name in strategies}
    supports, stock = {}, Clock()
    for name, strategy in strategies.items():
        with once[name].running():
            supports[name] = load_supports(dataset, backends[name])
            if isinstance(strategy, Prepares):
                strategy.prepare(supports[name], class_values(dataset), backends[name])
    for number in range(QUERIES):
        for name, strategy in strategies.items():
            with cases[name].running():
                scene = load_scene(dataset, backends[name], query=number, supports=supports[name])
                label_zyx = _label(strategy, scene, backends[name])
            scores[name].append(dice(label_zyx > 0, scene.truth_zyx > 0))
        scene = load_scene(dataset, backends["insert"], query=number, supports=supports["insert"])
        _run_stock(scene, scene.supports[number % SUPPORTS], backends["insert"], stock)
    # Both ways of one insertion were run for each query.
    stock_s = stock.cpu_s / QUERIES * INSERTIONS * SUPPORTS
    return {
        "queries": QUERIES,
        "supports": SUPPORTS,
        "precision": backends["auto"].spec.precision,
        "stock_s": stock_s,
        "strategies": {
            name: {
                "dice": float(np.mean(scores[name])),
                "dice_each": scores[name],
                "once_s": once[name].cpu_s,
                "case_s": cases[name].cpu_s / QUERIES,
                "ratio": stock_s / (cases[name].cpu_s / QUERIES),
                "ratio_cohort": stock_s * COHORT / (once[name].cpu_s + COHORT * cases[name].cpu_s / QUERIES),
            }
            for name in strategies
        },
    }


def _label(strategy: Any, scene: Scene, backend: MetaSam2Backend) -> np.ndarray:
    labels = [support.label_zyx for support in scene.supports]
    fusion = FusionOptions(single_component_classes=single_component_classes(labels, scene.classes))
    if isinstance(strategy, BringsFusion):
        fusion = strategy.fusion(fusion)
    members = strategy.members(scene.query, scene.supports, scene.classes, backend, np.random.default_rng(0))
    return fuse(members, scene.classes, fusion).label_zyx


def _run_stock(scene: Scene, support: Support, backend: MetaSam2Backend, clock: Clock) -> None:
    """Run both ways of one insertion under autocast, the faster of the predictor's formats here."""
    predictor = StockPredictor(backend._model, stock_arguments(backend), reduced=True)
    middle = len(scene.query.frames) // 2
    for reverse in (False, True):
        insertion = Insertion(support=support, before=middle, reverse=reverse)
        with clock.running():
            for _ in predictor.probabilities(scene.query, insertion, scene.classes):
                pass


def auto_table(result: dict[str, Any]) -> str:
    """Return the table of seconds and Dice."""
    rows = []
    for dataset, found in result["sets"].items():
        for name, row in found["strategies"].items():
            rows.append(
                [
                    dataset,
                    f"`{name}`" + (", paper's preset" if name == "insert" else ""),
                    f"{row['dice']:.3f}",
                    f"{row['once_s']:.0f}",
                    f"{row['case_s']:.1f}",
                    f"**{row['ratio']:.1f}**",
                    f"{row['ratio_cohort']:.1f}",
                ]
            )
        rows.append([dataset, "stock `insert`", "as `insert`", "0", f"{found['stock_s']:.0f}", "1", "1"])
    head = ["set", "strategy", "Dice", "once a cohort, CPU s", "a case, CPU s", "stock / case"]
    return table([*head, f"the same for {COHORT} cases"], rows)
