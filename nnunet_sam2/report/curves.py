"""The curves of a run: change, validation, volumes, confidence."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from nnunet_sam2.report.account import RunAccount
from nnunet_sam2.report.charts import Limit, Series, line_chart

STYLES = 10
"""Colours that the style sheet has for classes; more classes begin again with the first."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hold one chart with what is to be said about it."""

    title: str
    text: str
    svg: Markup


def curves(account: RunAccount) -> list[Curve]:
    """Draw the curves for which there are values."""
    drawn = (_change(account), _validation(account), _volumes(account), _confidence(account))
    return [curve for curve in drawn if curve is not None]


def class_style(account: RunAccount, value: int) -> str:
    """Return the class of the style sheet that gives a class its colour."""
    return f"k{list(account.class_names).index(value) % STYLES + 1}"


def _change(account: RunAccount) -> Curve | None:
    rounds = [r for r in account.rounds if r.number > 0 and not r.final]
    if all(r.change_mean is None for r in rounds):
        return None
    worst, mean = account.worst_tenth_limit, account.mean_change_limit
    return Curve(
        title="Label change",
        text="1 − Dice to the labels of the round before. Both curves must fall under their limits.",
        svg=line_chart(
            [
                Series(name="worst tenth", values=[r.change_worst_tenth for r in rounds], style="tone2"),
                Series(name="mean", values=[r.change_mean for r in rounds], style="tone1"),
            ],
            [r.name for r in rounds],
            title="Label change by round",
            show=lambda v: f"{v:.3f}",
            limits=[
                Limit(name=f"limit {worst:g}", value=worst, style="tone2"),
                Limit(name=f"limit {mean:g}", value=mean, style="tone1"),
            ],
            from_zero=True,
        ),
    )


def _validation(account: RunAccount) -> Curve | None:
    scored = [r for r in account.rounds if r.validation_dice is not None]
    if not scored:
        return None
    names = list(dict.fromkeys(name for r in scored for name in r.validation_by_class))
    of_name = {name: value for value, name in account.class_names.items()}
    series = [
        Series(
            name=name,
            values=[r.validation_by_class.get(name) for r in scored],
            style=class_style(account, of_name[name]) if name in of_name else f"k{i % STYLES + 1}",
        )
        for i, name in enumerate(names)
        if len(names) > 1
    ]
    series.append(Series(name="mean", values=[r.validation_dice for r in scored], style="ink"))
    baseline = account.baseline
    known = baseline is not None and baseline.validation_dice is not None and len(scored) > 1
    return Curve(
        title="Validation Dice",
        text=f"On {account.validation_cases} held-out case{'' if account.validation_cases == 1 else 's'} with human "
        "labels. Round 0 has learnt from human labels alone.",
        svg=line_chart(
            series,
            [r.name for r in scored],
            title="Validation Dice by round",
            show=lambda v: f"{v:.3f}",
            limits=[Limit(name="labelled-only", value=baseline.validation_dice or 0.0)] if known and baseline else [],
            top=1.0,
            least_span=0.1,
        ),
    )


def _volumes(account: RunAccount) -> Curve | None:
    rounds = [r for r in account.rounds if r.volumes]
    if not rounds:
        return None
    first = rounds[0].volumes
    series = [
        Series(
            name=name,
            values=[100 * r.volumes.get(value, 0.0) / first[value] for r in rounds],
            style=class_style(account, value),
        )
        for value, name in account.class_names.items()
        if first.get(value)
    ]
    return Curve(
        title="Class volumes",
        text=f"Mean over the unlabelled cases, round {rounds[0].name} = 100\u00a0%. "
        "A steady climb or fall is how collapse begins.",
        svg=line_chart(
            series,
            [r.name for r in rounds],
            title="Class volumes by round, in per cent",
            show=lambda v: f"{v:.0f} %",
            least_span=20.0,
        ),
    )


def _confidence(account: RunAccount) -> Curve | None:
    rounds = [r for r in account.rounds if r.confidence is not None]
    if not rounds:
        return None
    series = [Series(name="mean", values=[_percent(r.confidence) for r in rounds], style="tone1")]
    text = "Mean confidence of voxels that are labelled or in doubt"
    if any(r.confident is not None for r in rounds):
        series.append(Series(name="confident", values=[_percent(r.confident) for r in rounds], style="tone2"))
        text += ", and the share of them that counts at least half as much as a human label’s"
    return Curve(
        title="Confidence",
        text=f"{text}. Labels that grow surer while validation falls confirm each other’s faults.",
        svg=line_chart(
            series,
            [r.name for r in rounds],
            title="Confidence by round, in per cent",
            show=lambda v: f"{v:.0f} %",
            from_zero=True,
            top=100.0,
        ),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share
