"""People's word in a loop: the real orchestrator and fusion, with a student and a SAM 2 that follow a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort, Role
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.rounds import labelling_stages, orchestrator
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import Holds
from nnunet_sam2.rounds.decisions.labels import TAKEN_OUT
from nnunet_sam2.rounds.decisions.record import Decision, DecisionFile, accepted_path
from nnunet_sam2.rounds.labelling_stages import LabellingStages
from nnunet_sam2.rounds.ledger import LEDGER_FILE, StageResult, read_events
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.pseudo_labels import Fused
from nnunet_sam2.rounds.state import RunState, run_folder
from nnunet_sam2.rounds.support_labels import SupportLabels
from nnunet_sam2.rounds.training_stages import Student
from nnunet_sam2.storage import file_hash
from nnunet_sam2.support.library import PROBABILITIES, write_probabilities
from nnunet_sam2.volumes import read_label, read_map, write_label

FIRST, SECOND = "subject_003", "subject_004"


def _drawn(shape_zyx: tuple[int, ...], shift: int = 0) -> np.ndarray:
    label = np.zeros(shape_zyx, np.uint8)
    label[3:8, 8:20, 8 + shift : 20 + shift] = 1
    label[4:7, 24:32, 24:32] = 2
    return label


def _write_source(run: RunContext, out: Path) -> None:
    for case in (*run.cohort.unlabelled, *run.cohort.labelled):
        label = _drawn(case.geometry.shape_zyx)
        write_label(out / f"{case.case_id}.nii.gz", label, case.geometry)
        one_hot = np.stack([label == value for value in (0, 1, 2)]).astype(np.float32)
        write_probabilities(out / PROBABILITIES / f"{case.case_id}.npz", 0.85 * one_hot + 0.05)


class Training:
    """Stand in for nnU-Net: its predictions are always the same, and what it was given is remembered."""

    given: dict[int, Fused | None]
    configurations: dict[int, str]

    def __init__(self, run: RunContext, story: Story) -> None:
        self.run, self.story = run, story

    def prepare(self) -> None:
        folds = make_splits(self.run.cohort)
        self.run.ledger.run_stage("setup/plan", {}, lambda: StageResult(info={"folds": folds}), what="plan")

    def make_data(
        self, number: int, *, labels: Fused | None, warm_start: Student | None = None, final: bool = False
    ) -> None:
        self.story.given[number] = labels
        self.story.started[number] = warm_start.number if warm_start else None
        self.story.names[number] = name = self.run.configuration_name(number, final=final)
        self.story.before_data(number)
        inputs = {"labels": labels and labels.digest}
        info = {"round": number, "configuration": name, "final": final}
        self.run.ledger.run_stage(f"r{number:02d}/data", inputs, lambda: StageResult(info=info), what="data")

    def train(self, number: int, *, warm_start: Student | None, final: bool = False) -> Student:
        self.story.trained.append(number)
        info = {"validation_dice": 0.8, "validation_by_class": {}, "iterations": 1}
        inputs = {"data": self.run.digest(f"r{number:02d}/data")}
        event = self.run.ledger.run_stage(f"r{number:02d}/train", inputs, lambda: StageResult(info=info), what="train")
        return Student(
            number=number,
            configuration=f"r{number:02d}",
            checkpoint=Path("nowhere"),
            validation_dice=0.8,
            digest=event["digest"],
        )

    def predict(self, student: Student) -> None:
        _write_source(self.run, self.run.round_folder(student.number) / "student")


class Labelling(LabellingStages):
    """The real fusion of a round, of what SAM 2 would have drawn."""

    drawn: dict[int, list[str]]

    def label_from_supports(self, number: int = 0, holds: Holds | None = None) -> SupportLabels:
        self.drawn[number] = [case_id for case_id, hold in (holds or {}).items() if hold.whole_human]
        _write_source(self.run, self.run.folder / "sam2" / "unlabelled")
        return SupportLabels(
            folder=self.run.folder / "sam2" / "unlabelled",
            labelled=self.run.folder / "sam2" / "unlabelled",
            checked=tuple(c.case_id for c in self.run.cohort.labelled),
            quality={1: 0.8, 2: 0.8},
            estimates={c.case_id: {1: 0.8, 2: 0.8} for c in self.run.cohort.unlabelled},
            calibration=Calibration(class_values=self.run.cohort.class_values),
            digest="sam2",
        )

    def refine(self, number: int, student: Student) -> None:
        return None

    def judge(self, student: Student) -> str:
        return student.digest


class Story:
    """Run the loop on a dataset, as often as one likes, and remember what was trained on what."""

    def __init__(self, folders: DatasetFolders, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders = folders
        self.given: dict[int, Fused | None] = {}
        self.names: dict[int, str] = {}
        self.started: dict[int, int | None] = {}
        self.trained: list[int] = []
        self.before_data: Callable[[int], object] = lambda number: None
        monkeypatch.setattr(orchestrator, "load_labeller", lambda options, cache_dir: None)
        monkeypatch.setattr(orchestrator, "Room", lambda run: SimpleNamespace(require=lambda stage: None))
        monkeypatch.setattr(orchestrator, "LabellingStages", Labelling)
        monkeypatch.setattr(Labelling, "drawn", {}, raising=False)
        monkeypatch.setattr(orchestrator, "TrainingStages", lambda run: Training(run, self))
        monkeypatch.setattr(labelling_stages, "read_folder", lambda folder, cases: {})

    @property
    def run(self) -> Path:
        return run_folder(self.folders, RunOptions().run_name)

    def go(self, **options: Any) -> RunState:
        self.trained.clear()
        settings: dict[str, Any] = {"profile": "cpu", "sam2": "untrained", "device": "cpu", **options}
        return orchestrator.run_loop(self.folders, RunOptions(**settings))

    def say(self, decision: Decision, case_id: str = "", *classes: int, seen: str = "r02", **values: Any) -> None:
        """Decide as the review does: what is accepted is kept as it was seen."""
        path = self.run / seen / "labels" / f"{case_id}.nii.gz"
        label = file_hash(path) if case_id else ""
        if decision is Decision.ACCEPT:
            kept = accepted_path(self.run, case_id, label, ".nii.gz")
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(path.read_bytes())
        with DecisionFile(self.run) as file:
            file.append(decision, case_id=case_id, classes=classes, label=label, **values)

    def label(self, number: int, case_id: str) -> np.ndarray:
        return read_label(self.run / f"r{number:02d}" / "labels" / f"{case_id}.nii.gz")[0]

    def confidence(self, number: int, case_id: str) -> np.ndarray:
        return read_map(self.run / f"r{number:02d}" / "labels" / "confidence" / f"{case_id}.nii.gz")[0]

    def used(self, number: int) -> tuple[str, ...]:
        labels = self.given[number]
        assert labels is not None
        return labels.used_cases

    def reviews(self) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run / LEDGER_FILE) if event["event"] == "review"]


@pytest.fixture
def story(fresh_dataset: DatasetFolders, monkeypatch: pytest.MonkeyPatch) -> Story:
    """A run that has converged in its second round."""
    story = Story(fresh_dataset, monkeypatch)
    state = story.go()
    assert (state.stop_reason, story.trained) == ("converged", [0, 1, 2])
    return story


def test_a_run_that_had_ended_goes_on_with_a_round_in_which_decisions_hold(story: Story) -> None:
    before = {path: file_hash(path) for path in story.run.rglob("r0[12]/labels/**/*.nii.gz")}
    story.say(Decision.ACCEPT, FIRST, 1)
    story.say(Decision.REJECT, FIRST, 2)
    story.say(Decision.TAKE_OUT, SECOND)
    state = story.go()
    assert state.stop_reason == "converged"
    assert story.trained == [0, 1, 2, 3]
    label, confidence = story.label(3, FIRST), story.confidence(3, FIRST)
    np.testing.assert_array_equal(label == 1, story.label(2, FIRST) == 1)
    assert confidence[label == 1].min() == 1
    assert confidence[label == 2].max() == 0
    assert story.confidence(2, FIRST)[label == 2].min() > 0
    assert story.used(3) == (FIRST,)
    labels = story.given[3]
    assert labels is not None
    assert labels.left_out == {SECOND: TAKEN_OUT}
    assert labels.distrusted == {FIRST: (2,)}
    (review,) = story.reviews()
    assert review["round"] == 3
    told = [(d["decision"], d["case"], d["classes"]) for d in review["decisions"]]
    assert told == [("accept", FIRST, [1]), ("reject", FIRST, [2]), ("take out", SECOND, [])]
    assert {path: file_hash(path) for path in before} == before
    # The final labels know it too, and the same command again has nothing left to do.
    np.testing.assert_array_equal(read_map(story.run / "labels" / "confidence" / f"{FIRST}.nii.gz")[0][label == 2], 0)
    events = len(read_events(story.run / LEDGER_FILE))
    story.go()
    again = read_events(story.run / LEDGER_FILE)[events:]
    assert {event["event"] for event in again} <= {"stopped"}


def test_status_says_on_how_many_cases_peoples_word_waits_for_the_next_round(
    story: Story, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits() -> list[str]:
        capsys.readouterr()
        assert main(["status", "-d", "501"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "people's word" in line]

    assert waits() == []
    story.say(Decision.ACCEPT, FIRST, 1)
    story.say(Decision.REJECT, FIRST, 2)
    story.say(Decision.TAKE_OUT, SECOND)
    assert "on 2 cases waits for the next round" in waits()[0]
    story.say(Decision.UNDO, undoes=3)
    assert "on 1 case waits for the next round" in waits()[0]
    story.go()
    assert waits() == []
    with DecisionFile(story.run) as file:  # a newer label of the same class: no round follows from it
        file.append(Decision.REJECT, case_id=FIRST, classes=(2,), label="ab" * 32)
    assert waits() == []
    before = len(read_events(story.run / LEDGER_FILE))
    story.go()
    assert {event["event"] for event in read_events(story.run / LEDGER_FILE)[before:]} <= {"stopped"}


def test_an_undone_decision_gives_one_round_more_without_it(story: Story) -> None:
    story.say(Decision.TAKE_OUT, SECOND)
    story.go()
    assert story.used(3) == (FIRST,)
    story.say(Decision.UNDO, undoes=1)
    story.go()
    assert story.trained[-1] == 4
    assert story.used(4) == (FIRST, SECOND)
    # What held in round 3 stays what it was.
    assert story.used(3) == (FIRST,)


def test_a_decision_made_while_a_round_goes_on_holds_in_the_next_and_there_is_a_next(
    fresh_dataset: DatasetFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(fresh_dataset, monkeypatch)
    story.before_data = lambda number: story.say(Decision.TAKE_OUT, SECOND) if number == 2 else None
    story.go(round_limit=2)
    assert story.trained == [0, 1, 2, 3]
    assert (story.used(2), story.used(3)) == ((FIRST, SECOND), (FIRST,))


def test_a_round_that_was_killed_keeps_what_it_began_with(story: Story) -> None:
    story.say(Decision.TAKE_OUT, SECOND)

    def die(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    story.before_data = die
    with pytest.raises(KeyboardInterrupt):
        story.go()
    story.before_data = lambda number: None
    story.say(Decision.TAKE_OUT, FIRST)
    story.say(Decision.CLEAR, SECOND)
    story.go()
    assert (story.used(3), story.used(4)) == ((FIRST,), (SECOND,))
    assert [review["round"] for review in story.reviews()] == [3, 4]


def test_a_round_that_lacks_an_accepted_label_can_be_decided_anew(story: Story) -> None:
    story.say(Decision.ACCEPT, FIRST, 1)
    (kept,) = (story.run / "review" / "accepted").iterdir()
    kept.unlink()
    for _ in range(2):
        with pytest.raises(InputError, match="or decide about the case anew"):
            story.go()
    story.say(Decision.REJECT, FIRST, 1)
    story.go()
    labels = story.given[3]
    assert labels is not None
    assert labels.distrusted == {FIRST: (1,)}


def test_a_case_that_people_took_out_altogether_can_come_back(story: Story) -> None:
    for case_id in (FIRST, SECOND):
        story.say(Decision.TAKE_OUT, case_id)
    state = story.go()
    assert state.stop_reason == "nothing to label"
    story.say(Decision.ACCEPT, FIRST, 1, 2)
    story.go()
    assert story.used(4) == (FIRST,)
    assert story.confidence(4, FIRST).min() == 1


def test_a_corrected_label_is_a_human_one_from_the_next_round_on_and_is_never_validated_on(
    story: Story, tmp_path: Path
) -> None:
    cohort = Cohort.load(story.folders.raw)
    case = cohort.case(FIRST)
    mine = _drawn(case.geometry.shape_zyx, shift=5)
    write_label(tmp_path / f"{FIRST}.nii.gz", mine, case.geometry)
    machine = file_hash(story.run / "r02" / "labels" / f"{FIRST}.nii.gz")
    ((_, kept),) = take_in(story.folders.raw, [tmp_path / f"{FIRST}.nii.gz"])
    assert Cohort.load(story.folders.raw).case(FIRST).role is Role.LABELLED
    story.go()
    assert story.trained[-1] in (3, 4)  # the label has moved, so that it may take a round to settle
    np.testing.assert_array_equal(story.label(3, FIRST), mine)
    assert story.confidence(3, FIRST).min() == 1
    labels = story.given[3]
    assert labels is not None
    assert labels.human_cases == (FIRST,)
    assert {n: Labelling.drawn[n] for n in (0, 1, 2, 3)} == {0: [], 1: [], 2: [], 3: [FIRST]}
    assert file_hash(story.run / "r02" / "labels" / f"{FIRST}.nii.gz") == machine
    np.testing.assert_array_equal(read_label(kept)[0], mine)
    assert make_splits(Cohort.load(story.folders.raw)) == make_splits(cohort)
    assert [review["round"] for review in story.reviews()] == [3]


def test_a_new_run_learns_a_corrected_label_at_once_and_prompts_sam_2_with_it(story: Story, tmp_path: Path) -> None:
    case = Cohort.load(story.folders.raw).case(FIRST)
    write_label(tmp_path / f"{FIRST}.nii.gz", _drawn(case.geometry.shape_zyx), case.geometry)
    take_in(story.folders.raw, [tmp_path / f"{FIRST}.nii.gz"])
    seen: list[list[str]] = []
    story.before_data = lambda number: None
    original = Labelling.label_from_supports

    def remember(self: Labelling, number: int = 0, holds: Holds | None = None) -> SupportLabels:
        seen.append(self.run.support_ids)
        assert self.run.support_cohort().case(FIRST).role is Role.LABELLED
        assert self.run.cohort.case(FIRST).role is Role.UNLABELLED
        return original(self, number, holds)

    Labelling.label_from_supports = remember  # type: ignore[method-assign]
    try:
        story.go(branch="second")
    finally:
        Labelling.label_from_supports = original  # type: ignore[method-assign]
    assert FIRST in seen[0]
    labels = story.given[1]
    assert labels is not None
    assert labels.human_cases == (FIRST,)
    assert story.given[0] is None


@pytest.mark.parametrize(("start", "from_round"), [("warm", 2), ("scratch", None)])
def test_the_last_training_learns_from_labels_that_the_best_round_had_a_part_in(
    start: str, from_round: int | None, fresh_dataset: DatasetFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(fresh_dataset, monkeypatch)
    story.go(final_epochs=1, final_start=start)
    rounds, final = story.given[2], story.given[3]
    assert rounds is not None
    assert final is not None
    assert final.folder == story.run / "r03" / "labels"
    assert final.digest != rounds.digest
    assert story.started[3] == from_round


def test_a_second_final_training_has_a_number_and_a_name_of_its_own(
    fresh_dataset: DatasetFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(fresh_dataset, monkeypatch)
    story.go(final_epochs=1)
    assert (story.trained, story.names[3]) == ([0, 1, 2, 3], "3d_fullres_final")
    story.say(Decision.REJECT, FIRST, 1)
    state = story.go(final_epochs=1)
    assert story.trained == [0, 1, 2, 4, 5]
    assert (story.names[4], story.names[5]) == ("3d_fullres_r04", "3d_fullres_final2")
    final = story.given[5]
    assert final is not None
    assert final.distrusted == {FIRST: (1,)}
    assert [r.number for r in state.rounds] == [0, 1, 2, 3, 4, 5]
    before = len(read_events(story.run / LEDGER_FILE))
    story.go(final_epochs=1)
    assert story.trained == [0, 1, 2, 4, 5]
    assert {event["event"] for event in read_events(story.run / LEDGER_FILE)[before:]} <= {"stopped"}
