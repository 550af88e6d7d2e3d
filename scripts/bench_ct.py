"""Raw CT against the same CT clipped to soft tissue: does the window that is found on labelled cases do as well?

Usage: bench_ct.py [--draws 1 3 ...] [--margins 0 0.5 ...] [--work DIR] [--table]. The table goes into
docs/benchmarks.md.

btcv_ct holds CT that was clipped to soft tissue and is 8 bit. It is spread over -160 to 240 HU, and what was clipped
gets values as a scanner gives them: air around the body and in it, lung, bone, a metal implant, padding outside of the
field of view, each at other values in each case. Queries of the draws 1 and 2 are of the first half of the cases, those
of 3 and 4 of the second half: what is chosen on the former is judged on the latter.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import DATA, PROJECT
from marked_table import replace_marked
from scipy import ndimage

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.folders import VARIABLES, DatasetFolders, new_dataset_folders
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.provenance import provenance
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.support import showing
from nnunet_sam2.support.showing import rounded_window
from nnunet_sam2.volumes import read_label, read_stored, write_image, write_label

RESULTS = PROJECT / "docs" / "benchmarks" / "ct.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
SOURCE = DATA / "btcv_ct"
LOW_HU, HIGH_HU = -160.0, 240.0
THINNED = 5
"""Every fifth slice is taken: it keeps the bench short."""

CHOSEN_ON = 2
"""Draws up to this one are those that the margin is chosen on."""

SUPPORTS, QUERIES, SIZE = 3, 1, 256
ORGANS = {
    "liver": {"liver": 6},
    "spleen": {"spleen": 1},
}
CLIPPED, RAW = "clipped", "raw"
WHOLE_IMAGE = "whole image"
"""The window that images of other kinds have: percentiles of each image as a whole."""


def main() -> None:
    """Label every draw in every way, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--margins", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--organs", nargs="+", choices=list(ORGANS), default=list(ORGANS))
    parser.add_argument("--strategy", default="transfer")
    parser.add_argument("--work", type=Path, default=PROJECT / "bench_work" / "ct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args()
    if not args.table:
        work = args.work.resolve()
        for root in VARIABLES:
            (work / root).mkdir(parents=True, exist_ok=True)
            os.environ[root] = str(work / root)
        backend = load_backend("embedded", device="cpu", threads=args.threads, image_size=SIZE)
        rows = []
        for draw in args.draws:
            for organs in args.organs:
                rows += _bench(draw, organs, args.margins, args.strategy, work, backend)
                result = {"machine": provenance(), "strategy": args.strategy, "size": SIZE, "rows": rows}
                write_json(RESULTS, result)
    replace_marked(PAGE, "ct", table(read_json(RESULTS)["rows"]))


def _bench(
    draw: int, organs: str, margins: Sequence[float], strategy: str, work: Path, backend: Sam2Backend
) -> list[dict[str, Any]]:
    """Label a draw's queries in every way."""
    ways: list[tuple[str, str, float | None]] = [(CLIPPED, WHOLE_IMAGE, None), (RAW, WHOLE_IMAGE, None)]
    ways += [(RAW, "CT", margin) for margin in margins]
    queries, supports = draw_cases(draw)
    rows = []
    for kind, window, margin in ways:
        cohort = Cohort.load(_dataset(draw, organs, kind, window, work).raw)
        showing.rounded_window = partial(_widened, margin or 0.0)
        out = work / "labels"
        shutil.rmtree(out, ignore_errors=True)
        records = label_cases(
            cohort=cohort,
            case_ids=queries,
            support_ids=supports,
            strategy=make_strategy(strategy, {"check_slices": "4"}),
            backend=backend,
            out=out,
            seed=draw,
        )
        dice = {}
        for query in queries:
            guess_zyx, _ = read_label(out / f"{query}{cohort.file_ending}")
            truth_zyx = _label(query, organs)
            known = dice_by_class(guess_zyx, truth_zyx, range(1, len(ORGANS[organs]) + 1))
            dice[query] = {name: known[k] for k, name in enumerate(ORGANS[organs], start=1)}
        row = {"draw": draw, "organs": organs, "image": kind, "window": window, "margin": margin, "dice": dice}
        rows.append({**row, "shown": records[0]["shown"]["windows"][0]})
        print(draw, organs, kind, window, margin, rows[-1]["shown"], round(_mean([rows[-1]]), 3), flush=True)
    return rows


def _widened(margin: float, low: float, high: float) -> tuple[float, float]:
    """Return a window that goes beyond its limits, on either side, by a part of its width."""
    more = margin * (high - low)
    return rounded_window(low - more, high + more)


def draw_cases(draw: int) -> tuple[list[str], list[str]]:
    """Return a draw's queries and supports."""
    names = sorted(path.name.split(".")[0] for path in (SOURCE / "images").iterdir())
    half = len(names) // 2
    pool = names[:half] if draw <= CHOSEN_ON else names[half:]
    rng = np.random.default_rng(draw)
    queries = [pool[i] for i in rng.permutation(len(pool))[:QUERIES]]
    others = [name for name in names if name not in queries]
    return queries, [others[i] for i in rng.permutation(len(others))[:SUPPORTS]]


def _dataset(draw: int, organs: str, kind: str, window: str, work: Path) -> DatasetFolders:
    number = 700 + 20 * draw + 4 * list(ORGANS).index(organs) + 2 * (kind == RAW) + (window == "CT")
    folders = new_dataset_folders(number, "Ct")
    if not folders.raw.is_dir():
        source, (queries, supports) = work / "source", draw_cases(draw)
        shutil.rmtree(source, ignore_errors=True)
        for name in (*queries, *supports):
            array_czyx, geometry = read_stored(SOURCE / "images" / f"{name}.nii.gz")
            thin_zyx = array_czyx[0, ::THINNED]
            x, y, z = geometry.spacing_xyz_mm
            organ_zyx = read_label(SOURCE / "labels" / f"{name}.nii.gz")[0][::THINNED] > 0
            spread_zyx = (
                as_scanned(thin_zyx, organ_zyx, name) if kind == RAW else thin_zyx / 255.0 * (HIGH_HU - LOW_HU) + LOW_HU
            )
            grid = type(geometry)(shape_zyx=thin_zyx.shape, spacing_xyz_mm=(x, y, z * THINNED))
            write_image(source / "images" / f"{name}.nii.gz", np.rint(spread_zyx)[None].astype(np.int16), grid)
            if name in supports:
                write_label(source / "labels" / f"{name}.nii.gz", _label(name, organs), grid)
        labels = {"background": 0} | {name: k for k, name in enumerate(ORGANS[organs], start=1)}
        convert(source, folders, ConvertOptions(channels=("CT" if window == "CT" else "image",), labels=dict(labels)))
    return folders


def _label(name: str, organs: str) -> np.ndarray:
    """Read the thinned label map with the organs as 1, 2, and so on."""
    label_zyx = read_label(SOURCE / "labels" / f"{name}.nii.gz")[0][::THINNED]
    wanted = np.zeros_like(label_zyx)
    for k, value in enumerate(ORGANS[organs].values(), start=1):
        wanted[label_zyx == value] = k
    return wanted


def as_scanned(clipped_zyx: np.ndarray, organ_zyx: np.ndarray, name: str) -> np.ndarray:
    """Return an 8 bit volume in HU as a scanner might have given it: what was clipped outside of organs is filled in.

    Organs that were clipped keep the limit: by how much they go beyond it nothing tells.
    """
    rng = np.random.default_rng(int(name.split("_")[1]))
    hu_zyx = clipped_zyx / 255.0 * (HIGH_HU - LOW_HU) + LOW_HU
    below_zyx, above_zyx = (clipped_zyx == 0) & ~organ_zyx, (clipped_zyx == 255) & ~organ_zyx
    noise_zyx = rng.normal(0, 15, clipped_zyx.shape)
    # What lies open to the side of the picture is air; inside it is lung where it is wide, else gut gas or dark fat.
    padded = np.pad(below_zyx, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    parts_zyx, _ = ndimage.label(padded, structure=ndimage.generate_binary_structure(3, 1) & _IN_PLANE)
    outside_zyx = np.isin(parts_zyx, np.unique(parts_zyx[:, 0]))[:, 1:-1, 1:-1]
    depth_zyx = np.stack([ndimage.distance_transform_edt(plane) for plane in below_zyx & ~outside_zyx])
    hu_zyx = np.where(below_zyx, np.where(depth_zyx > 6, rng.uniform(-880, -780), LOW_HU - 40 * depth_zyx), hu_zyx)
    hu_zyx = np.where(outside_zyx, -1000.0, hu_zyx)
    deep_zyx = np.stack([ndimage.distance_transform_edt(plane) for plane in above_zyx])
    hu_zyx = np.where(above_zyx, HIGH_HU + rng.uniform(80, 160) * deep_zyx, hu_zyx) + noise_zyx * below_zyx
    slices, height, width = hu_zyx.shape
    if rng.random() < 0.5:  # padding outside of the round field of view, and a metal implant
        y, x = np.mgrid[:height, :width]
        hu_zyx[:, np.hypot(y - height / 2, x - width / 2) > 0.5 * width] = rng.choice([-2048.0, -3024.0])
        z = int(rng.integers(slices // 8, slices // 4))
        hu_zyx[z : z + 6, height // 2 : height // 2 + 8, width // 2 : width // 2 + 8] = 3071.0
    return np.clip(hu_zyx, -3024, 3071)


_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = True


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean Dice by organ and window, draws that the margin was chosen on apart from those held back."""
    sides = [sorted({r["draw"] for r in rows if (r["draw"] <= CHOSEN_ON) == first}) for first in (True, False)]
    heads = [f"{kind}, draw {', '.join(map(str, draws))}" for draws in sides for kind in (CLIPPED, RAW)]
    lines = [f"| organ | window | {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for organs in ORGANS:
        for window, margin in dict.fromkeys((row["window"], row["margin"]) for row in rows):
            of = [r for r in rows if (r["organs"], r["window"], r["margin"]) == (organs, window, margin)]
            cells = []
            for draws in sides:
                for kind in (CLIPPED, RAW):
                    found = [r for r in of if r["draw"] in draws and r["image"] == kind]
                    cells.append(f"{_mean(found):.3f}" if found else "")
            name = "percentiles of each image" if margin is None else f"labelled class, margin {margin:g}"
            lines.append(f"| {organs} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([d for row in rows for case in row["dice"].values() for d in case.values() if d is not None]))


if __name__ == "__main__":
    main()
