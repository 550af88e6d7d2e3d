"""What a cell's cases come to: means by class, costs a volume, and how well the scores were foretold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from bench_sets import Sam2BenchSet

from methods_bench.scores import bound_coverage, pooled_coverage, rank_correlation


def summarised(bench: Sam2BenchSet, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of all cases together, as a JSON value; see `means` for how cases are averaged."""
    cases = list(found["cases"].values())
    dice = part_means(bench, cases, "dice")
    seen = [case["quality"] for case in cases if case["quality"]]
    calibration = found.get("calibration")
    checks = {}
    if calibration and calibration["calibrated"]:
        checks = bound_coverage(seen, calibration["cases"], calibration["coverage"])
    return {
        "mean": headline(bench, dice),
        "classes": dice,
        "hd95": headline(bench, part_means(bench, cases, "hd95"), 2),
        "hd95_classes": part_means(bench, cases, "hd95"),
        "organ_slices": headline(bench, part_means(bench, cases, "organ_slices")),
        "organ_slices_classes": part_means(bench, cases, "organ_slices"),
        "cost_a_volume": _mean_cost([case["cost"] for case in cases]),
        "foretold": {
            **rank_correlation(seen),
            "calibrated": bool(calibration and calibration["calibrated"]),
            "coverage": pooled_coverage(checks),
            "coverage_classes": checks,
        },
    }


def part_means(bench: Sam2BenchSet, cases: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float | None]:
    """Average a figure of every part over the cases that have it."""
    means: dict[str, float | None] = {}
    for part in bench.scored:
        known = [case[kind][part] for case in cases if case[kind].get(part) is not None]
        means[part] = round(float(np.mean(known)), 4) if known else None
    return means


def headline(bench: Sam2BenchSet, parts: Mapping[str, float | None], decimals: int = 4) -> float | None:
    """Average the parts that a set is judged by."""
    known = [value for part in bench.headline if (value := parts.get(part)) is not None]
    return round(float(np.mean(known)), decimals) if known else None


def paired(
    bench: Sam2BenchSet, mine: Mapping[str, Any], other: Mapping[str, Any], kind: str = "dice"
) -> tuple[float, float, int] | None:
    """Return two cells' headline over the cases that both have, and how many; None where there are none."""
    common = sorted(set(mine.get("cases", {})) & set(other.get("cases", {})))
    if not common:
        return None
    means = [headline(bench, part_means(bench, [c["cases"][n] for n in common], kind)) for c in (mine, other)]
    if means[0] is None or means[1] is None:
        return None
    return means[0], means[1], len(common)


def _mean_cost(costs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    rows = list(costs)
    return {name: round(float(np.mean([row.get(name, 0) for row in rows])), 3) for name in (rows[0] if rows else {})}
