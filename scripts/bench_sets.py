"""The sets that labellers are judged on: what is scored, which cases are drawn, and a case as the labellers see it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from baselines import SIZE as BASELINE_SIZE
from baselines import NoEmbeddings
from bench_data import DATA

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import read_label, read_volume


@dataclass(frozen=True, kw_only=True)
class Sam2BenchSet:
    """Say what of a set is labelled and scored."""

    name: str
    scored: Mapping[str, tuple[int, ...]]
    """Name in the table -> label values taken together."""
    headline: tuple[str, ...]
    """What the mean is taken over."""
    queries: int
    merge: bool = False
    """Take all labels above 0 for one class."""


SETS = {
    s.name: s
    for s in (
        Sam2BenchSet(
            name="hippocampus",
            scored={"whole": (1, 2), "anterior": (1,), "posterior": (2,)},
            headline=("whole",),
            queries=12,
        ),
        Sam2BenchSet(
            name="chaos_t2_mr",
            scored={"liver": (1,), "right kidney": (2,), "left kidney": (3,), "spleen": (4,)},
            headline=("liver", "right kidney", "left kidney", "spleen"),
            queries=4,
        ),
        Sam2BenchSet(
            name="acdc",
            scored={"right ventricle": (1,), "myocardium": (2,), "left ventricle": (3,)},
            headline=("right ventricle", "myocardium", "left ventricle"),
            queries=8,
        ),
        Sam2BenchSet(name="ddsm_tissue", scored={"breast": (1,)}, headline=("breast",), queries=12, merge=True),
    )
}


def drawn_cases(bench: Sam2BenchSet, seed: int) -> list[str]:
    """Draw one file of every patient, in the order that queries and then supports are taken in."""
    source = DATA / bench.name / "images"
    if not source.is_dir():
        raise SystemExit(f"{source} is missing; set NNUNET_SAM2_DATA to the folder that holds {bench.name}")
    patients: dict[str, list[str]] = {}
    for path in sorted(source.iterdir()):
        patients.setdefault(re.split(r"_frame", path.name.split(".")[0])[0], []).append(path.name)
    rng = np.random.default_rng(seed)
    return [patients[p][int(rng.integers(len(patients[p])))] for p in rng.permutation(sorted(patients))]


def draw_cases(bench: Sam2BenchSet, supports: int, queries: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw support and query files of different patients; the queries are the same for every number of supports."""
    drawn = drawn_cases(bench, seed)
    if supports + queries > len(drawn):
        raise SystemExit(f"{bench.name} has {len(drawn)} patients; {supports} supports and {queries} queries are more")
    return drawn[queries : queries + supports], drawn[:queries]


def load_case(bench: Sam2BenchSet, name: str, backend: Sam2Backend | None) -> Support:
    """Read a case with its label, and encode it where there is a back end."""
    folder = DATA / bench.name
    volume = read_volume([folder / "images" / name])
    label_zyx, _ = read_label(folder / "labels" / name)
    # The baselines scale frames down themselves; what they start from changes nothing beyond rounding.
    frames = Frames.from_volume(volume, size=backend.spec.image_size if backend else 2 * BASELINE_SIZE)
    return Support(
        case_id=name.split(".")[0],
        frames=frames,
        embeddings=backend.embed(frames) if backend else NoEmbeddings(),
        label_zyx=(label_zyx > 0).astype(np.uint8) if bench.merge else label_zyx,
        geometry=volume.geometry,
    )


def summary(bench: Sam2BenchSet, scores: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Average cases' Dice by part, without the cases that lack it, and the headline's parts."""
    classes = {}
    for part in bench.scored:
        known = [case[part] for case in scores if case[part] is not None]
        classes[part] = round(float(np.mean(known)), 4) if known else None
    mean = float(np.mean([classes[part] for part in bench.headline if classes[part] is not None]))
    return {"mean": round(mean, 4), "classes": classes, "cases": len(scores)}
