"""Matching by LPIPS: cached features against a call of the lpips package for every pair."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import WEIGHTS
from bench_sets import SETS, draw_cases, load_case

from labeller_bench.setting import SEED, Clock, table
from nnunet_sam2.labelling.strategies.match.candidates import Candidate, Candidates
from nnunet_sam2.labelling.strategies.match.pools import Pool, Ranking
from nnunet_sam2.support.augment import AugmentOptions
from nnunet_sam2.support.distances import resized
from nnunet_sam2.support.lpips_metric import LPIPS_SIZE, LpipsMetric

ALEXNET = WEIGHTS / "alexnet_features.safetensors"
SUPPORTS = 3
COMPARED = 4
"""Query slices that the package compares with the whole pool; the others are taken to cost the same."""


def measure_lpips(threads: int, backend: Any) -> dict[str, Any]:
    """Rank every slice of three supports for every slice of a query, as `match` does, and by pairwise calls."""
    if not ALEXNET.is_file():
        raise SystemExit(f"{ALEXNET} is missing; set NNUNET_SAM2_WEIGHTS to the folder that holds it")
    torch.set_num_threads(threads)
    bench = SETS["hippocampus"]
    support_names, query_names = draw_cases(bench, SUPPORTS, 1, SEED)
    supports = [load_case(bench, name, None) for name in support_names]
    query = load_case(bench, query_names[0], None).as_query()
    ours, theirs = Clock(), Clock()
    pair = _package(ALEXNET)
    with ours.running():
        metric = LpipsMetric(ALEXNET)
        ranking = Ranking(Candidates(supports, (1, 2), AugmentOptions(), 0, backend), metric, backend)
        origin = tuple((s, m) for s, support in enumerate(supports) for m in range(len(support.frames)))
        pool = Pool(classes=(0, 1), origin=origin, variants=0, shortlist=None)
        described = metric.describe(query.frames, query.embeddings, range(len(query.frames)))
        best = [ranked[0] for ranked in ranking.rank(pool, described, 1)]
    chosen = np.linspace(0, len(query.frames) - 1, COMPARED + 2).round().astype(int)[1:-1].tolist()
    same, off = 0, 0.0
    for n in chosen:
        with theirs.running():
            image = _image(query.frames.image(n))
            distances = [float(pair(image, _image(supports[s].frames.image(m)))) for s, m in origin]
        first = int(np.argmin(distances))
        same += best[n].candidate == Candidate(support=origin[first][0], index=origin[first][1])
        off = max(off, abs(best[n].distance - distances[first]))
    pairs = len(origin) * len(query.frames)
    return {
        "query_slices": len(query.frames),
        "pool": len(origin),
        "pairs": pairs,
        "pairs_measured": len(origin) * len(chosen),
        "package_s": theirs.cpu_s * pairs / (len(origin) * len(chosen)),
        "ours_s": ours.cpu_s,
        "ratio": theirs.cpu_s * pairs / (len(origin) * len(chosen)) / ours.cpu_s,
        "same_choice": same,
        "compared": len(chosen),
        "largest_difference": off,
    }


def _package(alexnet_file: Path) -> Any:
    """Return lpips' own model with the weights at hand: its constructor would download them."""
    from lpips import LPIPS
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False)
    state = {key.removeprefix("features."): value.float() for key, value in load_file(alexnet_file).items()}
    parts = [part for n in range(1, 6) for part in getattr(model.net, f"slice{n}").named_children()]
    for index, module in parts:
        if f"{index}.weight" in state:
            module.load_state_dict({kind: state[f"{index}.{kind}"] for kind in ("weight", "bias")})
    model = model.eval().requires_grad_(False)
    return torch.inference_mode()(model)


def _image(image_3ss: np.ndarray) -> torch.Tensor:
    return 2.0 * resized(image_3ss, LPIPS_SIZE)[None] - 1.0


def lpips_table(result: dict[str, Any]) -> str:
    """Return the table."""
    head = ["query slices", "pool", "lpips package, CPU s", "ours, CPU s", "ratio", "same choice", "largest difference"]
    row = [
        str(result["query_slices"]),
        str(result["pool"]),
        f"{result['package_s']:.0f} ({result['pairs_measured']} of {result['pairs']} pairs measured)",
        f"{result['ours_s']:.1f}",
        f"**{result['ratio']:.1f}**",
        f"{result['same_choice']} of {result['compared']}",
        f"{result['largest_difference']:.0e}",
    ]
    return table(head, [row])
