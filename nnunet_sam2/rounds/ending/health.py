"""The loop's health, round by round: what its labels show is entered in the ledger, and a named reason ends it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.ending.collapse import Ending, Signs, confirmed_errors, label_collapse, settled_but_for_noise
from nnunet_sam2.rounds.ending.convergence import RoundOutcome, StopReason, stop_reason
from nnunet_sam2.rounds.ending.signs import human_signs, measure_signs
from nnunet_sam2.rounds.ledger import StageResult
from nnunet_sam2.rounds.pseudo_labels import Fused
from nnunet_sam2.rounds.training_stages import Student


class Health:
    """Watch one run and say when, and why, it should end."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self._labels: dict[int, Fused] = {}
        self._signs: dict[int, Signs] = {}

    def of_labels(self, number: int, labels: Fused, student: Student | None) -> Ending | None:
        """Look at a round's labels before it is trained on them."""
        options = self.run.options
        if not labels.used_cases:
            return Ending(reason=StopReason.NOTHING_TO_LABEL)
        self._labels[number] = labels
        self._signs[number] = self._measure(number, student)
        return label_collapse(
            self._signs,
            self._human,
            {n: fused.change.mean for n, fused in self._labels.items() if fused.change is not None},
            volume_drift=options.volume_drift,
            empty_rise=options.empty_rise,
            oscillation=options.oscillation,
            settled_change=options.mean_change,
        )

    def of_round(self, outcomes: Sequence[RoundOutcome]) -> Ending | None:
        """Look at a round after it was trained: its validation, its change, the limit of rounds."""
        options = self.run.options
        confirmed = confirmed_errors(outcomes, self._signs, drop=options.validation_drop)
        if confirmed is not None:
            return confirmed
        last = outcomes[-1]
        two_round_change = self._signs[last.number].two_round_change if last.number in self._signs else None
        reason = stop_reason(
            outcomes,
            round_limit=options.round_limit,
            mean_change=options.mean_change,
            worst_tenth_change=options.worst_tenth_change,
            validation_drop=options.validation_drop,
            two_round_change=two_round_change,
        )
        if reason is None:
            return None
        change = None if last.change is None or reason is not StopReason.CONVERGED else last.change.mean
        if change is not None and two_round_change is not None and change > options.mean_change:
            return settled_but_for_noise(change, two_round_change, options.mean_change)
        return Ending(reason=reason)

    def _measure(self, number: int, student: Student | None) -> Signs:
        earlier = sorted(n for n in self._labels if n < number)
        two_before = self._labels[earlier[-2]] if len(earlier) >= 2 else None

        def work() -> StageResult:
            signs = measure_signs(
                self.run.cohort,
                self._labels[number].folder,
                student=self.run.round_folder(student.number) / "student" if student else None,
                two_before=two_before.folder if two_before else None,
            )
            return StageResult(info=signs.to_json())

        inputs = {
            "labels": self._labels[number].digest,
            "student": student.digest if student else None,
            "two_before": two_before.digest if two_before else None,
        }
        done = self.run.ledger.run_stage(
            f"r{number:02d}/signs", inputs, work, what=f"labels of round {number}: volumes, missing classes, swings"
        )
        return Signs.from_json(done["info"])

    @cached_property
    def _human(self) -> Signs:
        return human_signs(self.run.cohort)
