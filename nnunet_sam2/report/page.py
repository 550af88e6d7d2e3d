"""The page: an account and its pictures as one HTML file that asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nnunet_sam2.cohort.cohort import Role
from nnunet_sam2.report.account import CaseAccount, RunAccount
from nnunet_sam2.report.charts import bar
from nnunet_sam2.report.curves import curves
from nnunet_sam2.report.verdict import judge_run
from nnunet_sam2.report.words import Said

_SCRIPTS = ("payload.js", "drawing.js", "surface.js", "table.js", "viewer.js", "main.js")
"""In this order: later ones use earlier ones."""

_REVIEW = "review.js"
"""Before the last script, where a person may decide."""

_THREE = "three.min.js"
_LOOK_FIRST = 5


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Hold the picture blocks of the cases that have them, and what is to be said about them."""

    blocks: Mapping[str, bytes] = field(default_factory=dict)
    """By case, as `pictures.encode` writes them."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Cases whose files could not be read, with the reason."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ReviewPage:
    """Hold what the page needs where a person may decide on it: ``nnunet_sam2 review`` serves it then."""

    data: Mapping[str, Any]
    """JSON value for the scripts."""
    first: Sequence[tuple[str, str]] = ()
    """Cases to look at first, with the reason."""
    notice: str = ""
    """What becomes of the decisions."""


def render(account: RunAccount, pictures: Pictures, review: ReviewPage | None = None) -> str:
    """Render the page; whatever comes from files is escaped, and scripts and styles are allowed by their hash alone."""
    style, script, three = _asset("page.css"), _script(reviewed=review is not None), _asset(_THREE)
    template = _environment().get_template("page.html.j2")
    order = {case.case_id: index for index, case in enumerate(account.cases)}
    return template.render(
        account=account,
        verdict=judge_run(account),
        policy=_policy(style=style, scripts=(script, three), connects=review is not None),
        review=review,
        tiles=[*_tiles(account), *([] if review else _said(account))],
        charts=curves(account),
        costs=_costs(account),
        cost_bar=_cost_bar(account),
        look_first=_look_first(account, review),
        nothing_left=bool(review.data.get("cases") if review else account.unlabelled),
        order=order,
        pictures=pictures,
        data=_data(account, pictures) | ({"review": review.data} if review else {}),
        style=Markup(style),
        script=Markup(script),
        three=Markup(three),
        blocks=_blocks(pictures, order),
    )


def duration(seconds: float) -> str:
    """Write a time span for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nnunet_sam2.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["number"] = lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}"
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return environment


@cache
def _asset(name: str) -> str:
    text = (resources.files("nnunet_sam2.report") / "assets" / name).read_text(encoding="utf-8")
    # Browsers hash what is left after they have made all line ends alike.
    return text.replace("\r\n", "\n")


@cache
def _script(*, reviewed: bool) -> str:
    names = [*_SCRIPTS[:-1], _REVIEW, _SCRIPTS[-1]] if reviewed else _SCRIPTS
    return '"use strict";\n(() => {\n' + "\n".join(_asset(name) for name in names) + "\n})();\n"


def _look_first(account: RunAccount, review: ReviewPage | None) -> list[tuple[CaseAccount, str]]:
    """Return the cases to look at first, with the reason where a review gives one."""
    if review is None:
        return [(case, "") for case in account.look_first(_LOOK_FIRST)]
    cases = {case.case_id: case for case in account.cases}
    return [(cases[case_id], why) for case_id, why in review.first[:_LOOK_FIRST]]


def _policy(*, style: str, scripts: Sequence[str], connects: bool = False) -> str:
    allowed = " ".join(f"'{_hash(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src '{_hash(style)}'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if connects else "")
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(account: RunAccount, pictures: Pictures) -> dict[str, Any]:
    """Return what the scripts work on, as a JSON value with short keys: there may be thousands of cases."""
    return {
        "classes": [[value, name] for value, name in account.class_names.items()],
        "least": account.least_quality,
        "trained": account.trained_rounds > 0,
        "cases": [_case(case, pictures) for case in account.cases],
    }


def _case(case: CaseAccount, pictures: Pictures) -> dict[str, Any]:
    return {
        "id": case.case_id,
        "human": case.role is Role.LABELLED,
        "held": case.held_out,
        "out": case.left_out,
        "conf": case.confidence,
        "px": case.case_id in pictures.blocks,
        "why": pictures.problems.get(case.case_id),
        "word": case.word,
        "q": [
            {
                "v": q.value,
                "e": _short(q.estimate),
                "s": _short(q.sam2),
                "l": _short(q.lower),
                "c": q.coverage,
                "p": q.proven,
                "m": _short(q.measured),
                "d": _short(q.change),
                "n": q.voxels,
                "x": q.distrusted,
                "g": q.expected and not q.voxels,
            }
            for q in case.classes
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _blocks(pictures: Pictures, order: Mapping[str, int]) -> Markup:
    # Base64 has no character that HTML gives a meaning to.
    return Markup(
        "\n".join(
            f'<script type="text/plain" id="px{order[case_id]}">{base64.b64encode(block).decode()}</script>'
            for case_id, block in pictures.blocks.items()
        )
    )


def _tiles(account: RunAccount) -> list[tuple[str, str, str]]:
    """Return title, figure and what is to be said to it."""
    best, gain, baseline = account.best, account.gain, account.baseline
    tiles = []
    if gain is not None and best is not None and baseline is not None:
        sign = "+" if gain >= 0 else "−"
        tiles.append(
            (
                "Gain over labelled-only",
                f"{sign}{abs(gain):.3f}",
                f"validation Dice {baseline.validation_dice:.3f} → {best.validation_dice:.3f}",
            )
        )
    elif best is not None and best.validation_dice is not None:
        tiles.append(("Validation Dice", f"{best.validation_dice:.3f}", "no labelled-only baseline"))
    else:
        why = "no round has been validated" if account.validation_cases else "no human label was held out"
        tiles.append(("Gain over labelled-only", "not measured", why))
    estimates = [q.estimate for case in account.unlabelled for q in case.classes if q.estimate is not None]
    if estimates:
        tiles.append(
            (
                "Estimated Dice of the labels",
                f"{sum(estimates) / len(estimates):.2f}",
                f"lowest {min(estimates):.2f}" + ("" if account.calibrated else ", uncalibrated"),
            )
        )
    left_out = sum(case.left_out is not None for case in account.unlabelled)
    tiles.append(
        (
            "Cases labelled",
            f"{len(account.unlabelled) - left_out} of {len(account.unlabelled)}",
            f"{left_out} left out" if left_out else "none left out",
        )
    )
    rounds = account.trained_rounds
    if best is not None:
        what = "labelled-only" if best.number == 0 else "final" if best.final else f"round {best.number}"
        tiles.append(("Best model", what, f"of {rounds} round{'s' * (rounds != 1)}, {best.configuration}"))
    tiles.append(("Time", duration(account.seconds), _span(account)))
    return tiles


def _said(account: RunAccount) -> list[tuple[str, str, str]]:
    """Return how many cases people drew, accepted or took out by now; a review counts on its own."""
    counts = Counter(case.said for case in account.unlabelled if case.said)
    parts = [f"{counts[said]} {said.value}" for said in Said if counts[said]]
    if account.waiting:
        parts.append(f"word on {account.waiting} waits for the next round")
    if not parts:
        return []
    return [("Cases with people’s word", f"{counts.total()} of {len(account.unlabelled)}", ", ".join(parts))]


def _span(account: RunAccount) -> str:
    if account.started is None or account.ended is None:
        return "in finished stages"
    same_day = account.started.date() == account.ended.date()
    return f"{account.started:%d %b %H:%M} to {account.ended:{'%H:%M' if same_day else '%d %b %H:%M'}}"


def _costs(account: RunAccount) -> list[dict[str, Any]]:
    total = account.seconds or 1.0
    return [
        {"name": c.name, "time": duration(c.seconds), "share": c.seconds / total, "stages": c.stages, "style": f"t{i}"}
        for i, c in enumerate(account.costs, start=1)
    ]


def _cost_bar(account: RunAccount) -> Markup:
    parts = [(c.name, c.seconds, f"t{i}") for i, c in enumerate(account.costs, start=1)]
    return bar(parts, title="Time by kind of stage")
