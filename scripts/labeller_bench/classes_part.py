"""`auto` on abdominal CT: what many classes and slices cost, each measurement in a process of its own.

``python classes_part.py CLASSES SLICES`` prints one measurement as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

WANTED = ((13, 150), (13, 75), (4, 150), (1, 150))
"""Classes and slices. The classes of one are the liver's, of four those of the largest organs."""
LARGEST = (6, 7, 1, 8)
SET_NAME = "btcv_ct"
SHAPE_YX = (256, 256)


def measure_classes(threads: int) -> list[dict[str, Any]]:
    """Return seconds and peak memory by number of classes and slices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": str(threads),
    }
    rows = []
    for classes, slices in WANTED:
        done = subprocess.run(
            [sys.executable, str(Path(__file__)), str(classes), str(slices)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{classes} classes with {slices} slices failed:\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def measure_one(classes: int, slices: int) -> dict[str, Any]:
    """Label two scans by three, resampled to ``slices`` of 256 x 256, from nothing encoded on."""
    import numpy as np
    import torch
    from bench_sets import SETS, draw_cases, load_case

    from labeller_bench.setting import SEED, SUPPORTS, Clock, make_backend
    from nnunet_sam2.labelling.components import single_component_classes
    from nnunet_sam2.labelling.fusion import FusionOptions, fuse
    from nnunet_sam2.labelling.strategies.auto.strategy import Auto

    torch.set_num_threads(1)
    backend = make_backend("embedded", threads=1)
    values = tuple(range(1, 14)) if classes > len(LARGEST) else tuple(sorted(LARGEST[:classes]))
    given, asked = draw_cases(SETS[SET_NAME], SUPPORTS, 2, SEED)
    auto, once, case = Auto(), Clock(), Clock()
    with once.running():
        supports = [_resampled(load_case(SETS[SET_NAME], name, None), slices, values, backend) for name in given]
        auto.prepare(supports, values, backend)
        single = single_component_classes([support.label_zyx for support in supports], values)
    for name in asked:
        with case.running():
            query = _resampled(load_case(SETS[SET_NAME], name, None), slices, values, backend).as_query()
            members = auto.members(query, supports, values, backend, np.random.default_rng(0))
            fuse(members, values, FusionOptions(single_component_classes=single))
    return {
        "classes": classes,
        "slices": slices,
        "once_s": once.cpu_s,
        "first_s": case.laps[0],
        "next_s": case.laps[1],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "measured": time.strftime("%Y-%m-%d"),
    }


def _resampled(case: Any, slices: int, values: tuple[int, ...], backend: Any) -> Any:
    import numpy as np

    from nnunet_sam2.frames import Frames
    from nnunet_sam2.geometry import Geometry
    from nnunet_sam2.volumes import Volume

    shape = (slices, *SHAPE_YX)
    nearest = np.ix_(*(((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(
        shape, case.geometry.shape_zyx, strict=True)))  # fmt: skip
    grey_zyx = case.frames.slices_back(np.stack([case.frames.plane(n) for n in range(len(case.frames))])[None])[0]
    spacing = tuple(
        float(mm * old / new)
        for mm, old, new in zip(case.geometry.spacing_zyx_mm, case.geometry.shape_zyx, shape, strict=True)
    )
    geometry = Geometry(shape_zyx=shape, spacing_xyz_mm=(spacing[2], spacing[1], spacing[0]))
    volume = Volume(array_czyx=np.ascontiguousarray(grey_zyx[nearest])[None], geometry=geometry)
    frames = Frames.from_volume(volume, size=backend.spec.image_size, slice_axis=0)
    label_zyx = case.label_zyx[nearest]
    label_zyx = np.where(np.isin(label_zyx, values), label_zyx, 0).astype(np.uint8)
    return replace(case, frames=frames, embeddings=backend.embed(frames), label_zyx=label_zyx, geometry=geometry)


def classes_table(result: dict[str, Any]) -> str:
    """Return the table of seconds and memory."""
    from labeller_bench.setting import table

    rows = [
        [
            str(row["classes"]),
            str(row["slices"]),
            f"{row['once_s']:.0f}",
            f"{row['first_s']:.0f}",
            f"{row['next_s']:.0f}",
            f"{row['peak_mb'] / 1024:.1f}",
        ]
        for row in result["rows"]
    ]
    head = ["classes", "slices of 256 x 256", "once a cohort, CPU s", "first case, CPU s", "each further case, CPU s"]
    return table([*head, "peak GB"], rows)


if __name__ == "__main__":
    print(json.dumps(measure_one(int(sys.argv[1]), int(sys.argv[2]))))
