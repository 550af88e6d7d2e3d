"""Time the labeller on this machine and write docs/benchmarks/labeller.json and its tables in docs/performance.md.

``python scripts/bench_labeller.py`` measures the parts that have no result yet; ``--part NAME`` measures one anew.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
from bench_data import PROJECT
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
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    results: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {}
    for name, (measure, _) in PARTS.items():
        if name in args.part or (not args.part and name not in results):
            # Waiting threads make half of a small model's time: each policy has a row of its own.
            policy = os.environ.get("OMP_WAIT_POLICY") or "(unset)"
            row = {"cores": os.cpu_count(), "threads": args.threads, **measure(args.threads)}
            results[name] = {**results.get(name, {}), policy: row}
            write_json(RESULTS, results)
    for name, (_, table) in PARTS.items():
        if name in results:
            replace_marked(PAGE, name, table(results[name]))


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


PARTS = {"clip": (measure_clip, clip_table)}

if __name__ == "__main__":
    main()
