"""The sets that labellers are judged on: what is scored, which cases are drawn, and a case as the labellers see it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    most_supports: int = 8
    """Labelled patients that there are beside the queries."""
    order: str | None = None
    """File of the set's folder with its patients in the order of labelling; all scans of one are taken."""
    beside: str | None = None
    """Set that holds the rest of the volumes."""


_BTCV_ORGANS = ("spleen", "R kidney", "L kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta", "IVC")
_BTCV_ORGANS += ("veins", "pancreas", "R adrenal", "L adrenal")
_BTCV = {name: (value,) for value, name in enumerate(_BTCV_ORGANS, start=1)}

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
        Sam2BenchSet(
            name="acdc_ssl4mis",
            scored={"right ventricle": (1,), "myocardium": (2,), "left ventricle": (3,)},
            headline=("right ventricle", "myocardium", "left ventricle"),
            queries=12,
            order="train_order.txt",
            beside="acdc",
        ),
        Sam2BenchSet(name="btcv_ct", scored=_BTCV, headline=tuple(_BTCV), queries=4, most_supports=4),
        Sam2BenchSet(name="ddsm_tissue", scored={"breast": (1,)}, headline=("breast",), queries=12, merge=True),
    )
}


def file_of(bench: Sam2BenchSet, kind: str, name: str) -> Path:
    """Return where an image or a label of a set lies."""
    path = DATA / bench.name / kind / name
    return path if bench.beside is None or path.exists() else DATA / bench.beside / kind / name


def patient_of(name: str) -> str:
    """Return whose scan a file is."""
    return re.split(r"_frame", name.split(".")[0])[0]


def drawn_cases(bench: Sam2BenchSet, seed: int) -> list[str]:
    """Draw one file of every patient, in the order that queries and then supports are taken in."""
    patients = _files_by_patient(bench)
    rng = np.random.default_rng(seed)
    return [patients[p][int(rng.integers(len(patients[p])))] for p in rng.permutation(sorted(patients))]


def draw_cases(bench: Sam2BenchSet, supports: int, queries: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw support and query files of different patients; the queries are the same for every number of supports.

    A set with an order of its patients gives all scans of ``supports`` patients, the first ones of the order for seed
    0, and as queries the scans of patients behind them.
    """
    if bench.order is not None:
        return _draw_in_order(bench, supports, queries, seed)
    drawn = drawn_cases(bench, seed)
    if supports + queries > len(drawn):
        raise SystemExit(f"{bench.name} has {len(drawn)} patients; {supports} supports and {queries} queries are more")
    return drawn[queries : queries + supports], drawn[:queries]


def _draw_in_order(bench: Sam2BenchSet, supports: int, queries: int, seed: int) -> tuple[list[str], list[str]]:
    order = (DATA / bench.name / str(bench.order)).read_text(encoding="utf-8").split()
    if seed:
        order = [str(patient) for patient in np.random.default_rng(seed).permutation(order)]
    files = _files_by_patient(bench)
    given = [name for patient in order[:supports] for name in files[patient]]
    asked = [name for patient in order[bench.most_supports :] for name in files[patient]][:queries]
    if supports > bench.most_supports or len(asked) < queries:
        raise SystemExit(f"{bench.name} has no {supports} patients to support and {queries} scans to ask for")
    return given, asked


def _files_by_patient(bench: Sam2BenchSet) -> dict[str, list[str]]:
    patients: dict[str, list[str]] = {}
    for folder in (bench.name, *([bench.beside] if bench.beside else [])):
        source = DATA / folder / "images"
        if not source.is_dir():
            raise SystemExit(f"{source} is missing; set NNUNET_SAM2_DATA to the folder that holds {folder}")
        for path in sorted(source.iterdir()):
            patients.setdefault(patient_of(path.name), []).append(path.name)
    return patients


def load_case(bench: Sam2BenchSet, name: str, backend: Sam2Backend | None) -> Support:
    """Read a case with its label, and encode it where there is a back end."""
    volume = read_volume([file_of(bench, "images", name)])
    label_zyx, _ = read_label(file_of(bench, "labels", name))
    # The baselines scale frames down themselves; what they start from changes nothing beyond rounding.
    frames = Frames.from_volume(volume, size=backend.spec.image_size if backend else 2 * BASELINE_SIZE)
    return Support(
        case_id=name.split(".")[0],
        frames=frames,
        embeddings=backend.embed(frames) if backend else NoEmbeddings(),
        label_zyx=(label_zyx > 0).astype(np.uint8) if bench.merge else label_zyx,
        geometry=volume.geometry,
        patient=patient_of(name),
    )


def summary(bench: Sam2BenchSet, scores: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Average cases' Dice by part, without the cases that lack it, and the headline's parts."""
    classes = {}
    for part in bench.scored:
        known = [case[part] for case in scores if case[part] is not None]
        classes[part] = round(float(np.mean(known)), 4) if known else None
    mean = float(np.mean([classes[part] for part in bench.headline if classes[part] is not None]))
    return {"mean": round(mean, 4), "classes": classes, "cases": len(scores)}
