"""The methods' benchmark: what is measured again, what a cell's figures come to, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_sets
import numpy as np
import pytest
from methods_bench.measure import merged
from methods_bench.plan import CALIBRATED, planned
from methods_bench.scores import bound_coverage, organ_slice_dice, pooled_coverage, rank_correlation
from methods_bench.store import Results, is_done, slim
from methods_bench.summary import paired, summarised
from methods_bench.tables import IN_THE_BOX, best_other, tables, write_tables
from methods_bench.tasks import FEW_SHOT, case_names, set_of
from methods_bench.variants import COPIES, all_variants

MODEL = IN_THE_BOX


def _case(dice: float, *, estimate: float | None = None, part: str = "breast") -> dict[str, Any]:
    lower = None if estimate is None else estimate - 0.1
    return {
        "dice": {part: dice},
        "hd95": {part: 10.0},
        "organ_slices": {part: dice + 0.1},
        "quality": {part: {"dice": dice, "estimate": estimate, "lower": lower}},
        "cost": {"wall": 1.0, "cpu": 0.5, "slices_to_encode": 3, "training_slices": 0, "memory_reads": 7},
    }


def _found(dice: dict[str, float]) -> dict[str, Any]:
    cost = {"wall": 2.0, "cpu": 2.0, "slices_to_encode": 5, "training_slices": 0, "memory_reads": 0}
    return {
        "cases": {name: _case(value, estimate=value - 0.05) for name, value in dice.items()},
        "prepare": cost,
        "quality_cost": {"wall": 0.4},
        "calibration": {
            "calibrated": True,
            "cases": {"breast": 3},
            "coverage": 0.9,
            "cost": {"wall": 4.0},
        },
    }


def _entry(dice: dict[str, float]) -> dict[str, Any]:
    found = _found(dice)
    bench = bench_sets.SETS["ddsm_tissue"]
    return slim({"identity": {"version": 1}, **summarised(bench, found), **found}, organ_slices=False)


def test_organ_slices_are_those_of_the_truth_and_the_rest_counts_elsewhere():
    truth, guess = np.zeros((4, 6, 5), bool), np.zeros((4, 6, 5), bool)
    truth[1:3, :2] = True
    guess[1:, :2] = True
    # A whole slice beyond the organ is wrong, but not within the slices that show it.
    assert organ_slice_dice(guess, truth, 0) == 1.0
    assert organ_slice_dice(np.moveaxis(guess, 0, 2), np.moveaxis(truth, 0, 2), 2) == 1.0
    assert organ_slice_dice(guess, np.zeros_like(truth), 0) is None
    assert organ_slice_dice(np.zeros_like(truth), truth, 0) == 0.0


def test_ranks_are_compared_over_all_pairs_that_are_known():
    def row(estimate: float | None, dice: float | None) -> dict[str, float | None]:
        return {"dice": dice, "estimate": estimate, "lower": None}

    cases = [{"1": row(0.1 * n, 0.1 * n + 0.05), "2": row(None, 0.5), "3": row(0.5, None)} for n in range(6)]
    found = rank_correlation(cases)
    assert found == {"pairs": 6, "spearman": 1.0, "error": 0.05}
    cases[0]["1"] = row(0.9, 0.05)
    assert rank_correlation(cases)["spearman"] < 0.5
    assert rank_correlation(cases[:4])["spearman"] is None


def test_bounds_are_checked_class_by_class_and_added_up():
    cases = [
        {
            "1": {"dice": 0.8, "estimate": 0.8, "lower": 0.7},
            "2": {"dice": 0.3, "estimate": 0.8, "lower": 0.7},
            "3": {"dice": 0.3, "estimate": 0.8, "lower": None},
        }
    ] * 8
    checks = bound_coverage(cases, {"1": 8, "2": 8, "3": 8}, 0.9)
    assert set(checks) == {"1", "2"}
    pooled = pooled_coverage(checks)
    assert pooled is not None
    assert (pooled["held"], pooled["count"], pooled["classes_kept"], pooled["classes"]) == (8, 16, 1, 2)
    assert pooled["target"] == pytest.approx(8 / 9)
    assert pooled_coverage({}) is None


def test_a_result_stands_until_its_inputs_change_or_more_queries_are_wanted(tmp_path: Path):
    results = Results(tmp_path / "methods.json")
    identity = {"checkpoint": "abc", "options": {"supports": None}}
    results.put("b/1/seed 0", "model: x", {"identity": identity, "cases": {"p": {}, "q": {}}, "mean": 0.5})
    results.put("a/1/seed 0", "copy", {"identity": {}, "refused": "no"})
    results.put_encoding("model", {"wall_a_slice": 0.1})
    found = Results(tmp_path / "methods.json").read()
    assert list(found["cells"]) == ["a/1/seed 0", "b/1/seed 0"]
    assert found["encoding"] == {"model": {"wall_a_slice": 0.1}}
    entry = found["cells"]["b/1/seed 0"]["model: x"]
    assert is_done(entry, identity, 2)
    assert is_done(entry, identity, 1)
    assert not is_done(entry, identity, 3)
    assert not is_done(entry, {**identity, "checkpoint": "other"}, 2)
    assert not is_done(None, identity, 1)
    # A refusal needs no second try.
    assert is_done(found["cells"]["a/1/seed 0"]["copy"], {}, 12)


def test_the_few_shot_protocol_has_the_sets_own_support_and_asks_all_other_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_sets, "DATA", tmp_path)
    folder = tmp_path / "chaos_t2_mr" / "images"
    folder.mkdir(parents=True)
    for patient in range(12):
        (folder / f"patient{patient:02d}.nii.gz").touch()
    supports, queries = case_names(FEW_SHOT, 1, 11, 0)
    usual_supports, usual_queries = case_names("chaos_t2_mr", 1, 4, 0)
    assert supports == usual_supports
    assert queries[:4] == usual_queries
    assert len({*supports, *queries}) == 12
    # Fewer queries are the first ones: what is cut short is compared on the same cases.
    assert case_names("chaos_t2_mr", 8, 2, 0)[1] == usual_queries[:2]
    assert case_names("chaos_t2_mr", 8, 2, 0)[0] == case_names("chaos_t2_mr", 8, 4, 0)[0]


def test_cheap_cells_come_first_and_only_costly_ones_are_cut():
    variants = all_variants()
    names = {variant.name for variant in variants}
    assert {"transfer", "auto", "insert", "insert, paper", "match, paper", "guided, paper", "chain", *COPIES} <= names
    cells = planned(
        variants, sets=["acdc", "ddsm_tissue", FEW_SHOT], supports=[1, 8], queries=None, seconds_a_cell=20.0
    )
    own = [cell.seconds for cell in cells if cell.variant.strategy != "refine"]
    assert own == sorted(own)
    turns = {(cell.key, cell.variant.name): turn for turn, cell in enumerate(cells)}
    # `refine` redraws what `transfer` has drawn.
    assert all(turn > turns[key, "transfer"] for (key, name), turn in turns.items() if name.startswith("refine"))
    assert {cell.supports for cell in cells if cell.set_name == FEW_SHOT} == {1}
    assert {cell.set_name for cell in cells if cell.variant.strategy == "chain"} == {"ddsm_tissue"}
    acdc = {(cell.variant.name, cell.supports): cell.queries for cell in cells if cell.set_name == "acdc"}
    assert all(acdc[name, 8] == 8 for name in CALIBRATED if name != "chain")
    assert 2 <= acdc["insert, paper", 8] < 8
    again = planned(variants, sets=["acdc"], supports=[8], queries=3, seconds_a_cell=20.0)
    assert {cell.queries for cell in again} == {3}


def test_organs_of_one_case_are_put_together_and_cost_their_sum():
    def row(part: str) -> dict[str, Any]:
        case = _case(0.5, part=part)
        return {"cases": {"a": case}, "prepare": dict(case["cost"]), "quality_cost": {}, "calibration": None}

    found = merged([row("liver"), row("spleen")])
    assert set(found["cases"]["a"]["dice"]) == {"liver", "spleen"}
    assert set(found["cases"]["a"]["quality"]) == {"liver", "spleen"}
    assert found["cases"]["a"]["cost"]["memory_reads"] == 14
    assert found["prepare"]["wall"] == 2.0


def test_methods_are_compared_on_the_cases_that_both_labelled():
    bench = set_of("ddsm_tissue")
    auto, insert = _entry({"a": 0.9, "b": 0.5}), _entry({"a": 0.8})
    assert paired(bench, auto, insert) == (0.9, 0.8, 1)
    assert paired(bench, auto, {"refused": "no"}) is None
    tasks = {f"{MODEL}: auto": auto, f"{MODEL}: insert": insert, "copy": _entry({"a": 0.85, "b": 0.75})}
    assert best_other("ddsm_tissue", tasks, MODEL) == ("copy", 0.7, 0.8, 2)
    # Over all their cases, insert would have looked better than auto.
    assert insert["mean"] > auto["mean"]
    # Another checkpoint's labels are no rivals.
    tasks["other, 512 px: insert"] = _entry({"a": 1.0, "b": 1.0})
    assert best_other("ddsm_tissue", tasks, MODEL) == ("copy", 0.7, 0.8, 2)


def test_the_tables_say_where_auto_is_behind(tmp_path: Path):
    page, results = tmp_path / "page.md", Results(tmp_path / "methods.json")
    page.write_text("before\n<!-- methods: written by x -->\nstale\n<!-- methods: end -->\nafter\n")
    cases = [f"case{n}" for n in range(6)]
    row = "ddsm_tissue/3/seed 0"
    results.put(row, f"{MODEL}: auto", _entry({name: 0.8 + 0.01 * n for n, name in enumerate(cases)}))
    results.put(row, f"{MODEL}: transfer", _entry({name: 0.85 + 0.01 * n for n, name in enumerate(cases)}))
    results.put(row, f"{MODEL}: insert, paper", {"identity": {}, "refused": "one slice"})
    results.put(row, "copy", _entry(dict.fromkeys(cases, 0.5)))
    results.put("ddsm_tissue/1/seed 0", f"{MODEL}: auto", _entry({"case0": 0.7}))
    results.put("ddsm_tissue/1/seed 0", f"{MODEL}: transfer", _entry({"case0": 0.705}))
    results.put_encoding(MODEL, {"wall_a_slice": 0.5})
    readme = tmp_path / "readme.md"
    readme.write_text("<!-- labels: written by x -->\nstale\n<!-- labels: end -->\n")
    write_tables(results.read(), page, readme)
    assert "| real images | 1 labelled | no model | 3 labelled | no model |" in readme.read_text()
    assert "| ddsm_tissue | **0.700** |  | **0.825** | 0.500 |" in readme.read_text()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- methods: end -->\nafter\n")
    assert "stale" not in text
    assert f"Within 0.01 of the best: {MODEL}: 1 of 2." in text
    assert f"| {MODEL} | ddsm_tissue | 3 | 0 | 0.825 | transfer | 0.875 | -0.050 | 6 | **no** |" in text
    assert f"| {MODEL} | ddsm_tissue | 1 | 0 | 0.700 | transfer | 0.705 | -0.005 | 1 | yes |" in text
    assert "| copy |  | 0.500 | 6 |  | 10.0 |" in text
    assert f"| {MODEL}: insert, paper" not in text
    assert f"Refused by {MODEL}: insert, paper: one slice." in text
    # All bounds lie below the true Dice here, and ranks agree; with three labelled cases 0.75 can be promised.
    assert f"| {MODEL} | ddsm_tissue | auto | 3 | yes | 6 | 1.00 | 0.050 | 6 of 6 | 0.75 | 1 of 1 |" in text
    assert f"| {MODEL} | ddsm_tissue | auto | all |  | 7 | 1.00 | 0.050 |  |  |  |" in text
    # One second and three slices at half a second each.
    assert f"| ddsm_tissue | 3 | {MODEL}: auto | 1.00 | 0.50 | 2.50 | 2.0 | 3 | 5 | 7 | 0 | 0.07 | 4.0 |" in text


def test_published_figures_stand_beside_the_same_preset_here():
    found = _found({"a": 0.9})
    for case in found["cases"].values():
        for kind in ("dice", "hd95", "organ_slices"):
            case[kind] = dict.fromkeys(set_of(FEW_SHOT).scored, 0.5)
    entry = slim({**summarised(set_of(FEW_SHOT), found), **found}, organ_slices=True)
    cells = {f"{FEW_SHOT}/1/seed 0": {f"{MODEL}: match, paper": entry, "copy": entry}}
    text = tables(json.loads(json.dumps({"cells": cells, "encoding": {}})))
    line = next(line for line in text.split("\n") if line.startswith("| Zu et al."))
    assert f"match, paper 0.500 ({MODEL})" in line
    assert "0.833" in line
    assert tables({"cells": {}, "encoding": {}}) == ""
