"""Peak memory of labelling long volumes, each in a process of its own.

``python memory_part.py STRATEGY SLICES`` prints one measurement as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SLICES = (250, 500, 1000)
SUPPORT_SLICES = 40
SIDE = 256
STRATEGIES = ("walk", "insert", "transfer")
"""``walk``: one object through the volume with answers thrown away; the others label it and fuse."""


def measure_memory(threads: int) -> dict[str, Any]:
    """Return peak memory and seconds by strategy and number of slices."""
    script = str(Path(__file__))
    folder = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": str(threads)}
    rows: dict[str, Any] = {}
    for strategy in STRATEGIES:
        rows[strategy] = {}
        for slices in SLICES:
            done = subprocess.run(
                [sys.executable, script, strategy, str(slices)],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{strategy} with {slices} slices failed:\n{done.stderr[-2000:]}")
            rows[strategy][str(slices)] = json.loads(done.stdout.splitlines()[-1])
    return rows


def measure_one(strategy: str, slices: int) -> dict[str, Any]:
    """Label one made-up volume in this process."""
    import numpy as np
    import torch

    from labeller_bench.setting import as_support, made_up_case, make_backend
    from nnunet_sam2.labelling.fusion import fuse
    from nnunet_sam2.labelling.registry import make_strategy
    from nnunet_sam2.labelling.strategy import Prepares
    from nnunet_sam2.sam2.protocol import VideoWalk

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        backend = make_backend("embedded", threads=1, cache_dir=Path(folder))
        supports = [as_support(*made_up_case(name, SUPPORT_SLICES, SIDE, backend)) for name in ("s", "tt")]
        query, label_zyx = made_up_case("query", slices, SIDE, backend)
        before, cpu = _peak_mb(), time.process_time()
        if strategy == "walk":
            mask = supports[0].frames.masks_to_model(supports[0].label_zyx == 1)[SUPPORT_SLICES // 2][None]
            video = [
                (supports[0].embeddings, SUPPORT_SLICES // 2),
                *((query.embeddings, n) for n in range(slices)),
            ]
            held = []
            for _ in backend.walk_many([VideoWalk(video=video, masks_kss={0: mask})]):
                held.append(_held_mb())
            # From the tenth answer on: by then what is kept for the whole walk is there.
            state, found = max(held) - held[10], None
        else:
            made, state = make_strategy(strategy, {}), None
            if isinstance(made, Prepares):
                made.prepare(supports, (1,), backend)
            members = made.members(query, supports, (1,), backend, np.random.default_rng(0))
            found = float((fuse(members, (1,)).label_zyx[label_zyx == 1] == 1).mean())
    return {
        "peak_mb": _peak_mb(),
        "before_mb": before,
        "state_mb": state,
        "cpu_s": time.process_time() - cpu,
        "found": found,
    }


def memory_table(result: dict[str, Any]) -> str:
    """Return the table of peaks and of growth."""
    from labeller_bench.setting import table

    rows = []
    for strategy, found in result["strategies"].items():
        first, last = found[str(SLICES[0])], found[str(SLICES[-1])]
        peaks = [f"{found[str(n)]['peak_mb'] / 1024:.2f}" for n in SLICES]
        more = (last["peak_mb"] - last["before_mb"]) - (first["peak_mb"] - first["before_mb"])
        if last["state_mb"] is not None:
            more = last["state_mb"] - first["state_mb"]
        rows.append(
            [
                f"`{strategy}`",
                *peaks,
                f"{more / (SLICES[-1] - SLICES[0]):.3f}",
                f"{last['cpu_s'] / SLICES[-1] * 1e3:.0f}",
            ]
        )
    head = ["", *(f"{n} slices, peak GB" for n in SLICES), "growth beyond volume and embeddings, MB a slice"]
    return table([*head, "CPU ms a slice"], rows)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _held_mb() -> float:
    """Return what the process holds now, on Linux; zero elsewhere."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20 if statm.is_file() else 0.0


if __name__ == "__main__":
    print(json.dumps(measure_one(sys.argv[1], int(sys.argv[2]))))
