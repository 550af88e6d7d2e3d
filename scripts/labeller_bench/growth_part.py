"""How the cost of `insert` grows with slices, supports, classes and members; and the machine's ceiling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labeller_bench.setting import Clock, as_support, made_up_case, make_backend, table
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import MetaSam2Backend

BASE = {"slices": 24, "supports": 2, "classes": 1, "insertions": 2}
STEPS: dict[str, tuple[int, ...]] = {
    "slices": (12, 24, 48),
    "supports": (1, 2, 4),
    "classes": (1, 2, 4),
    "insertions": (1, 2, 4, 8),
}
SUPPORT_SLICES = 16
PRODUCTS = ((1024, 1024, 1024), (256, 256, 1024), (4096, 256, 1024))


def measure_growth(threads: int) -> dict[str, Any]:
    """Vary one number at a time, embeddings at hand; processor seconds of the members and their fusion."""
    torch.set_num_threads(threads)
    backend = make_backend("embedded", threads=threads)
    _seconds(backend, {**BASE, "slices": 8})
    return {
        name: [{"value": value, "cpu_s": _seconds(backend, {**BASE, name: value})} for value in values]
        for name, values in STEPS.items()
    }


def measure_ceiling(threads: int) -> dict[str, Any]:
    """Measure what this machine multiplies and copies, and what memory attention makes of it."""
    torch.set_num_threads(threads)
    ceiling: dict[str, Any] = {"copy_gb_s": _copy_rate()}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        ceiling[f"{name}_gflops"] = max(_product_rate(*shape, dtype) for shape in PRODUCTS)
        for model in ("embedded", "hiera_tiny"):
            ceiling[f"{name}_{model}"] = _reading_rate(model, name, threads)
    return ceiling


def growth_table(result: dict[str, Any]) -> str:
    """Return the table of growth."""
    rows = []
    for name, found in result["growth"].items():
        low, high = found[0], found[-1]
        power = np.log(high["cpu_s"] / low["cpu_s"]) / np.log(high["value"] / low["value"])
        rows.append([name, ", ".join(f"{row['value']}: {row['cpu_s']:.1f} s" for row in found), f"{power:.2f}"])
    return table(["", "CPU seconds", "grows as its power of"], rows)


def ceiling_table(result: dict[str, Any]) -> str:
    """Return the table of the ceiling and what is reached of it."""
    found = result["ceiling"]
    rows = []
    for name in ("float32", "bfloat16"):
        top = found[f"{name}_gflops"]
        reached = [found[f"{name}_{model}"] for model in ("embedded", "hiera_tiny")]
        rows.append([name, f"{top:.0f}", *(f"{rate:.0f} ({rate / top:.0%})" for rate in reached)])
    head = ["factors in", "best product, GFLOP/s", "memory attention, embedded", "memory attention, Hiera-tiny"]
    return table(head, rows) + f"\n\nCopying in memory: {found['copy_gb_s']:.0f} GB/s."


def _seconds(backend: MetaSam2Backend, size: dict[str, int]) -> float:
    supports = []
    for number in range(size["supports"]):
        case, label_zyx = made_up_case("s" * (number + 1), SUPPORT_SLICES, 64, backend)
        # Classes that lie on the same slices: bands of the ball.
        rows = np.minimum(np.arange(64) * size["classes"] // 64, size["classes"] - 1)[None, :, None]
        supports.append(as_support(case, (label_zyx * (rows + 1)).astype(np.uint8)))
    query, _ = made_up_case("query", size["slices"], 64, backend)
    classes = tuple(range(1, size["classes"] + 1))
    strategy = make_strategy("insert", {"insertions": size["insertions"], "supports": "none"})
    clock = Clock()
    with clock.running():
        fuse(strategy.members(query, supports, classes, backend, np.random.default_rng(0)), classes)
    return clock.cpu_s


def _reading_rate(model_name: str, precision: str, threads: int) -> float:
    """Return GFLOP/s of the multiplications that one round of memory attention makes."""
    from nnunet_sam2.sam2.memory_reading import MemoryReader, Readers

    backend = make_backend(model_name, threads=threads)
    model = backend._model
    objects, frames = 5, 24
    locations, features, width = (model.image_size // 16) ** 2, model.hidden_dim, model.mem_dim
    layers = len(model.memory_attention.layers)
    hidden = model.memory_attention.layers[0].linear1.out_features
    with torch.inference_mode():
        reader = MemoryReader(model, torch.device("cpu"), getattr(torch, precision))
        tokens = torch.randn(frames * locations, width)
        shared = reader.share(tokens, torch.zeros_like(tokens))
        top_upc = torch.randn(1, locations, features)
        readers = [Readers(rows=list(range(objects)), shared=shared, own=None)]
        operations = 2 * locations * frames * locations * (features + width) * (1 + objects * (layers - 1))
        # What depends on the slice alone is computed once for all objects in the first layer.
        own = 5 * features**2 + 2 * locations * features
        operations += 2 * locations * own * (1 + objects * (layers - 1))
        operations += 2 * locations * (width * features + 2 * features * hidden) * objects * layers
        return _rate(operations, lambda: reader.read(top_upc, [0] * objects, readers))


def _product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return _rate(2 * rows * inner * columns, lambda: a @ b.T)


def _rate(operations: int, run: Callable[[], object]) -> float:
    run()
    best = min(_seconds_of(run) for _ in range(15))
    return operations / best / 1e9


def _copy_rate() -> float:
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(_seconds_of(lambda: target.copy_(source)) for _ in range(15)) / 1e9


def _seconds_of(run: Callable[[], object]) -> float:
    """Return processor seconds a thread: other processes of a busy machine do not count."""
    started = time.process_time()
    run()
    return (time.process_time() - started) / torch.get_num_threads()
