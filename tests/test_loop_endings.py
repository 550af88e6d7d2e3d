"""Every way in which a loop can end has a name: the real loop, with labels and students that follow a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import StageError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds import orchestrator
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.ending.convergence import class_change, summarise_change
from nnunet_sam2.rounds.ledger import LEDGER_FILE, StageResult, read_events
from nnunet_sam2.rounds.lock import OWNER_FILE
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.pseudo_labels import Fused
from nnunet_sam2.rounds.state import RunState, run_folder
from nnunet_sam2.rounds.training_stages import Student
from nnunet_sam2.storage import write_json
from nnunet_sam2.volumes import read_label, write_label

Labels = Callable[[int], np.ndarray]


def ball(shape_zyx: tuple[int, ...], radius: float, shift: int = 0) -> np.ndarray:
    """Draw class 1 as a ball and class 2 as a smaller one beside it."""
    z, y, x = np.indices(shape_zyx) - np.reshape([n // 2 for n in shape_zyx], (3, 1, 1, 1))
    label = ((z**2 + y**2 + (x - shift) ** 2) < radius**2).astype(np.uint8)
    label[(z**2 + (y - 12) ** 2 + x**2) < 16] = 2
    return label


class ScriptedTraining:
    """Stand in for nnU-Net: validation by script, predictions that are the labels of the round."""

    def __init__(self, run: RunContext, dices: dict[int, float], labels: Labels) -> None:
        self.run, self.dices, self.labels = run, dices, labels
        self.trained: list[int] = []

    def prepare(self) -> None:
        ids = [c.case_id for c in self.run.cohort.labelled]
        folds = [{"train": ids[1:], "val": ids[:1]}]
        self.run.ledger.run_stage("setup/plan", {}, lambda: StageResult(info={"folds": folds}), what="plan")

    def make_data(
        self, number: int, *, labels: Fused | None, warm_start: Student | None = None, final: bool = False
    ) -> None:
        name = self.run.configuration_name(number, final=final)
        info = {"round": number, "configuration": name, "final": final}
        self.run.ledger.run_stage(f"r{number:02d}/data", {}, lambda: StageResult(info=info), what="data")

    def train(self, number: int, *, warm_start: Student | None, final: bool = False) -> Student:
        dice = self.dices.get(number, 0.8)
        info = {"validation_dice": dice, "validation_by_class": {}, "iterations": 1}
        self.run.ledger.run_stage(f"r{number:02d}/train", {}, lambda: StageResult(info=info), what="train")
        self.trained.append(number)
        return Student(
            number=number,
            configuration=f"r{number:02d}",
            checkpoint=Path("nowhere"),
            validation_dice=dice,
            digest=str(number),
        )

    def predict(self, student: Student) -> None:
        for case in self.run.cohort.unlabelled:
            path = self.run.round_folder(student.number) / "student" / f"{case.case_id}.nii.gz"
            write_label(path, self.labels(student.number), case.geometry)


class ScriptedLabelling:
    """Stand in for SAM 2 and fusion: a round's labels by script."""

    def __init__(self, run: RunContext, labels: Labels) -> None:
        self.run, self.labels = run, labels

    def label_from_supports(self, number: int = 0, holds: Any = None) -> None:
        return None

    def refine(self, number: int, student: Student) -> None:
        return None

    def fuse(self, number: int, supports: Any, student: Any, refined: Any, *, previous: Any, holds: Any) -> Fused:
        folder = self.run.round_folder(number) / "labels"
        label, changes, used = self.labels(number), {}, []
        for case in self.run.cohort.unlabelled:
            name = f"{case.case_id}.nii.gz"
            write_label(folder / name, label, case.geometry)
            used += [case.case_id] if label.any() else []
            if previous is not None:
                changes[case.case_id] = class_change(read_label(previous.folder / name)[0], label, (1, 2))
        change = summarise_change(changes) if previous is not None else None
        info = {"round": number, "change": change and vars(change)}
        self.run.ledger.run_stage(f"r{number:02d}/fuse", {}, lambda: StageResult(info=info), what="fuse")
        return Fused(
            folder=folder,
            used_cases=tuple(used),
            left_out={},
            change=change,
            quality={},
            voxels={},
            confidence={},
            digest=str(number),
        )

    def finish(self, best: Student, supports: Any, *, holds: Any) -> None:
        return None


@pytest.fixture
def ended(fresh_dataset: DatasetFolders, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunState]:
    """Run the loop with scripted labels (of a round, on the cohort's grid) and validation Dice."""
    shape = Cohort.load(fresh_dataset.raw).unlabelled[0].geometry.shape_zyx

    def run(
        labels: Callable[[tuple[int, ...], int], np.ndarray], dices: dict[int, float] | None = None, **options: Any
    ) -> RunState:
        def of_round(number: int) -> np.ndarray:
            return labels(shape, number)

        monkeypatch.setattr(orchestrator, "load_labeller", lambda options, cache_dir: None)
        monkeypatch.setattr(orchestrator, "Room", lambda run: SimpleNamespace(require=lambda stage: None))
        monkeypatch.setattr(orchestrator, "LabellingStages", lambda run: ScriptedLabelling(run, of_round))
        monkeypatch.setattr(orchestrator, "TrainingStages", lambda run: ScriptedTraining(run, dices or {}, of_round))
        settings = {"profile": "cpu", "sam2": "untrained", "device": "cpu", **options}
        return orchestrator.run_loop(fresh_dataset, RunOptions(**settings))

    return run


def test_labels_that_settle_have_converged(ended: Callable[..., RunState]) -> None:
    state = ended(lambda shape, number: ball(shape, 5.0))
    assert (state.stop_reason, state.best_round) == ("converged", 2)
    assert state.evidence == {}


def test_labels_that_only_jitter_about_a_point_have_converged_and_the_run_says_how_it_knows(
    ended: Callable[..., RunState],
) -> None:
    def jittering(shape: tuple[int, ...], number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        label = ball(shape, 5.0)
        return np.where(rng.random(shape) < 0.02, 1 - np.minimum(label, 1), label).astype(label.dtype)

    state = ended(jittering, round_limit=5)
    assert state.stop_reason == "converged"
    assert "move by no more than 0.01 a round" in state.evidence["text"]


def test_a_run_that_goes_on_after_a_killed_process_says_so(
    ended: Callable[..., RunState], fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = run_folder(fresh_dataset, RunOptions().run_name) / OWNER_FILE
    write_json(entry, {"pid": 2**22 + 5, "host": "here", "started": 1.0})
    ended(lambda shape, number: ball(shape, 5.0))
    assert "process 4194309 on here ended in the middle of this run" in capsys.readouterr().out
    assert not entry.exists()


def test_nothing_converges_in_its_first_round(ended: Callable[..., RunState]) -> None:
    """The first labels have nothing to be compared with, so the second round is the first that can have settled."""
    state = ended(lambda shape, number: ball(shape, 5.0), round_limit=1)
    assert state.stop_reason == "round limit"
    assert [r.change_mean for r in state.rounds] == [None, None]


def test_labels_that_never_settle_end_at_the_limit(ended: Callable[..., RunState]) -> None:
    state = ended(lambda shape, number: ball(shape, 5.0, shift=3 * number), round_limit=4)
    assert state.stop_reason == "round limit"


def test_labels_that_swing_between_two_states_oscillate(ended: Callable[..., RunState]) -> None:
    state = ended(lambda shape, number: ball(shape, 5.0, shift=4 * (number % 2)), {1: 0.82})
    assert (state.stop_reason, state.best_round) == ("labels oscillate", 1)
    assert state.evidence["two_round_change"] == 0.0
    assert "limit: 0.5" in state.evidence["text"]


def test_labels_that_shrink_to_nothing_are_a_drift_before_they_are_empty(ended: Callable[..., RunState]) -> None:
    state = ended(lambda shape, number: ball(shape, 6.0 - 1.3 * number))
    assert state.stop_reason == "volumes drift"
    assert state.evidence["class"] == 1
    assert state.evidence["mm3"] < state.evidence["first_round"] / 2


def test_a_class_that_vanishes_ends_the_loop_by_its_name(ended: Callable[..., RunState]) -> None:
    state = ended(
        lambda shape, number: ball(shape, 5.0, shift=2 * number) * (ball(shape, 5.0) < 2 if number > 1 else 1)
    )
    assert state.stop_reason == "a class vanishes"
    assert state.evidence["class"] == 2
    assert state.rounds[-1].number == 2
    assert not state.rounds[-1].finished  # its labels were not trained on
    assert state.best_round == 1


def test_labels_that_are_empty_leave_nothing_to_label(ended: Callable[..., RunState]) -> None:
    state = ended(lambda shape, number: np.zeros(shape, np.uint8))
    assert (state.stop_reason, state.best_round) == ("nothing to label", 0)


def test_empty_labels_without_a_baseline_are_an_error_with_its_reason(ended: Callable[..., RunState]) -> None:
    with pytest.raises(StageError, match=r"nothing to label.*without --skip-baseline"):
        ended(lambda shape, number: np.zeros(shape, np.uint8), skip_baseline=True)


def test_validation_that_falls_while_labels_follow_the_student_is_confirmation(
    ended: Callable[..., RunState],
) -> None:
    def closer_and_closer(shape: tuple[int, ...], number: int) -> np.ndarray:
        return ball(shape, 5.0, shift=(6, 3, 1, 0)[number])

    state = ended(closer_and_closer, {0: 0.80, 1: 0.85, 2: 0.84, 3: 0.79})
    assert (state.stop_reason, state.best_round) == ("errors are confirmed", 1)
    assert state.evidence["validation_dice"][-1] == 0.79


def test_an_end_and_its_evidence_are_in_the_ledger_and_shown_by_status(
    ended: Callable[..., RunState], capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunet_sam2.cli.main import main

    state = ended(lambda shape, number: ball(shape, 5.0, shift=4 * (number % 2)))
    stopped = read_events(state.folder / LEDGER_FILE)[-1]
    assert stopped["event"] == "stopped"
    assert stopped["evidence"]["limit"] == 0.5
    assert main(["status", "-d", "501"]) == 0
    shown = capsys.readouterr().out
    assert "stopped: labels oscillate" in shown
    assert "evidence: labels are" in shown
