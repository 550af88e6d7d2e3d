"""The results as tables read them, and how numbers and tables are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Cells = Mapping[str, Mapping[str, Any]]


def checkpoints_of(cells: Cells) -> list[str]:
    """Name the checkpoints that there are results of."""
    return sorted({task.rpartition(": ")[0] for tasks in cells.values() for task in tasks} - {""})


def rows_of(cells: Cells, set_name: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield seed, number of supports and entries of a set's rows, in order."""
    found = [(row.split("/"), tasks) for row, tasks in cells.items() if row.split("/")[0] == set_name]
    for (_, supports, seed), tasks in sorted(found, key=lambda f: (f[0][2], int(f[0][1]))):
        yield seed, supports, tasks


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def number(value: float | None, decimals: int = 3) -> str:
    """Write a number; nothing where it is unknown."""
    return "" if value is None else f"{value:.{decimals}f}"
