"""Whether a run can be trusted: one sentence, its grounds, and what to look at first."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nnunet_sam2.report.account import CaseAccount, RunAccount
from nnunet_sam2.rounds.ending.convergence import StopReason

DRIFT = 0.25
"""Change of a class's mean volume since the first round from which on it is pointed out."""

UNLIKE = 0.1
"""Difference of a class's mean volume from the human labels' from which on volumes are not called steady."""

LOW_DICE = 0.7
"""Mean estimated Dice of a class below which it is pointed out."""

MANY = 0.1
"""Share of cases left out from which on they are pointed out."""


class Level(str, Enum):
    """Say how a finding is to be taken."""

    GOOD = "good"
    LOOK = "look"
    BAD = "bad"
    NOTE = "note"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Hold one ground of the verdict."""

    level: Level
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Hold what the head of the page says."""

    level: Level
    headline: str
    answer: str
    """One or two sentences: whether to trust the run."""
    findings: tuple[Finding, ...]


def judge_run(account: RunAccount) -> Verdict:
    """Judge a run by what its account holds."""
    findings = [
        found
        for found in (
            _ended(account),
            _convergence(account),
            _validation(account),
            _estimates(account),
            _used(account),
            _volumes(account),
            _missing(account),
            _retried(account),
        )
        if found is not None
    ]
    level = _level(account, findings)
    return Verdict(
        level=level, headline=_headline(account), answer=_answer(account, level, findings), findings=tuple(findings)
    )


def _level(account: RunAccount, findings: list[Finding]) -> Level:
    if account.stop_reason is None:
        return Level.NOTE
    for level in (Level.BAD, Level.LOOK):
        if any(finding.level is level for finding in findings):
            return level
    return Level.GOOD


def _headline(account: RunAccount) -> str:
    rounds = _count(account.trained_rounds, "round")
    reason = account.stop_reason
    if reason is None:
        stage = f", in stage {account.running_stage}" if account.running_stage else ", between two stages"
        return f"Not finished yet{stage}"
    if reason == StopReason.CONVERGED.value:
        return f"Converged after {rounds}"
    if reason == StopReason.ROUND_LIMIT.value:
        return f"Not converged: stopped at the limit of {rounds}"
    if reason == StopReason.VALIDATION_FELL.value:
        return f"Stopped after {rounds}: validation Dice fell"
    if reason == StopReason.NOTHING_TO_LABEL.value:
        return "Stopped: no case was left to train on"
    return f"Stopped after {rounds}: {reason}"


def _answer(account: RunAccount, level: Level, findings: list[Finding]) -> str:
    best, gain = account.best, account.gain
    parts = []
    if best is not None:
        kept = "labelled-only" if best.number == 0 else f"the final model ({best.configuration})" if best.final else ""
        parts.append(f"The best model is {kept or f'that of round {best.number}'}")
        if best.number == 0:
            tried = any(r.number > 0 and r.finished for r in account.rounds)
            parts[-1] += ": pseudo-labels brought no gain on human labels." if tried else "."
        elif gain is not None and account.baseline is not None and best.validation_dice is not None:
            word = "gains" if gain >= 0 else "loses"
            parts[-1] += (
                f"; it {word} {abs(gain):.3f} Dice over labelled-only on {_cases(account.validation_cases)} of human "
                f"validation ({account.baseline.validation_dice:.3f} to {best.validation_dice:.3f})."
            )
        else:
            parts[-1] += "; whether it gains over labelled-only was not measured."
    if account.stop_reason is None:
        parts.append("The run goes on; this page shows what is there so far.")
    elif level is Level.GOOD:
        parts.append("Nothing speaks against these labels; look at a few of the lowest estimates all the same.")
    elif level is Level.BAD:
        parts.append("Do not use these labels without going through the points below.")
    else:
        count = sum(finding.level is Level.LOOK for finding in findings)
        parts.append(f"Usable, after a look at {'one point' if count == 1 else f'{count} points'} below.")
    return " ".join(parts)


def _ended(account: RunAccount) -> Finding | None:
    reason = account.stop_reason
    expected = (StopReason.CONVERGED.value, StopReason.ROUND_LIMIT.value, StopReason.VALIDATION_FELL.value)
    if reason is None or reason in expected:
        return None
    shown = account.evidence[:1].upper() + account.evidence[1:] + ". " if account.evidence else ""
    text = shown + "The run ended for this reason and kept the best round before it."
    return Finding(level=Level.BAD, title=reason[0].upper() + reason[1:], text=text)


def _convergence(account: RunAccount) -> Finding | None:
    changed = [r for r in account.rounds if r.change_mean is not None and r.change_worst_tenth is not None]
    if not changed:
        if account.stop_reason is None:
            return Finding(level=Level.NOTE, title="Change", text="There are no two rounds to compare yet.")
        return Finding(
            level=Level.LOOK,
            title="Change",
            text="There are no two rounds to compare, so whether labels had settled is not known.",
        )
    last = changed[-1]
    mean, worst = last.change_mean or 0.0, last.change_worst_tenth or 0.0
    settled = mean <= account.mean_change_limit and worst <= account.worst_tenth_limit
    text = (
        f"In round {last.number} labels changed by {mean:.3f} on the mean (limit {account.mean_change_limit:g}) and by "
        f"{worst:.3f} in the worst tenth (limit {account.worst_tenth_limit:g})."
    )
    if len(changed) > 1 and not settled:
        before = changed[-2].change_mean or 0.0
        text += f" The round before it was {before:.3f}: {'slowing down' if mean < before else 'not slowing down'}."
    level = Level.GOOD if settled else Level.NOTE if account.stop_reason is None else Level.LOOK
    return Finding(level=level, title="Labels settled" if settled else "Labels still moved", text=text)


def _validation(account: RunAccount) -> Finding | None:
    scored = [r for r in account.rounds if r.validation_dice is not None]
    if not scored:
        if account.validation_cases:
            return None
        return Finding(
            level=Level.LOOK,
            title="No human validation",
            text="No labelled case was held out, so a fall of quality would have gone unseen. "
            "A run with -f 0 holds some out.",
        )
    by_round = ", ".join(f"{r.name}: {r.validation_dice:.3f}" for r in scored)
    text = f"Dice on {_cases(account.validation_cases)} with human labels that were held out, by round: {by_round}."
    gain, best = account.gain, account.best
    if account.stop_reason in (StopReason.VALIDATION_FELL.value, StopReason.CONFIRMATION.value):
        return Finding(level=Level.BAD, title="Validation fell", text=text)
    if best is not None and best.number == 0 and len(scored) > 1:
        return Finding(level=Level.LOOK, title="No gain over labelled-only", text=text)
    if gain is None:
        return Finding(level=Level.NOTE, title="Gain not measured", text=text + " There is no labelled-only baseline.")
    if account.validation_cases < 3:
        text += " That is few: a gain may be chance."
    return Finding(level=Level.GOOD, title="Gain on human labels", text=text)


def _estimates(account: RunAccount) -> Finding | None:
    means = {}
    for value, name in account.class_names.items():
        found = [
            q.estimate for c in account.unlabelled for q in c.classes if q.value == value and q.estimate is not None
        ]
        if found:
            means[name] = sum(found) / len(found)
    if not means:
        return Finding(
            level=Level.LOOK if account.stop_reason else Level.NOTE,
            title="No estimates",
            text="The quality of the labels was not estimated.",
        )
    text = "Mean estimated Dice: " + ", ".join(f"{name} {dice:.2f}" for name, dice in means.items())
    low = [name for name, dice in means.items() if dice < LOW_DICE]
    if not account.calibrated:
        text += "; uncalibrated, so take them as a rank order."
        return Finding(level=Level.LOOK, title="Estimates uncalibrated", text=text)
    text += f"; calibrated on {_cases(account.calibration_cases, 'labelled case')}"
    if 0 < account.calibration_patients < account.calibration_cases:
        text += f" of {_cases(account.calibration_patients, 'patient')}"
    text += f"{_promise(account)}."
    if low:
        return Finding(level=Level.LOOK, title=f"Low estimates: {', '.join(low)}", text=text)
    return Finding(level=Level.GOOD, title="Estimated quality", text=text)


def _promise(account: RunAccount) -> str:
    """Say how often lower bounds hold, and what of that is proven; of several promises the weakest."""
    promised = [
        (q.coverage, q.proven)
        for case in account.unlabelled
        for q in case.classes
        if q.coverage is not None and q.proven is not None
    ]
    if not promised:
        return ""
    coverage, proven = min(promised)
    return f". Lower bounds hold in {coverage:.0%} of new patients' cases as a rule; {proven:.0%} is proven"


def _used(account: RunAccount) -> Finding | None:
    cases = account.unlabelled
    left_out = [case for case in cases if case.left_out]
    distrusted = sum(q.distrusted for case in cases if not case.left_out for q in case.classes)
    parts = []
    if left_out:
        parts.append(f"{_count(len(left_out), 'case')} left out ({_named(left_out)})")
    if distrusted:
        parts.append(f"{_count(distrusted, 'class', 'classes')} of other cases distrusted")
    if not parts:
        if not any(q.voxels for case in cases for q in case.classes):
            return None
        return Finding(level=Level.GOOD, title="All cases used", text=f"None of {_cases(len(cases))} was left out.")
    many = cases and len(left_out) >= MANY * len(cases)
    return Finding(
        level=Level.LOOK if many else Level.NOTE,
        title=f"{len(left_out)} of {_cases(len(cases))} left out",
        text=f"{'; '.join(parts)}. Their voxels are not learnt from; the reasons stand with the cases.",
    )


def _volumes(account: RunAccount) -> Finding | None:
    rounds = [r for r in account.rounds if r.volumes]
    if len(rounds) < 2:
        return None
    unit, human = account.volume_unit, account.human_volumes
    drift = {
        value: rounds[-1].volumes.get(value, 0.0) / size - 1.0 for value, size in rounds[0].volumes.items() if size > 0
    }
    far = any(abs(change) > DRIFT for change in drift.values())
    # The humans' cases are others, and few: a difference is no drift, but nothing to call steady either.
    off = {v: rounds[-1].volumes.get(v, 0.0) / size - 1.0 for v, size in human.items() if size > 0 and v in drift}
    unlike = [value for value, change in off.items() if abs(change) > UNLIKE]
    shown = "; ".join(
        f"{account.class_names.get(value, value)} {change:+.0%} to {volume(rounds[-1].volumes.get(value), unit)}"
        + (f" (human labels {volume(human[value], unit)}" if value in human else "")
        + (f", {off[value]:+.0%})" if value in off else ")" if value in human else "")
        for value, change in drift.items()
    )
    return Finding(
        level=Level.LOOK if far else Level.NOTE if unlike else Level.GOOD,
        title="Volumes drifted" if far else "Volumes unlike the human labels'" if unlike else "Volumes steady",
        text=f"Mean volume in round {rounds[-1].name} against round {rounds[0].name}: {shown}.",
    )


def volume(value: float | None, unit: str) -> str:
    """Write a volume with three digits that count."""
    if value is None:
        return "unknown"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _missing(account: RunAccount) -> Finding | None:
    lacking = [case for case in account.unlabelled if case.missing and any(q.voxels for q in case.classes)]
    if not lacking:
        return None
    return Finding(
        level=Level.LOOK,
        title="Classes missing",
        text=f"{_count(len(lacking), 'case')} without a class that every labelled case shows: {_named(lacking)}.",
    )


def _retried(account: RunAccount) -> Finding | None:
    if not account.retries:
        return None
    times = "once" if len(account.retries) == 1 else f"{len(account.retries)} times"
    return Finding(
        level=Level.NOTE, title=f"A stage was tried again {times}", text=" ".join(f"{r}." for r in account.retries)
    )


def _named(cases: list[CaseAccount]) -> str:
    shown = ", ".join(case.case_id for case in cases[:3])
    return shown + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")


def _cases(count: int, noun: str = "case") -> str:
    return _count(count, noun)


def _count(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
