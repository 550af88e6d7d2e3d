"""The table of estimated against true Dice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from methods_bench.cells import Cells, checkpoints_of, number, rows_of, table
from methods_bench.scores import rank_correlation

_FORETOLD = ("auto", "transfer")
_HEADER = ("checkpoint", "set", "labels of", "supports", "calibrated", "pairs", "Spearman", "mean error", "bounds held")
_HEADER_OF_BOUNDS = ("promised", "classes that kept it")


def foretold_table(cells: Cells) -> str:
    """Return the table: a row for each number of supports, and one for all labels of a set together."""
    rows = []
    for checkpoint in checkpoints_of(cells):
        for set_name in dict.fromkeys(row.split("/")[0] for row in cells):
            for variant in _FORETOLD:
                entries = [
                    (supports, entry)
                    for _, supports, tasks in rows_of(cells, set_name)
                    if (entry := tasks.get(f"{checkpoint}: {variant}")) and entry.get("foretold", {}).get("pairs")
                ]
                found = [[supports, *_row(entry["foretold"])] for supports, entry in entries]
                if len(entries) > 1:
                    found.append(["all", *_row(_together([entry for _, entry in entries]))])
                rows += [[checkpoint, set_name, variant, *cells_of_row] for cells_of_row in found]
    if not rows:
        return ""
    return "\n".join(["### Estimated against true Dice", "", table([*_HEADER, *_HEADER_OF_BOUNDS], rows)])


def _together(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Correlate over the labels of several cells; bounds that promise different things are not added up."""
    cases = [case["quality"] for entry in entries for case in entry["cases"].values() if case["quality"]]
    return {**rank_correlation(cases), "calibrated": None, "coverage": None}


def _row(foretold: Mapping[str, Any]) -> list[str]:
    checked = foretold["coverage"]
    bounds = ["", "", ""]
    if checked:
        bounds = [
            f"{checked['held']} of {checked['count']}",
            f"{checked['target']:.2f}",
            f"{checked['classes_kept']} of {checked['classes']}",
        ]
    calibrated = {True: "yes", False: "no", None: ""}[foretold["calibrated"]]
    pairs = str(foretold["pairs"])
    return [calibrated, pairs, number(foretold["spearman"], 2), number(foretold["error"]), *bounds]
