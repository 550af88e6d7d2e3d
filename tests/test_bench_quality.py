"""The bench of estimates: whose scans a draw takes, and what its figures come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_sets
import pytest
from bench_quality import CASE, OWN_SCAN, PATIENT, Draw, cases_of, planned, quality_table, summary_row
from methods_bench.plan import planned as planned_cells
from methods_bench.tables import _set_table
from methods_bench.tasks import case_names
from methods_bench.variants import all_variants


def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """acdc_ssl4mis with 16 patients in an order of its own, two scans each; half of them lie in acdc."""
    monkeypatch.setattr(bench_sets, "DATA", tmp_path)
    order = [f"patient{patient:03d}" for patient in (*range(16, 0, -1),)]
    for patient in order:
        folder = tmp_path / ("acdc" if patient < "patient009" else "acdc_ssl4mis") / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for frame in (1, 9):
            (folder / f"{patient}_frame{frame:02d}.nii.gz").touch()
    (tmp_path / "acdc_ssl4mis" / "train_order.txt").write_text("\n".join(order))
    return order


def test_the_first_patients_of_the_order_are_labelled_with_all_their_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order = _folders(tmp_path, monkeypatch)
    given, asked = case_names("acdc_ssl4mis", 3, 6, 0)
    assert given == [f"{patient}_frame{frame}.nii.gz" for patient in order[:3] for frame in ("01", "09")]
    assert [bench_sets.patient_of(name) for name in asked] == [p for p in order[8:11] for _ in range(2)]
    assert case_names("acdc_ssl4mis", 8, 6, 0)[1] == asked
    assert bench_sets.file_of(bench_sets.SETS["acdc_ssl4mis"], "images", asked[0]).parent.parent.name == "acdc"
    others, _ = case_names("acdc_ssl4mis", 3, 6, 1)
    assert others != given
    assert len(others) == 6
    with pytest.raises(SystemExit, match="no 9 patients"):
        case_names("acdc_ssl4mis", 9, 6, 0)


def test_a_set_with_few_volumes_has_no_cell_with_more_supports_than_there_are():
    cells = planned_cells(all_variants(), sets=["btcv_ct"], supports=[1, 3, 8], queries=None, seconds_a_cell=20.0)
    assert {cell.supports for cell in cells} == {1, 3}


class _Cases:
    """Six scans of three patients, and one of another."""

    def tasks(self, *_: Any) -> list[Any]:
        scans = [SimpleNamespace(case_id=f"p{i // 2}_{i % 2}", patient_id=f"p{i // 2}") for i in range(6)]
        return [SimpleNamespace(supports=scans, queries=[SimpleNamespace(case_id="q", patient_id="q")])]


def test_a_patients_own_scan_helps_where_that_is_asked():
    draw = Draw(set_name="acdc_ssl4mis", left_out=OWN_SCAN, supports=3, queries=3, seed=0)
    supports, queries = cases_of(draw, _Cases())  # type: ignore[arg-type]
    assert [case.case_id for case in supports] == ["p0_0", "p1_0", "p2_0"]
    assert [case.case_id for case in queries] == ["p0_1", "p1_1", "p2_1"]
    new = cases_of(replace(draw, left_out=PATIENT), _Cases())  # type: ignore[arg-type]
    assert ([len(part) for part in new], new[1][0].case_id) == ([6, 1], "q")


def test_sets_take_turns_and_those_with_several_scans_are_measured_thrice():
    draws = planned(["acdc_ssl4mis", "chaos_t2_mr"], supports=3, queries=None, draws=2)
    assert [draw.key for draw in draws[:4]] == [
        "acdc_ssl4mis/patient/3/seed 0",
        "acdc_ssl4mis/case/3/seed 0",
        "acdc_ssl4mis/own scan/3/seed 0",
        "chaos_t2_mr/patient/3/seed 0",
    ]
    assert [draw.queries for draw in draws[:4]] == [6, 6, 3, 4]
    assert {draw.left_out for draw in draws} == {PATIENT, CASE, OWN_SCAN}


def _class(estimate: float | None, dice: float | None, lower: float | None = None) -> dict[str, float | None]:
    return {"estimate": estimate, "dice": dice, "lower": lower, "coverage": None if lower is None else 0.75}


def test_figures_are_by_patient_and_bounds_by_class():
    entry = {
        "cases": {
            "a1": {"patient": "a", "classes": {"1": _class(0.8, 0.7, 0.6), "2": _class(0.9, 0.8, 0.85)}},
            "a2": {"patient": "a", "classes": {"1": _class(0.7, 0.6, 0.5), "2": _class(None, 0.2)}},
            "b1": {"patient": "b", "classes": {"1": _class(0.5, 0.5, 0.4), "2": _class(0.5, None)}},
        }
    }
    patients, estimated, true, bias, error, ranks, _, held, promised, proven = summary_row([entry])
    assert (patients, estimated, true, bias, error) == ("2", "0.650", "0.600", "+0.050", "0.075")
    assert (ranks, held, promised, proven) == ("", "3 of 4 (0.75)", "0.75", "0.50")
    text = quality_table({"x/patient/3/seed 0": entry, "x/patient/3/seed 1": entry})
    assert "| x | 3 | patient | 2 | 4 | 0.650 |" in text


def test_many_parts_have_a_table_of_their_own():
    parts = bench_sets.SETS["btcv_ct"].scored
    entry = {"mean": 0.5, "hd95": 20.0, "cases": {"a": {}}, "classes": dict.fromkeys(parts, 0.123)}
    text = _set_table({"btcv_ct/3/seed 0": {"copy": entry}}, "btcv_ct")
    main, own = text.split("\n\n### ")
    assert "| labeller | 3 supports | cases | HD95 mm, 3 |" in main
    assert "| copy | " + " | ".join(["0.12"] * 13) + " |" in own
