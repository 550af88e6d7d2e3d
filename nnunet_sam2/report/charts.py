"""Curves and bars as SVG: drawn here, coloured by the page's style sheet, readable without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 124, 12, 30
_LABEL_GAP = 14
_TICKS = 4


@dataclass(frozen=True, kw_only=True)
class Series:
    """Hold one curve: a value a position on the x axis, None where there is none."""

    name: str
    values: Sequence[float | None]
    style: str
    """Class of the style sheet that gives it its colour."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Hold a horizontal line to compare curves with."""

    name: str
    value: float
    style: str = "plain"


def line_chart(
    series: Sequence[Series],
    positions: Sequence[str],
    *,
    title: str,
    show: Callable[[float], str],
    limits: Sequence[Limit] = (),
    from_zero: bool = False,
    top: float | None = None,
    least_span: float = 0.0,
    axis: str = "round",
) -> Markup:
    """Draw curves with a mark a value and their names at the right end.

    The axis spans ``least_span`` at least, so that noise does not look like a trend.
    """
    values = [v for s in series for v in s.values if v is not None] + [limit.value for limit in limits]
    low, high, ticks = _scale(values, from_zero=from_zero, top=top, least_span=least_span)
    last = max(1, len(positions) - 1)

    def x(index: int) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return _LEFT + (inner / 2 if len(positions) == 1 else inner * index / last)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>'
        )
    every = math.ceil(len(positions) / 10)
    for index, name in enumerate(positions):
        if index % every == 0 or index == len(positions) - 1:
            parts.append(
                f'<text class="tick" x="{x(index):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(name)}</text>'
            )
    parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{_HEIGHT - 12}" text-anchor="end">{escape(axis)}</text>')
    wanted: list[tuple[float, str, str]] = []
    for limit in limits:
        parts.append(
            f'<line class="limit {limit.style}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(limit.value):.1f}" '
            f'y2="{y(limit.value):.1f}"/>'
        )
        wanted.append((y(limit.value), limit.name, f"limit-name {limit.style}"))
    for one in series:
        known = [(x(i), y(v), v, positions[i]) for i, v in enumerate(one.values) if v is not None]
        if not known:
            continue
        if len(known) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in known)
            parts.append(f'<polyline class="curve {one.style}" points="{path}"/>')
        for px, py, value, name in known:
            parts.append(
                f'<circle class="mark {one.style}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
                f"<title>{escape(one.name)}, {escape(axis)} {escape(name)}: {escape(show(value))}</title></circle>"
            )
        wanted.append((known[-1][1], f"{one.name} {show(known[-1][2])}", f"name {one.style}"))
    for py, name, style in _spread(wanted):
        parts.append(f'<text class="{style}" x="{_WIDTH - _RIGHT + 9}" y="{py + 4:.1f}">{escape(_short(name))}</text>')
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def bar(parts: Sequence[tuple[str, float, str]], *, title: str) -> Markup:
    """Draw shares of a whole as one bar: name, size and style of each part."""
    total = sum(size for _, size, _ in parts) or 1.0
    drawn, at = [], 0.0
    for name, size, style in parts:
        width = 1000.0 * size / total
        drawn.append(
            f'<rect class="{style}" x="{at:.2f}" y="0" width="{max(0.0, width - 2):.2f}" height="20">'
            f"<title>{escape(name)}: {size / total:.0%}</title></rect>"
        )
        at += width
    return Markup(
        f'<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawn)}</svg>"
    )


def _scale(
    values: Sequence[float], *, from_zero: bool, top: float | None, least_span: float
) -> tuple[float, float, list[float]]:
    """Choose the ends of an axis and its ticks, whole multiples of 1, 2 or 5 times a power of ten."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(0.0, low)
    missing = max(least_span, 1e-9) - (high - low)
    if missing > 0:
        low, high = low - (0.0 if from_zero else missing / 2), high + missing / (1 if from_zero else 2)
        if top is not None and high > top:
            low, high = low - (0.0 if from_zero else high - top), top
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [round(n * step, 10) for n in range(first, last + 1)]
    if top is not None and ticks[-1] > top:
        ticks = [tick for tick in ticks if tick <= top + 1e-9]
    return ticks[0], max(ticks[-1], high), ticks


def _spread(wanted: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Move names apart that would lie on each other; very many lie closer, so that they stay beside the chart."""
    gap = min(_LABEL_GAP, (_HEIGHT - _TOP - _BOTTOM) / max(1, len(wanted) - 1))
    placed: list[tuple[float, str, str]] = []
    for py, name, style in sorted(wanted):
        at = max(py, placed[-1][0] + gap) if placed else py
        placed.append((at, name, style))
    over = placed[-1][0] - (_HEIGHT - _BOTTOM) if placed else 0.0
    if over > 0:
        limit = float(_HEIGHT - _BOTTOM)
        for index in range(len(placed) - 1, -1, -1):
            at, name, style = placed[index]
            placed[index] = (min(at, limit), name, style)
            limit = placed[index][0] - gap
    return placed


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:11] + "…" + name[-6:]
