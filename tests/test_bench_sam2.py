"""The labeller's benchmark: the baselines that learn nothing, the draw of cases, the table."""

from __future__ import annotations

import json
from pathlib import Path

import bench_sam2
import bench_sets
import numpy as np
import pytest
from baselines import CopyBaseline, NoEmbeddings
from scipy import ndimage

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import Volume


def _case(image_zyx: np.ndarray, label_zyx: np.ndarray) -> Support:
    geometry = Geometry(shape_zyx=image_zyx.shape)
    volume = Volume(array_czyx=image_zyx[None].astype(np.float32), geometry=geometry)
    return Support(
        case_id="case",
        frames=Frames.from_volume(volume, size=64, slice_axis=0),
        embeddings=NoEmbeddings(),
        label_zyx=label_zyx,
        geometry=geometry,
    )


def _subject(shift: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:96, :96]
    planes, labels = [], []
    for n in range(4):
        organ = ((y - 48 - shift) / (14 + 4 * n)) ** 2 + ((x - 40) / 20) ** 2 < 1
        body = ((y - 48 - shift) / 40) ** 2 + ((x - 48) / 38) ** 2 < 1
        planes.append(ndimage.gaussian_filter(body * 0.4 + organ * 0.6, 1.5) + 0.01 * y / 96)
        labels.append(organ)
    return np.stack(planes), np.stack(labels).astype(np.uint8)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum()))


def test_a_support_that_equals_the_query_gives_back_its_own_label():
    image, label = _subject(0)
    case = _case(image, label)
    other = _case(*_subject(12))
    answer = CopyBaseline([other, case], registered=False).label(case.as_query())
    assert answer.shape == label.shape
    # 96 to 128 pixels and back is exact for nearest neighbours.
    np.testing.assert_array_equal(answer, label)


def test_registration_moves_the_mask_onto_a_shifted_subject():
    support, (image, label) = _case(*_subject(0)), _subject(9)
    query = _case(image, label).as_query()
    copied = CopyBaseline([support], registered=False).label(query)
    registered = CopyBaseline([support], registered=True).label(query)
    # The last slice is the one that is matched with its own counterpart.
    assert _dice(copied[3], label[3]) < 0.85
    assert _dice(registered[3], label[3]) > 0.95
    assert _dice(registered, label) > _dice(copied, label) + 0.1


def test_queries_stay_the_same_and_share_no_patient_with_the_supports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_sets, "DATA", tmp_path)
    folder = tmp_path / "acdc" / "images"
    folder.mkdir(parents=True)
    for patient in range(12):
        for frame in (1, 9):
            (folder / f"patient{patient:03d}_frame{frame:02d}.nii.gz").touch()
    few, queries = bench_sets.draw_cases(bench_sets.SETS["acdc"], 1, 4, 0)
    many, again = bench_sets.draw_cases(bench_sets.SETS["acdc"], 8, 4, 0)
    assert queries == again
    assert few == many[:1]
    assert len({name.split("_")[0] for name in many + queries}) == 12
    with pytest.raises(SystemExit, match="12 patients"):
        bench_sets.draw_cases(bench_sets.SETS["acdc"], 9, 4, 0)


def test_the_table_goes_between_the_markers_and_leaves_the_rest(tmp_path: Path):
    page, results = tmp_path / "page.md", tmp_path / "sam2.json"
    page.write_text("before\n<!-- sam2: written by x -->\nold\n<!-- sam2: end -->\nafter\n")
    entry = {"mean": 0.5, "classes": {"breast": 0.5}, "seconds_a_volume": 1.0, "cases": 2}
    results.write_text(
        json.dumps(
            {
                "ddsm_tissue/8/seed 0/2 queries": {"model, 256 px: transfer": {**entry, "mean": 0.75}},
                "ddsm_tissue/1/seed 0/2 queries": {"copy": entry, "model, 256 px: transfer": entry},
            }
        )
    )
    bench_sam2.write_table(results, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- sam2: end -->\nafter\n")
    assert "old" not in text
    assert "| copy | 0.500 |  | 1.0 |" in text
    assert "| model, 256 px: transfer | 0.500 | 0.750 | 1.0 |" in text
    assert text.index("| copy |") < text.index("| model, 256 px: transfer |")
    # Eight supports have no baseline to gain on.
    assert "| model, 256 px | ddsm_tissue | 1 | copy 0.500 | transfer 0.500 | +0.000 |" in text
    assert "| model, 256 px | ddsm_tissue | 8 |" not in text


def test_a_page_without_the_markers_is_refused(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="lacks a line"):
        bench_sam2.write_table(tmp_path / "sam2.json", page)
