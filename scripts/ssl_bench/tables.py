"""The tables of ``bench_ssl.py``, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from marked_table import replace_marked

from ssl_bench.arms import ARMS
from ssl_bench.published import PUBLISHED


def write_tables(results: Mapping[str, Any], page: Path) -> None:
    """Write every split that has results, and the published figures behind the split that they are of."""
    splits: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for key, result in results.items():
        set_name, labelled, profile, iterations, _, arm = key.split("/")
        splits.setdefault((set_name, labelled, profile, iterations), {}).setdefault(arm, []).append(result)
    parts = [_split(*split, arms) for split, arms in splits.items()]
    replace_marked(page, "ssl", "\n\n".join([*parts, _published()]))


def _split(set_name: str, labelled: str, profile: str, iterations: str, arms: Mapping[str, Sequence[Any]]) -> str:
    rows = [
        "| arm | Dice | HD95 mm | Dice, largest pieces | HD95 mm, largest pieces | trained iterations | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (arm for arm in ARMS if arm in arms):
        found = arms[name]
        largest = [result["largest"] for result in found]
        rows.append(
            f"| {name} | **{_mean(found, 'dice', 3)}** | {_mean(found, 'hd95', 1)} | {_mean(largest, 'dice', 3)} | "
            f"{_mean(largest, 'hd95', 1)} | {round(np.mean([r['iterations'] for r in found]))} | {len(found)} |"
        )
    for result in arms.get("loop", [])[:1]:
        labels = ", ".join(f"{name} {scores['dice']:.3f}" for name, scores in result["labels"].items())
        rows += ["", f"Labels of the unlabelled cases, seed 0: {labels}."]
    patients = "patient" if labelled == "1" else "patients"
    return "\n".join([f"### {set_name}, {labelled} labelled {patients}, {profile} profile, {iterations} iterations", "",
                      *rows])  # fmt: skip


def _mean(results: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [result[key] for result in results]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _published() -> str:
    rows = ["### Published on ACDC in this split", "", "| method | 1 patient | 3 patients | 7 patients | |",
            "|---|---|---|---|---|"]  # fmt: skip
    return "\n".join(rows + [f"| {' | '.join(row)} |" for row in PUBLISHED])
