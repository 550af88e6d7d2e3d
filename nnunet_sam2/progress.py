"""One line a stage, and a bar with the time left for what takes longer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def say(text: str) -> None:
    """Print one line for the user, at once."""
    print(text, flush=True)


def track(items: Iterable[Item], *, what: str, total: int | None = None) -> Iterable[Item]:
    """Iterate over ``items`` behind a progress bar on standard error that shows the time left.

    What takes under two seconds shows none. Where standard error is not a terminal, the bar prints at most one line
    every 30 seconds.
    """
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, **bar_options())


def bar_options() -> dict[str, Any]:
    """Return how tqdm's bars look here: redrawn on a terminal, a line every 30 seconds elsewhere."""
    interactive = sys.stderr.isatty()
    return {
        "file": sys.stderr if interactive else _Lines(),
        "mininterval": 0.2 if interactive else 30.0,
        "ascii": not interactive,
        "delay": 2.0,
        "dynamic_ncols": interactive,
    }


class _Lines:
    """Write each state of a bar as a line of its own: in a log file, a return to the line's start is none."""

    def write(self, text: str) -> None:
        sys.stderr.write(text.rstrip(" ").replace("\r", "\n"))

    def flush(self) -> None:
        sys.stderr.flush()
