"""Time the labeller on this machine and write docs/benchmarks/labeller.json and its tables in docs/performance.md.

``python scripts/bench_labeller.py`` measures the parts that have no result yet; ``--part NAME`` measures one anew.
Seconds are the processor's, of one process, the labeller and its twin turn by turn: other load changes ratios little.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_data import PROJECT
from labeller_bench.auto_part import auto_table, measure_auto
from labeller_bench.classes_part import classes_table, measure_classes
from labeller_bench.growth_part import ceiling_table, growth_table, measure_ceiling, measure_growth
from labeller_bench.insert_part import insert_table, measure_insert
from labeller_bench.lpips_part import lpips_table, measure_lpips
from labeller_bench.memory_part import measure_memory, memory_table
from labeller_bench.setting import MODELS
from marked_table import replace_marked

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.storage import read_json, write_json

RESULTS = PROJECT / "docs" / "benchmarks" / "labeller.json"
PAGE = PROJECT / "docs" / "performance.md"
CLIP_FRAMES, CLIP_REPEATS = 64, 3


def main() -> None:
    """Measure what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS), action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=MODELS, action="append", default=[], help="for the part insert")
    parser.add_argument("--tables", action="store_true", help="write the tables alone")
    args = parser.parse_args()
    results: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {}
    for name, (measure, _) in PARTS.items():
        if not args.tables and (name in args.part or (not args.part and name not in results)):
            results[name] = measure(args, results.get(name, {}))
            write_json(RESULTS, results)
    for name, (_, table) in PARTS.items():
        if name in results:
            replace_marked(PAGE, name, table(results[name]))


def _on_machine(args: argparse.Namespace) -> dict[str, Any]:
    return {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": args.threads}


def _clip(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    # Waiting threads make half of a small model's time: each policy has a row of its own.
    policy = os.environ.get("OMP_WAIT_POLICY") or "(unset)"
    return {**before, policy: {"cores": os.cpu_count(), "threads": args.threads, **measure_clip(args.threads)}}


def _insert(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    found = dict(before.get("models", {}))
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        measured = measure_insert(args.threads, tuple(args.model or MODELS), device)
        found |= {name if device == "cpu" else f"{name} on {device}": row for name, row in measured.items()}
    return {**_on_machine(args), "models": found}


def _auto(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    return {**_on_machine(args), "sets": measure_auto(args.threads, "cpu")}


def _lpips(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    return {**_on_machine(args), **measure_lpips(args.threads, None)}


def _memory(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    return {**_on_machine(args), "strategies": measure_memory(args.threads)}


def _classes(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    return {**_on_machine(args), "rows": measure_classes(args.threads)}


def _growth(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    return {**_on_machine(args), "growth": measure_growth(args.threads)}


def _ceiling(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    return {**_on_machine(args), "ceiling": measure_ceiling(args.threads)}


def measure_clip(threads: int) -> dict[str, Any]:
    """Time 64 frames of one object with the model in the box: encoding, then a walk from one prompted frame."""
    backend = load_backend("embedded", device="cpu", threads=threads)
    size = backend.spec.image_size
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(CLIP_REPEATS):
        # New images every time: nothing may come from a cache.
        frames = Frames.from_images(rng.random((CLIP_FRAMES, 3, size, size), dtype=np.float32))
        mask = np.zeros((1, size, size), bool)
        mask[:, size // 3 : 2 * size // 3, size // 3 : 2 * size // 3] = True
        started = time.monotonic()
        embeddings = backend.embed(frames)
        encoded = time.monotonic()
        backend.propagate([(embeddings, n) for n in range(CLIP_FRAMES)], {0: mask})
        rows.append((encoded - started, time.monotonic() - encoded))
    encode, walk = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "frames": CLIP_FRAMES,
        "image_size": size,
        "precision": backend.spec.precision,
        "checkpoint": backend.spec.checkpoint_hash,
        "encode_s": encode,
        "walk_s": walk,
    }


def clip_table(result: dict[str, Any]) -> str:
    """Return the clip's table."""
    lines = ["| OMP_WAIT_POLICY | frames | size | threads | precision | encoding s | walk s | together s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for policy, row in sorted(result.items()):
        total = row["encode_s"] + row["walk_s"]
        lines.append(
            f"| {policy} | {row['frames']} | {row['image_size']} px | {row['threads']} | {row['precision']} | "
            f"{row['encode_s']:.2f} | {row['walk_s']:.2f} | {total:.2f} |"
        )
    return "\n".join(lines)


Measure = Callable[[argparse.Namespace, dict[str, Any]], dict[str, Any]]
PARTS: dict[str, tuple[Measure, Callable[[dict[str, Any]], str]]] = {
    "clip": (_clip, clip_table),
    "ceiling": (_ceiling, ceiling_table),
    "insert": (_insert, insert_table),
    "auto": (_auto, auto_table),
    "lpips": (_lpips, lpips_table),
    "memory": (_memory, memory_table),
    "growth": (_growth, growth_table),
    "classes": (_classes, classes_table),
}

if __name__ == "__main__":
    main()
