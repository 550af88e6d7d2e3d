"""Checks that the options of strategies share; `ValueError` tells the option, its value and the bound."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def at_least(options: Any, least: float, *names: str) -> None:
    """Refuse options below ``least``; None, where an option may be that, says that there is no bound."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def within(options: Any, most: float, *names: str) -> None:
    """Refuse options outside of 0 to ``most``."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value <= most:
            raise ValueError(f"{name}={value} must lie in 0 to {most:g}")


def one_of(options: Any, **known: Collection[str]) -> None:
    """Refuse options that are none of their ``known`` words."""
    for name, words in known.items():
        value = getattr(options, name)
        if value not in words:
            raise ValueError(f"{name}={value}: choose one of {', '.join(words)}")
