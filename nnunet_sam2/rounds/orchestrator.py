"""The loop, to be read like a method section: labels, training, prediction, again until the labels stop changing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.integrity import check_unchanged
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import say
from nnunet_sam2.provenance import provenance
from nnunet_sam2.rounds.context import RunContext, load_labeller, refuse_other_weights
from nnunet_sam2.rounds.decisions.round_review import RoundReview
from nnunet_sam2.rounds.ending.collapse import Ending
from nnunet_sam2.rounds.ending.convergence import RoundOutcome, best_round, kept_round
from nnunet_sam2.rounds.ending.health import Health
from nnunet_sam2.rounds.labelling_stages import LabellingStages
from nnunet_sam2.rounds.ledger import LEDGER_FILE, Ledger
from nnunet_sam2.rounds.lock import only_run
from nnunet_sam2.rounds.nnunet import PLANNERS, PLANS, plans_path, read_plans, require_pretrained
from nnunet_sam2.rounds.nnunet.plan import SPLITS_FILE
from nnunet_sam2.rounds.options import RunOptions, describe_difference
from nnunet_sam2.rounds.pseudo_labels import Fused
from nnunet_sam2.rounds.room import Room
from nnunet_sam2.rounds.state import RunState, read_state, run_folder, state_of_events
from nnunet_sam2.rounds.training_stages import Student, TrainingStages
from nnunet_sam2.storage import read_json, remove_temporary_files
from nnunet_sam2.support.showing import told_orientations
from nnunet_sam2.trainers.settings import SETTINGS_KEY

PLANNED_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
"""What nnU-Net's planner may offer, as long as there are no plans to ask."""

Report = Callable[[bool], object]
"""Called with False after a round and with True at the end; it must not raise."""


def run_loop(folders: DatasetFolders, options: RunOptions, *, report: Report | None = None) -> RunState:
    """Run the loop to its end, or continue one that was stopped; return its state.

    ``report`` is called after every round that did something, and at the end.

    Raises InputError where the cohort or the options cannot give a run, StageError where a stage fails. Whatever was
    finished before is kept, and the same call continues.
    """
    # Human labels that came later join by the rounds' reviews: what was planned and done without them stays valid.
    cohort = Cohort.load(folders.raw).as_planned()
    folder = run_folder(folders, options.run_name)
    refuse_unusable(folders, cohort, options)
    check_unchanged(cohort)
    if stored := told_orientations(cohort):
        say(f"note: {stored}")
    if not (folder / LEDGER_FILE).is_file():
        load_labeller(options, cache_dir=None)
    with only_run(folder) as left:
        if left is not None:
            say(f"process {left.pid} on {left.host} ended in the middle of this run; going on from what it finished")
        ledger = Ledger(folder)
        _remember_options(ledger, folder, options)
        _remember_machine(ledger, options)
        remove_temporary_files(folder)
        run = RunContext(folders=folders, cohort=cohort, options=options, ledger=ledger, folder=folder)
        refuse_other_weights(run)
        ledger.before_stage = Room(run).require
        _alternate(run, report or (lambda finished: None))
    return read_state(folders, options.run_name)


def _alternate(run: RunContext, report: Report) -> None:
    options, sam2, nnunet, review = run.options, LabellingStages(run), TrainingStages(run), RoundReview(run)
    health = Health(run)
    known = _stages_done(run.ledger)
    nnunet.prepare()
    support_labels = sam2.label_from_supports()

    outcomes: list[RoundOutcome] = []
    student: Student | None = None
    labels: Fused | None = None
    students: dict[int, Student] = {}
    if not options.skip_baseline:
        nnunet.make_data(0, labels=None)
        student = students[0] = nnunet.train(0, warm_start=None)
        outcomes.append(RoundOutcome(number=0, change=None, validation_dice=student.validation_dice))
        if _stages_done(run.ledger) > known:
            report(False)

    ending: Ending | None = None
    number = 0
    while ending is None:
        number = run.next_number(number)
        known = _stages_done(run.ledger)
        if student is not None:
            nnunet.predict(student)
        refined = sam2.refine(number, student) if student is not None and number > 1 else None
        holds = review.of(number)
        support_labels = sam2.label_from_supports(number, holds)
        labels = sam2.fuse(number, support_labels, student, refined, previous=labels, holds=holds)
        ending = health.of_labels(number, labels, student)
        if ending is None:
            nnunet.make_data(number, labels=labels, warm_start=student)
            student = students[number] = nnunet.train(number, warm_start=student)
            outcomes.append(RoundOutcome(number=number, change=labels.change, validation_dice=student.validation_dice))
            say(_describe(outcomes[-1], options))
            if _stages_done(run.ledger) > known:
                report(False)
            ending = health.of_round(outcomes)
        if ending is not None and review.more_after(number):
            say(f"{ending.reason.value}, but people have had their word since round {number} began: another follows")
            ending = None
    if not outcomes:
        raise StageError(
            f"no round was trained ({ending.reason.value}) and there is no baseline to go on with; "
            "look at the labels with nnunet_sam2 label, or run without --skip-baseline"
        )
    since = review.since(number)
    best = kept_round(outcomes, since=since, drop=options.validation_drop)
    if best < since <= outcomes[-1].number:
        say(f"the model of round {best} is kept: those that know people's word are worse on the held-out labels")

    if options.has_final and best > 0:
        # one long training on the labels that the best model so far gives: the rounds were too short for what they knew
        last = run.next_number(number, final=True)
        nnunet.predict(students[best])
        refined = sam2.refine(last, students[best])
        final = sam2.fuse(last, support_labels, students[best], refined, previous=labels, holds=review.of(number))
        start = students[best] if options.starts_final_warm else None
        nnunet.make_data(last, labels=final, warm_start=start, final=True)
        students[last] = nnunet.train(last, warm_start=start, final=True)
        outcomes.append(RoundOutcome(number=last, change=None, validation_dice=students[last].validation_dice))
        best = best_round([o for o in outcomes if o.number in (best, last)])

    nnunet.predict(students[best])
    sam2.finish(students[best], support_labels, holds=review.of(number))
    run.ledger.append(
        "stopped",
        reason=ending.reason.value,
        evidence=ending.evidence,
        best_round=best,
        validation_watched=outcomes[-1].validation_dice is not None,
    )
    report(True)


def _describe(outcome: RoundOutcome, options: RunOptions) -> str:
    parts = [f"round {outcome.number}:"]
    if outcome.change is not None:
        parts.append(
            f"labels changed by {outcome.change.mean:.3f} on the mean (stops at {options.mean_change:g}) and "
            f"{outcome.change.worst_tenth:.3f} in the worst tenth ({options.worst_tenth_change:g});"
        )
    if outcome.validation_dice is None:
        parts.append("no held-out human label, so a fall of quality would go unseen")
    else:
        parts.append(f"validation Dice {outcome.validation_dice:.3f}")
    return " ".join(parts)


def refuse_unusable(folders: DatasetFolders, cohort: Cohort, options: RunOptions) -> None:
    where = cohort.root
    if not cohort.labelled:
        raise InputError(f"{where} has no labelled case; convert at least one image with its label")
    if not cohort.unlabelled:
        raise InputError(f"{where} has no unlabelled case, so there is nothing to label; add images without labels")
    known = list(PLANNED_CONFIGURATIONS)
    if plans_path(folders, options.plans).is_file():
        plans = read_plans(folders, options.plans)
        known = [name for name, c in plans["configurations"].items() if SETTINGS_KEY not in c]
    elif options.plans not in (PLANS, *PLANNERS):
        raise InputError(
            f"-p {options.plans}: {plans_path(folders, options.plans)} does not exist, and it is no preset that is "
            f"planned here ({', '.join((PLANS, *PLANNERS))}); plan it with nnUNetv2_plan_experiment first"
        )
    if options.pretrained is not None:
        require_pretrained(Path(options.pretrained))
    if options.configuration not in known:
        raise InputError(f"-c {options.configuration}: no such nnU-Net configuration; choose one of {', '.join(known)}")
    if options.fold == "all":
        say(
            "fold 'all': no labelled case is held out, so a fall of quality cannot be seen, "
            "and no post-processing is decided"
        )
        return
    splits = folders.preprocessed / SPLITS_FILE
    folds = len(read_json(splits) if splits.is_file() else make_splits(cohort))
    if int(options.fold) >= folds:
        way_out = f"choose one of 0 to {folds - 1}, or -f all" if folds else "give -f all, which has no validation"
        raise InputError(
            f"-f {options.fold}: the labelled cases of {cohort.name} ({len(cohort.labelled)}, by patient) "
            f"give {folds} folds; {way_out}"
        )


def refuse_other_options(folder: Path, events: Sequence[dict[str, Any]], options: RunOptions) -> None:
    """Refuse to continue a run with options that give another result, or with more rounds after its final training."""
    before = state_of_events(folder, events).options
    if not before:
        return
    started = RunOptions.from_json(before, where=folder / LEDGER_FILE)
    known = started.identity()
    dataset = next((int(part[7:10]) for part in folder.parts[::-1] if re.match(r"Dataset\d{3}_", part)), 0)
    beside = replace(options, branch="NAME").command(dataset)
    if known != options.identity():
        raise InputError(
            f"{folder} was started with other options ({describe_difference(known, options.identity())}); "
            f"give the old ones to continue: {started.command(dataset)}, or --branch NAME for a new run beside it: "
            f"{beside}"
        )
    ended = any(event["event"] == "stopped" for event in events)
    if before["round_limit"] != options.round_limit and options.has_final and ended:
        raise InputError(
            f"{folder} has had its final training, so --rounds can no longer change; give --branch NAME for a new run: "
            f"{beside}"
        )


def _remember_options(ledger: Ledger, folder: Path, options: RunOptions) -> None:
    refuse_other_options(folder, ledger.events, options)
    if state_of_events(folder, ledger.events).options != options.to_json():
        ledger.append("run", options=options.to_json())


def _remember_machine(ledger: Ledger, options: RunOptions) -> None:
    """Note versions and machine where they are others than those that last worked on the run."""
    machine = provenance(gpu=options.device in ("auto", "cuda"))
    before = [event["machine"] for event in ledger.events if event["event"] == "machine"]
    if not before or before[-1] != machine:
        ledger.append("machine", machine=machine)


def _stages_done(ledger: Ledger) -> int:
    return sum(event["event"] == "done" for event in ledger.events)
