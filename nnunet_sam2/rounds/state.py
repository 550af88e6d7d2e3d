"""How far a run has come, read from its ledger alone: no torch, no images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ledger import LEDGER_FILE, RETRIED, read_events
from nnunet_sam2.rounds.options import DEFAULT_PLANS

RUNS_FOLDER = "nnunet_sam2"
"""Folder of all runs under a dataset's results; nnU-Net's tools pass it by, for it is no ``A__B__C`` triple."""

EMBEDDINGS = "embeddings"
"""Folder of SAM 2's features in that of a dataset's runs, which share them."""


@dataclass(frozen=True, kw_only=True)
class RoundState:
    """Hold one finished or running round."""

    number: int
    configuration: str
    final: bool
    finished: bool
    change_mean: float | None
    change_worst_tenth: float | None
    validation_dice: float | None
    validation_by_class: dict[str, float]
    quality: dict[str, dict[str, float]]
    """Estimated Dice of SAM 2 and of the student, a class, by which the round's labels were fused."""
    left_out: tuple[str, ...]
    """Cases that the round does not train on."""
    distrusted: int
    """Classes of the other cases that it does not learn, a case and a class each."""
    iterations: int | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Hold a run as its ledger shows it."""

    folder: Path
    options: dict[str, Any]
    rounds: tuple[RoundState, ...]
    running_stage: str | None
    stop_reason: str | None
    evidence: dict[str, Any]
    """What shows the reason to stop, with a sentence under ``text``; empty where the reason says it all."""
    retries: tuple[dict[str, Any], ...]
    """Stages that were tried once more: ``stage``, ``cause``, ``remedy``."""
    best_round: int | None
    seconds: float

    @property
    def fold(self) -> str:
        """Return the fold that the run trains."""
        return str(self.options["fold"])

    @property
    def plans(self) -> str:
        """Return the identifier of nnU-Net's plans."""
        return str(self.options.get("plans", DEFAULT_PLANS))

    def round(self, number: int) -> RoundState:
        """Return a finished round; raise `InputError` naming those that there are."""
        for state in self.rounds:
            if state.number == number and state.finished:
                return state
        finished = ", ".join(str(r.number) for r in self.rounds if r.finished) or "none"
        raise InputError(f"round {number} has no trained model in {self.folder}; finished rounds: {finished}")

    def configuration_of(self, number: int | None = None) -> str:
        """Return the nnU-Net configuration of a round, of the best one by default."""
        if number is None:
            if self.best_round is None:
                raise InputError(f"no round is finished in {self.folder}; continue with: nnunet_sam2 run")
            number = self.best_round
        return self.round(number).configuration

    def to_json(self) -> dict[str, Any]:
        """Return the state as a JSON value."""
        return {
            "folder": str(self.folder),
            "options": self.options,
            "rounds": [vars(r) for r in self.rounds],
            "running_stage": self.running_stage,
            "stop_reason": self.stop_reason,
            "evidence": self.evidence,
            "retries": list(self.retries),
            "best_round": self.best_round,
            "seconds": self.seconds,
        }


def run_folder(folders: DatasetFolders, run_name: str) -> Path:
    """Return the folder of one run of a dataset."""
    return folders.results / RUNS_FOLDER / run_name


def find_runs(folders: DatasetFolders) -> list[Path]:
    """List the folders of a dataset's runs, the one that was written to last at the end."""
    ledgers = (folders.results / RUNS_FOLDER).glob(f"*/{LEDGER_FILE}")
    return [ledger.parent for ledger in sorted(ledgers, key=lambda path: (path.stat().st_mtime, path))]


def read_state(folders: DatasetFolders, run_name: str | None = None) -> RunState:
    """Read a run's state; where none is named, of the last one with a finished round, or else of the last one."""
    if run_name is None:
        runs = find_runs(folders)
        if not runs:
            raise InputError(
                f"{folders.name} has no run yet; start one with: "
                f"nnunet_sam2 run -d {folders.dataset_id} -c CONFIGURATION"
            )
        states = [state_of_events(run, read_events(run / LEDGER_FILE)) for run in reversed(runs)]
        return next((state for state in states if state.best_round is not None), states[0])
    folder = run_folder(folders, run_name)
    if not (folder / LEDGER_FILE).is_file():
        known = ", ".join(path.name for path in find_runs(folders)) or "none"
        raise InputError(f"{folders.name} has no run {run_name}; there are: {known}")
    return state_of_events(folder, read_events(folder / LEDGER_FILE))


def state_of_events(folder: Path, events: Sequence[dict[str, Any]]) -> RunState:
    """Fold a ledger's events into the run's state."""
    options: dict[str, Any] = {}
    done: dict[str, dict[str, Any]] = {}
    running: str | None = None
    stopped: dict[str, Any] | None = None
    for event in events:
        if event["event"] == "run":
            options = event["options"]
        elif event["event"] == "started":
            running, stopped = event["stage"], None
        elif event["event"] == "done":
            done[event["stage"]] = event
            running = None
        elif event["event"] == "stopped":
            stopped = event
    names = {stage.split("/")[0] for stage in done} - {"setup", "finish"}
    rounds = [_round(done, name) for name in sorted(names)]
    return RunState(
        folder=folder,
        options=options,
        rounds=tuple(sorted(rounds, key=lambda r: r.number)),
        running_stage=running,
        stop_reason=stopped["reason"] if stopped else None,
        evidence=dict(stopped.get("evidence") or {}) if stopped else {},
        retries=tuple(
            {name: event[name] for name in ("stage", "cause", "remedy")}
            for event in events
            if event["event"] == RETRIED
        ),
        best_round=stopped["best_round"] if stopped else _best_so_far(rounds),
        seconds=sum(event["seconds"] for event in events if event["event"] == "done"),
    )


def _round(done: dict[str, dict[str, Any]], name: str) -> RoundState:
    stages = {stage.split("/")[1]: event for stage, event in done.items() if stage.startswith(f"{name}/")}
    fuse = stages["fuse"]["info"] if "fuse" in stages else {}
    train = stages["train"]["info"] if "train" in stages else {}
    data = stages["data"]["info"] if "data" in stages else {}
    change = fuse.get("change")
    return RoundState(
        number=int((data or fuse).get("round", name.lstrip("r") if name.lstrip("r").isdigit() else -1)),
        configuration=data.get("configuration", ""),
        final=bool(data.get("final", False)),
        finished="train" in stages,
        change_mean=change["mean"] if change else None,
        change_worst_tenth=change["worst_tenth"] if change else None,
        validation_dice=train.get("validation_dice"),
        validation_by_class=train.get("validation_by_class", {}),
        quality=fuse.get("quality", {}),
        left_out=tuple(sorted(fuse.get("left_out", {}))),
        distrusted=sum(len(values) for values in fuse.get("distrusted", {}).values()),
        iterations=train.get("iterations"),
        seconds=sum(event["seconds"] for event in stages.values()),
    )


def _best_so_far(rounds: Sequence[RoundState]) -> int | None:
    finished = [r for r in rounds if r.finished]
    if not finished:
        return None
    scored = [r for r in finished if r.validation_dice is not None]
    if not scored:
        return max(r.number for r in finished)
    return max(scored, key=lambda r: (r.validation_dice or 0.0, r.number)).number
