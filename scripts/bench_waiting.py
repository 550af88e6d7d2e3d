"""Measure what waiting threads cost: the encoder with 2 threads, on idle cores and beside other work.

``python scripts/bench_waiting.py`` writes docs/benchmarks/waiting.json and its table in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

from bench_data import PROJECT
from marked_table import replace_marked

from nnunet_sam2.storage import write_json

ENCODE = """
import json, time
import numpy as np
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import load_backend
backend = load_backend("untrained", device="cpu", image_size=512, threads=2)
rng = np.random.default_rng(0)
rows = []
for _ in range(4):
    frames = Frames.from_images(rng.random((6, 3, 512, 512), dtype=np.float32))
    wall, cpu = time.monotonic(), time.process_time()
    backend.embed(frames).top(0)
    rows.append([(time.monotonic() - wall) / 6, (time.process_time() - cpu) / 6])
print(json.dumps(rows[1:]))
"""
BUSY = "while True: pass"


def main() -> None:
    """Time the four combinations and write JSON and table."""
    rows = []
    for neighbours in (0, 2):
        for policy in ("ACTIVE", "PASSIVE", ""):
            wall, cpu = _time(neighbours, policy)
            rows.append({"neighbours": neighbours, "policy": policy or "(unset)", "wall_s": wall, "cpu_s": cpu})
    write_json(PROJECT / "docs" / "benchmarks" / "waiting.json", {"cores": os.cpu_count(), "rows": rows})
    table = ["| other busy processes | OMP_WAIT_POLICY | wall s a slice | CPU s a slice |", "|---|---|---|---|"]
    table += [f"| {r['neighbours']} | {r['policy']} | {r['wall_s']:.3f} | {r['cpu_s']:.3f} |" for r in rows]
    replace_marked(PROJECT / "docs" / "performance.md", "waiting", "\n".join(table))


def _time(neighbours: int, policy: str) -> tuple[float, float]:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment["OMP_NUM_THREADS"] = "2"
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours)]
    try:
        argv = [sys.executable, "-c", ENCODE]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    return statistics.median(r[0] for r in rows), statistics.median(r[1] for r in rows)


if __name__ == "__main__":
    main()
