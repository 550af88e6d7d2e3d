"""What SAM 2 is shown of an image: windows of CT that labelled cases give, and which of several channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.folders import find_dataset, new_dataset_folders
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.explain.cases import as_text, find_case
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support import showing
from nnunet_sam2.support.showing import Showing, class_separation
from nnunet_sam2.volumes import Volume, read_label, write_image, write_label

SHAPE = (6, 64, 64)
GRID = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(3.0, 3.0, 6.0))
CLIP = (-160.0, 240.0)


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=128, threads=1)


def _disc(centre_yx: tuple[float, float], radii_yx: tuple[float, float]) -> np.ndarray:
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    inside = ((y - centre_yx[0]) / radii_yx[0]) ** 2 + ((x - centre_yx[1]) / radii_yx[1]) ** 2 < 1
    return np.broadcast_to(inside, SHAPE)


def _ct(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a body on a table with fat, muscle, two organs, bowel gas, bone and, in every other case, metal; HU."""
    rng, shift = np.random.default_rng(number), 2.0 * (number % 3) - 2
    hu_zyx, label_zyx = np.full(SHAPE, -1000.0), np.zeros(SHAPE, np.uint8)
    for mask, value in (
        (_disc((61, 32), (2, 30)), 300.0),
        (_disc((31, 32), (26, 30)), -100.0),
        (_disc((31, 32), (22, 26)), 45.0),
        (_disc((48, 32), (4, 5)), 900.0),
        (_disc((16, 36 + shift), (4, 6)), -900.0),
    ):
        hu_zyx = np.where(mask, value, hu_zyx)
    for label, (mask, value) in enumerate(
        ((_disc((30, 20 + shift), (10, 9)), 115.0), (_disc((34, 46), (6, 5)), 160.0))
    ):
        hu_zyx, label_zyx = np.where(mask, value, hu_zyx), np.where(mask, label + 1, label_zyx).astype(np.uint8)
    hu_zyx = hu_zyx + rng.normal(0, 12, SHAPE)
    if number % 2:
        hu_zyx[2:4, 8:11, 50:54] = 3071.0
    return np.clip(np.rint(hu_zyx), -1024, 3071), label_zyx


def _cohort(
    source: Path, number: int, cases: Mapping[str, tuple[np.ndarray, np.ndarray]], channels: Sequence[str]
) -> Cohort:
    """Convert cases, each with an image (C, Z, Y, X) and a label map; all but the last are labelled."""
    for index, (name, (array_czyx, label_zyx)) in enumerate(cases.items()):
        for channel, array_zyx in zip(channels, array_czyx, strict=True):
            stem = f"{name}_{list(channels).index(channel):04d}"
            write_image(source / "images" / f"{stem}.nii.gz", array_zyx[None].astype(np.float32), GRID)
        if index < len(cases) - 1:
            write_label(source / "labels" / f"{name}.nii.gz", label_zyx, GRID)
    convert(source, new_dataset_folders(number, "Shown"), ConvertOptions(channels=tuple(channels)))
    return Cohort.load(find_dataset(number).raw)


def _label_last(cohort: Cohort, backend: MetaSam2Backend, out: Path) -> tuple[np.ndarray, dict[str, Any]]:
    (case,) = cohort.unlabelled
    (record,) = label_cases(
        cohort=cohort,
        case_ids=[case.case_id],
        support_ids=[labelled.case_id for labelled in cohort.labelled],
        strategy=make_strategy("transfer", {"check_slices": "0"}),
        backend=backend,
        out=out,
        seed=0,
    )
    return read_label(out / f"{case.case_id}{cohort.file_ending}")[0], record


def _mean_dice(label_zyx: np.ndarray, truth_zyx: np.ndarray) -> float:
    classes = np.unique(truth_zyx)[1:].tolist()
    return float(np.mean([dice or 0.0 for dice in dice_by_class(label_zyx, truth_zyx, classes).values()]))


def test_raw_hounsfield_units_do_as_well_as_those_clipped_to_soft_tissue(
    fresh_roots: Path, backend: MetaSam2Backend
) -> None:
    truth_zyx = _ct(3)[1]
    dice, windows = {}, {}
    for number, (kind, name) in enumerate((("raw", "CT"), ("clipped", "CT"), ("raw", "image"))):
        limits = CLIP if kind == "clipped" else (-1024, 3071)
        cases = {f"c{n}": (np.clip(_ct(n)[0], *limits)[None], _ct(n)[1]) for n in range(4)}
        cohort = _cohort(fresh_roots / f"source{number}", 530 + number, cases, [name])
        label_zyx, record = _label_last(cohort, backend, fresh_roots / f"out{number}")
        dice[kind, name], windows[kind, name] = _mean_dice(label_zyx, truth_zyx), record["shown"]["windows"][0]
    assert windows["raw", "CT"] == windows["clipped", "CT"]
    assert dice["raw", "CT"] > 0.8
    assert dice["raw", "CT"] >= dice["clipped", "CT"] - 0.005
    # Percentiles of the whole image, as other kinds of images have them, take air and metal in.
    low, high = windows["raw", "image"]
    assert high - low > 1500


def test_a_ct_window_lies_around_the_labelled_classes_and_every_case_counts_alike(fresh_roots: Path) -> None:
    array, label = np.full((4, *SHAPE), -1000.0), np.zeros((4, *SHAPE), np.uint8)
    rng = np.random.default_rng(0)
    for n, (mean, side) in enumerate(((40, 50), (100, 8), (160, 8), (40, 50))):
        label[n, :, :side, :side] = 1
        array[n][label[n] == 1] = rng.normal(mean, 5, SHAPE[0] * side * side)
    cohort = _cohort(fresh_roots / "source", 540, {f"c{n}": (array[n][None], label[n]) for n in range(4)}, ["ct"])
    shown = Showing(cohort=cohort, support_ids=("c0", "c1", "c2"))
    (low, high) = shown.windows[0]
    inner = np.percentile([rng.normal(mean, 5, 100_000) for mean in (40, 100, 160)], (0.5, 99.5))
    assert inner[0] - 11 < low <= inner[0] + 1 < inner[1] - 1 <= high < inner[1] + 11
    frames = shown.frames(Volume(array_czyx=array[3][None].astype(np.float32), geometry=GRID), size=64, slice_axis=0)
    assert frames.windows[0] == (low, high)
    assert frames.calibrated
    assert frames.along(2).calibrated
    assert frames.key != Frames.from_volume(Volume(array_czyx=array[3][None], geometry=GRID), size=64).key
    assert Showing(cohort=cohort, support_ids=("c1", "c2")).windows[0][0] > low


def test_a_class_that_shows_in_the_second_channel_alone_is_found(
    fresh_roots: Path, backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def case(number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(number)
        body_zyx, other_zyx = _disc((32, 32), (26, 28)), _disc((40 - 2.0 * number, 22), (8, 8))
        organ_zyx = _disc((22 + 6.0 * number, 40 - 4.0 * number), (9, 9))
        first = 200.0 * body_zyx + 150 * other_zyx + rng.normal(0, 8, SHAPE)
        second = 80.0 * body_zyx + 160 * organ_zyx + rng.normal(0, 8, SHAPE)
        return np.stack([first, second]), organ_zyx.astype(np.uint8)

    cases = {f"c{n}": case(n) for n in (0, 3, 2, 1)}
    cohort = _cohort(fresh_roots / "source", 541, cases, ["T2", "DWI"])
    label_zyx, record = _label_last(cohort, backend, fresh_roots / "out")
    assert _mean_dice(label_zyx, cases["c1"][1]) > 0.8
    assert record["shown"]["channels"] == ["T2", "DWI", "T2"]
    text = as_text(find_case(cohort, "c1", fresh_roots / "out", dataset="541"), cohort)
    assert "  shown: red T2 from " in text
    assert ", green DWI from " in text
    monkeypatch.setattr(showing, "default_channels", lambda count: (0, 0, 0))
    alone_zyx, _ = _label_last(cohort, backend, fresh_roots / "first")
    assert _mean_dice(alone_zyx, cases["c1"][1]) < 0.7


def test_of_more_than_three_channels_those_are_shown_that_tell_the_classes_apart(fresh_roots: Path) -> None:
    def case(number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(number)
        label_zyx = np.zeros(SHAPE, np.uint8)
        for value in (1, 2, 3):
            label_zyx[:, 16 * value - 8 : 16 * value + 4, 10:54] = value
        first, second, third = (np.where(label_zyx == value, 150.0, 100.0) for value in (1, 2, 3))
        # The first class shows in three channels alike; two show nothing.
        stack = [first, np.full(SHAPE, 100.0), first + 30, second, 2 * first, np.full(SHAPE, 50.0), third]
        return np.stack(stack) + rng.normal(0, 12, (7, *SHAPE)), label_zyx

    names = ["T1", "FLAIR", "T1c", "T2", "PD", "SWI", "ADC"]
    cohort = _cohort(fresh_roots / "source", 542, {f"c{n}": case(n) for n in range(3)}, names)
    shown = Showing(cohort=cohort, support_ids=("c0", "c1"))
    chosen = [names[channel] for channel in shown.channels]
    assert {"T2", "ADC"} < set(chosen)
    assert set(chosen) & {"T1", "T1c", "PD"}
    # Without a labelled case nothing can be chosen: the first three are shown.
    assert Showing(cohort=cohort, support_ids=()).channels == (0, 1, 2)


def test_a_second_class_counts_more_than_another_look_at_the_first() -> None:
    rng = np.random.default_rng(0)
    classes_v = np.repeat([0, 1, 2], [3000, 200, 200])
    one, again, other = (0.5 * (classes_v == k) + rng.normal(0, 0.15, 3400) for k in (1, 1, 2))
    noise = rng.normal(0, 0.15, 3400)

    def separation(*channels: np.ndarray) -> float:
        return class_separation(np.stack(channels, axis=1), classes_v)

    assert separation(one, other) > separation(one, again) > separation(one, noise)
    assert separation(one, one) == pytest.approx(separation(one, np.zeros(3400)), abs=0.01)
    assert 0 < separation(noise, np.zeros(3400)) < 0.1


def test_images_that_go_down_to_air_are_asked_for_their_name(
    fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {f"c{n}": (_ct(n)[0][None], _ct(n)[1]) for n in range(3)}
    _cohort(fresh_roots / "unnamed", 543, cases, ["image"])
    assert "--channels CT" in capsys.readouterr().out
    _cohort(fresh_roots / "named", 544, cases, ["Ct"])
    assert "--channels" not in capsys.readouterr().out
