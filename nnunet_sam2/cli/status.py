"""``nnunet_sam2 status``: how far a run has come, in under half a second."""

from __future__ import annotations

import argparse
import json

from nnunet_sam2.folders import DatasetFolders, find_dataset
from nnunet_sam2.rounds.decisions.record import decisions_path
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.rounds.lock import OWNER_FILE, Owner
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import RunState, find_runs, read_state
from nnunet_sam2.storage import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    parser.add_argument("--run", dest="run_name", help="name of the run (default: the one written to last)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the state of a run."""
    folders = find_dataset(args.dataset)
    state = read_state(folders, args.run_name)
    waiting = _waiting(folders, state)
    if args.json:
        print(json.dumps({**state.to_json(), "waiting": waiting}, indent=1))
        return 0
    others = [path.name for path in find_runs(folders) if path != state.folder]
    print(f"{folders.name}, run {state.folder.name}" + (f" (others: {', '.join(others)})" if others else ""))
    print(rounds_table(state))
    if state.stop_reason:
        print(f"stopped: {state.stop_reason}")
        if state.evidence.get("text"):
            print(f"evidence: {state.evidence['text']}")
    elif state.running_stage:
        owner = Owner.read(state.folder / OWNER_FILE)
        if owner is not None and not owner.is_elsewhere and owner.is_alive:
            print(f"in stage {state.running_stage}; process {owner.pid} is at work on it")
        else:
            print(f"in stage {state.running_stage}")
    else:
        print("between stages")
    if state.best_round is not None:
        print(f"best round: {state.best_round} ({state.configuration_of()})")
    if waiting:
        cases = "1 case" if len(waiting) == 1 else f"{len(waiting)} cases"
        print(f"people's word on {cases} waits for the next round")
    for retry in state.retries:
        print(f"tried once more: {retry['stage']} ({retry['cause']}), {retry['remedy']}")
    if waiting or not state.stop_reason:
        options = RunOptions.from_json(state.options, where=state.folder)
        print(f"what continues it, where no process is at work: {options.command(folders.dataset_id)}")
    print(f"time spent in finished stages: {duration(state.seconds)}")
    return 0


def _waiting(folders: DatasetFolders, state: RunState) -> list[str]:
    cohort = folders.raw / "cohort.json"
    cases = read_json(cohort)["cases"] if cohort.is_file() else []
    if not decisions_path(state.folder).is_file() and not any(case.get("added") for case in cases):
        return []
    # Only now: a cohort wants numpy, which takes longer than all the rest.
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.rounds.decisions.waiting import waiting_cases

    events = read_events(state.folder / LEDGER_FILE)
    return waiting_cases(Cohort.load(folders.raw), state.folder, events, fold=state.fold)


def rounds_table(state: RunState) -> str:
    """Lay out the rounds as a table of text."""
    lines = [f"{'round':<7}{'change: mean':>14}{'worst tenth':>13}{'validation Dice':>17}{'iterations':>12}{'time':>9}"]
    for r in state.rounds:
        name = f"{r.number}" + (" final" if r.final else "") + ("" if r.finished else " *")
        lines.append(
            f"{name:<7}{_number(r.change_mean):>14}{_number(r.change_worst_tenth):>13}"
            f"{_number(r.validation_dice):>17}{r.iterations or '-':>12}{duration(r.seconds):>9}"
        )
    if any(not r.finished for r in state.rounds):
        lines.append("* not finished")
    for r in state.rounds:
        named = ", ".join(r.left_out[:3]) + (" ..." if len(r.left_out) > 3 else "")
        parts = [f"cases left out: {len(r.left_out)} ({named})"] if r.left_out else []
        parts += [f"classes of other cases not learnt from: {r.distrusted}"] if r.distrusted else []
        if parts:
            lines.append(f"round {r.number}: {', '.join(parts)} (why: nnunet_sam2 label --explain CASE)")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Write a time span for people, such as ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
