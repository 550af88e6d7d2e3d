"""What a report says of a run, as plain values: gathered by `gather`, judged by `verdict`, shown by `page`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nnunet_sam2.cohort.cohort import Role
from nnunet_sam2.report.words import Said


@dataclass(frozen=True, kw_only=True)
class ClassQuality:
    """Hold what is known of one class of one case's newest label."""

    value: int
    estimate: float | None = None
    """Estimated Dice of the newest label; None where nothing is known."""
    sam2: float | None = None
    """Estimated Dice of SAM 2's own label, from which the lower bound starts."""
    lower: float | None = None
    """Lower bound of SAM 2's Dice; holds in ``coverage`` of new cases as a rule, in ``proven`` for sure."""
    coverage: float | None = None
    proven: float | None = None
    measured: float | None = None
    """Dice with the human label of a label that had no part in it: the held-out student's, else SAM 2's."""
    change: float | None = None
    """1 - Dice to the label of the round before."""
    voxels: int = 0
    expected: bool = False
    """Whether every labelled case shows the class."""
    distrusted: bool = False
    """Whether its voxels are not learnt from, because the estimate is too low."""
    settled: bool = False
    """Whether a person drew it, accepted it, or rejected it as it is now."""

    @property
    def dice(self) -> float | None:
        """Return what is known best: the measured Dice, else the estimated one."""
        return self.estimate if self.measured is None else self.measured


@dataclass(frozen=True, kw_only=True)
class CaseAccount:
    """Hold one case: what its label is worth and what became of it."""

    case_id: str
    role: Role
    classes: tuple[ClassQuality, ...] = ()
    held_out: bool = False
    """Whether its human label serves as validation."""
    left_out: str | None = None
    """Why no round trains on it; None where one does."""
    confidence: float | None = None
    """Mean confidence of the voxels that are labelled or in doubt."""
    confident: float | None = None
    """Share of these voxels that count at least half as much as a human label's."""
    word: str = ""
    """What people said of it, as far as the newest labels know."""
    said: Said | None = None
    """What people's word makes of it by now; None where nobody said anything."""

    @property
    def worst(self) -> ClassQuality | None:
        """Return the class with the lowest Dice of those that nobody has settled, None where none of them has one."""
        known = [q for q in self.classes if q.dice is not None and not q.settled]
        return min(known, key=lambda q: q.dice or 0.0) if known else None

    @property
    def missing(self) -> tuple[int, ...]:
        """Return the classes that every labelled case shows and this one's label lacks."""
        return tuple(q.value for q in self.classes if q.expected and not q.voxels)

    @property
    def shown(self) -> tuple[int, ...]:
        """Return the classes that there is something to say of: the label shows, has lost or misses them."""
        return tuple(q.value for q in self.classes if q.voxels or q.change or q.value in self.missing)

    @property
    def decided(self) -> bool:
        """Return whether people have left nothing to look at: the case is taken out, or its every class settled."""
        if self.said in (None, Said.TAKEN_OUT):
            return self.said is not None
        return all(q.settled for q in self.classes if q.value in self.shown)

    def urgency(self) -> tuple[int, float, float, str]:
        """Return a key that sorts first what a person should look at first."""
        worst = self.worst
        dice = 1.0 if worst is None or worst.dice is None else worst.dice
        return (0 if self.left_out else 1, dice, 1.0 if self.confidence is None else self.confidence, self.case_id)


@dataclass(frozen=True, kw_only=True)
class RoundAccount:
    """Hold one round; shares and Dice values are 0 to 1."""

    number: int
    configuration: str
    final: bool = False
    """Whether it is the long training after the last round."""
    finished: bool = True
    change_mean: float | None = None
    change_worst_tenth: float | None = None
    validation_dice: float | None = None
    validation_by_class: Mapping[str, float] = field(default_factory=dict)
    """By class name."""
    volumes: Mapping[int, float] = field(default_factory=dict)
    """Mean volume of a class over the unlabelled cases, in the account's ``volume_unit``."""
    confidence: float | None = None
    confident: float | None = None
    left_out: int = 0
    distrusted: int = 0
    iterations: int | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Return what charts call it."""
        return "final" if self.final else str(self.number)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hold the time that one kind of stage took."""

    name: str
    seconds: float
    stages: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Hold what one would need to make the run again."""

    options: Mapping[str, Any] = field(default_factory=dict)
    sam2: Mapping[str, Any] = field(default_factory=dict)
    """SAM 2's record: name, hash of the checkpoint, size, origin."""
    machines: tuple[Mapping[str, Any], ...] = ()
    """Versions and machine of each process that worked on the run, where they differ."""
    report_machine: Mapping[str, Any] = field(default_factory=dict)
    """Versions and machine of the process that wrote the report."""
    inputs: tuple[tuple[str, str, str, str, str], ...] = ()
    """Case, role, patient, hash of the voxels, hash of the human label file (empty where there is none)."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the cohort came from."""
    notes: tuple[str, ...] = ()
    """What else the ledger has to say, a line an event."""


@dataclass(frozen=True, kw_only=True)
class RunAccount:
    """Hold everything that the page says of a run, but its pictures."""

    dataset: str
    run: str
    folder: str
    class_names: Mapping[int, str]
    rounds: tuple[RoundAccount, ...]
    cases: tuple[CaseAccount, ...]
    stop_reason: str | None = None
    """Value of a `StopReason`; None while the run goes on."""
    evidence: str = ""
    """What shows the reason to stop, in a sentence; empty where the reason says it all."""
    retries: tuple[str, ...] = ()
    """Stages that were tried once more after they had failed, with cause and remedy."""
    running_stage: str | None = None
    best_round: int | None = None
    mean_change_limit: float
    worst_tenth_limit: float
    least_quality: float
    round_limit: int
    validation_cases: int = 0
    calibration_cases: int = 0
    calibration_patients: int = 0
    """Bounds hold by patients, however many cases each has."""
    calibrated: bool | None = None
    """Whether labelled cases calibrated the estimates; None where there are none."""
    volume_unit: str = "mL"
    human_volumes: Mapping[int, float] = field(default_factory=dict)
    """Mean volume of a class in the human labels."""
    costs: tuple[Cost, ...] = ()
    started: datetime | None = None
    ended: datetime | None = None
    test_cases: int = 0
    waiting: int = 0
    """Cases on which people's word waits for the next round."""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def unlabelled(self) -> tuple[CaseAccount, ...]:
        """Return the cases that the run labelled."""
        return tuple(case for case in self.cases if case.role is Role.UNLABELLED)

    @property
    def trained_rounds(self) -> int:
        """Return how many rounds were trained; labelled-only and final trainings do not count."""
        return sum(r.finished and r.number > 0 and not r.final for r in self.rounds)

    @property
    def baseline(self) -> RoundAccount | None:
        """Return round 0, nnU-Net on the human labels alone, where it was trained."""
        return next((r for r in self.rounds if r.number == 0 and r.finished), None)

    @property
    def best(self) -> RoundAccount | None:
        """Return the best round."""
        return next((r for r in self.rounds if r.number == self.best_round), None)

    @property
    def gain(self) -> float | None:
        """Return the validation Dice of the best round less that of labelled-only; None where either is unknown."""
        best, baseline = self.best, self.baseline
        if best is None or baseline is None or best.validation_dice is None or baseline.validation_dice is None:
            return None
        return best.validation_dice - baseline.validation_dice

    @property
    def seconds(self) -> float:
        """Return the time of all finished stages."""
        return sum(cost.seconds for cost in self.costs)

    def look_first(self, count: int) -> list[CaseAccount]:
        """Return the unlabelled cases that a person should look at first, without those that people decided about."""
        return [case for case in self.by_urgency() if not case.decided][:count]

    def by_urgency(self) -> list[CaseAccount]:
        """Return the unlabelled cases in the order in which to look at them, what people decided about last."""
        return sorted(self.unlabelled, key=lambda case: (case.decided, *case.urgency()))
