"""The bench's tables, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marked_table import replace_marked

from methods_bench.cells import Cells, checkpoints_of, number, rows_of, table
from methods_bench.foretold_table import foretold_table
from methods_bench.published import published_table
from methods_bench.summary import paired
from methods_bench.tasks import FEW_SHOT, set_of
from methods_bench.variants import COPIES

_MOST_PARTS_BESIDE = 6
"""Parts of a set that have their columns beside its means; more of them have a table of their own."""

NEAR = 0.01
"""How far behind the best `auto` may stand."""
JUDGED = "auto"
IN_THE_BOX = "embedded, 256 px"


def write_tables(results: Mapping[str, Any], page: Path, readme: Path) -> None:
    """Replace the marked parts of the page and of the README."""
    replace_marked(page, "methods", tables(results) or "Not run yet.")
    replace_marked(readme, "labels", readme_table(results, IN_THE_BOX) or "Not run yet.")


def readme_table(results: Mapping[str, Any], checkpoint: str, seed: str = "seed 0") -> str:
    """Return what `auto` makes of few labelled cases beside the best without a model, set by set, for the README."""
    cells: Cells = results["cells"]
    counts = sorted({row.split("/")[1] for row in cells if row.split("/")[0] != FEW_SHOT}, key=int)
    rows = []
    for name in sorted({row.split("/")[0] for row in cells} - {FEW_SHOT}):
        line = [name]
        for count in counts:
            tasks = cells.get(f"{name}/{count}/{seed}", {})
            copies = [tasks[copy]["mean"] for copy in COPIES if copy in tasks]
            mine = tasks.get(f"{checkpoint}: {JUDGED}", {}).get("mean")
            line += ["" if mine is None else f"**{mine:.3f}**", number(max(copies, default=None))]
        if any(line[1::2]):
            rows.append(line)
    if not rows:
        return ""
    header = ["real images"]
    for count in counts:
        header += [f"{count} labelled", "no model"]
    return table(header, rows)


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown; the empty text where there is no result."""
    cells: Cells = results["cells"]
    if not cells:
        return ""
    sets = list(dict.fromkeys(row.split("/")[0] for row in cells))
    plain = [name for name in sets if name != FEW_SHOT]
    parts = [_summary(cells), *(_set_table(cells, name) for name in plain)]
    parts += [_few_shot(cells), foretold_table(cells), _costs(cells, results["encoding"]), published_table(cells)]
    return "\n\n".join(part for part in parts if part)


def best_other(set_name: str, tasks: Mapping[str, Any], checkpoint: str) -> tuple[str, float, float, int] | None:
    """Find what `auto` is furthest behind, or least ahead of, on the cases that both labelled.

    Returns its name, auto's Dice, its own and the number of cases; None where there is no `auto` or nothing to compare.
    """
    mine = tasks.get(f"{checkpoint}: {JUDGED}")
    if mine is None or "cases" not in mine:
        return None
    found = []
    for task, entry in tasks.items():
        model, _, variant = task.rpartition(": ")
        if variant == JUDGED or (model != checkpoint and task not in COPIES):
            continue
        pair = paired(set_of(set_name), mine, entry)
        if pair is not None:
            found.append((pair[0] - pair[1], variant, pair))
    if not found:
        return None
    _, variant, pair = min(found)
    return variant, *pair


def _summary(cells: Cells) -> str:
    rows = []
    near = {}
    for checkpoint in checkpoints_of(cells):
        for set_name in dict.fromkeys(row.split("/")[0] for row in cells):
            for seed, supports, tasks in rows_of(cells, set_name):
                rival = best_other(set_name, tasks, checkpoint)
                if rival is None:
                    continue
                name, mine, other, cases = rival
                behind = round(mine - other, 4)
                near.setdefault(checkpoint, []).append(behind >= -NEAR)
                verdict = "best" if behind >= 0 else "yes" if behind >= -NEAR else "**no**"
                rows.append(
                    [
                        checkpoint,
                        set_name,
                        supports,
                        seed.removeprefix("seed "),
                        number(mine),
                        name,
                        number(other),
                        f"{behind:+.3f}",
                        str(cases),
                        verdict,
                    ]
                )
    if not rows:
        return ""
    counts = "; ".join(f"{name}: {sum(found)} of {len(found)}" for name, found in near.items())
    header = ["checkpoint", "set", "supports", "seed", "auto", "best other", "its Dice", "difference", "cases"]
    return "\n".join(
        [
            "### `auto` against the best other",
            "",
            f"Within {NEAR} of the best: {counts}.",
            "",
            table([*header, f"within {NEAR}"], rows),
        ]
    )


def _set_table(cells: Cells, set_name: str) -> str:
    bench = set_of(set_name)
    by_seed: dict[str, dict[str, Mapping[str, Any]]] = {}
    for seed, supports, tasks in rows_of(cells, set_name):
        by_seed.setdefault(seed, {})[supports] = tasks
    parts = []
    for seed, by_count in by_seed.items():
        counts = list(by_count)
        header = ["labeller", *(f"{c} support{'s' * (c != '1')}" for c in counts), "cases"]
        beside = 1 < len(bench.scored) <= _MOST_PARTS_BESIDE
        if beside:
            header += [f"{part}, {counts[-1]}" for part in bench.scored]
        header += [f"HD95 mm, {c}" for c in counts]
        rows = []
        names = {task for tasks in by_count.values() for task in tasks}
        for task in sorted(names, key=_order):
            entries = [by_count[c].get(task, {}) for c in counts]
            if all("refused" in entry for entry in entries if entry):
                continue
            rows.append([task, *(number(entry.get("mean")) for entry in entries), _case_counts(entries)])
            if beside:
                rows[-1] += [number(entries[-1].get("classes", {}).get(part)) for part in bench.scored]
            rows[-1] += [number(entry.get("hd95"), 1) for entry in entries]
        if rows:
            parts.append("\n".join([f"### {set_name}, {seed}", "", table(header, rows), *_refusals(by_count)]))
        if rows and len(bench.scored) > _MOST_PARTS_BESIDE:
            parts.append(_parts_table(set_name, seed, by_count[counts[-1]], counts[-1]))
    return "\n\n".join(parts)


def _parts_table(set_name: str, seed: str, tasks: Mapping[str, Mapping[str, Any]], count: str) -> str:
    """Return a set's many parts as a table of their own: two digits, so that a row stays readable."""
    parts = set_of(set_name).scored
    rows = [
        [task, *(number(tasks[task]["classes"].get(part), 2) for part in parts)]
        for task in sorted(tasks, key=_order)
        if "refused" not in tasks[task]
    ]
    return "\n".join([f"### {set_name}, {seed}: each part, {count} supports", "", table(["labeller", *parts], rows)])


def _refusals(by_count: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which labellers refuse a set, and why."""
    told = {t: e["refused"] for tasks in by_count.values() for t, e in sorted(tasks.items()) if "refused" in e}
    return ["", *(f"Refused by {task}: {message}." for task, message in told.items())] if told else []


def _few_shot(cells: Cells) -> str:
    bench = set_of(FEW_SHOT)
    parts = []
    for seed, _, tasks in rows_of(cells, FEW_SHOT):
        header = ["labeller", "cases", "all slices", *bench.scored, "organ slices", *bench.scored]
        rows = []
        for task in sorted(tasks, key=_order):
            entry = tasks[task]
            if "refused" in entry:
                continue
            rows.append([task, str(len(entry["cases"])), number(entry["mean"])])
            rows[-1] += [number(entry["classes"][part]) for part in bench.scored]
            rows[-1] += [number(entry["organ_slices"])]
            rows[-1] += [number(entry["organ_slices_classes"][part]) for part in bench.scored]
        parts.append("\n".join([f"### {FEW_SHOT}: one support, {seed}", "", table(header, rows)]))
    return "\n\n".join(parts)


def _costs(cells: Cells, encoding: Mapping[str, Any]) -> str:
    """Return what a volume costs with the most supports that a task was measured with."""
    rows = []
    for set_name in dict.fromkeys(row.split("/")[0] for row in cells):
        last: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for _, supports, tasks in rows_of(cells, set_name):
            last |= {task: (supports, entry) for task, entry in tasks.items() if "refused" not in entry}
        for task in sorted(last, key=_order):
            supports, entry = last[task]
            cost, once = entry["cost_a_volume"], entry["prepare"]
            rate = encoding.get(task.rpartition(": ")[0], {}).get("wall_a_slice", 0.0)
            quality = entry.get("quality_cost", {}).get("wall")
            calibration = (entry.get("calibration") or {}).get("cost", {}).get("wall")
            rows.append(
                [
                    set_name,
                    supports,
                    task,
                    number(cost["wall"], 2),
                    number(cost["cpu"], 2),
                    number(cost["wall"] + rate * cost["slices_to_encode"], 2),
                    number(once["wall"], 1),
                    number(cost["slices_to_encode"], 0),
                    number(once["slices_to_encode"], 0),
                    number(cost["memory_reads"], 0),
                    number(once["memory_reads"], 0),
                    "" if quality is None else number(quality / len(entry["cases"]), 2),
                    number(calibration, 1),
                ]
            )
    header = ["set", "supports", "labeller", "s a volume", "CPU s", "with encoding", "s once"]
    header += ["slices to encode", "once", "memory reads", "once", "s quality", "s calibration"]
    return "\n".join(["### What it costs", "", table(header, rows)]) if rows else ""


def _order(task: str) -> tuple[bool, str]:
    return task not in COPIES, task


def _case_counts(entries: Sequence[Mapping[str, Any]]) -> str:
    counts = [str(len(entry["cases"])) if "cases" in entry else "" for entry in entries]
    known = list(dict.fromkeys(count for count in counts if count))
    return known[0] if len(known) == 1 else " / ".join(count or "-" for count in counts)
