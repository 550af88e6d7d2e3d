"""Folds that were run one after the other become one model: nnU-Net's own folder of several folds.

Each fold's student is judged on its own held-out patients, so that every labelled case has a label of a network that
has not seen it. nnU-Net predicts with the folder, averages its folds, and finds the best configuration by it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.nnunet.base import only_writer, resolved_configuration, write_plans
from nnunet_sam2.rounds.nnunet.plan import SPLITS_FILE
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import RUNS_FOLDER, RunState
from nnunet_sam2.storage import atomic_folder, file_hash, read_json, write_json, write_text

ALL_FOLDS = "cv"
"""What ``-f`` takes for every fold of the labelled cases, and the end of an ensemble's name."""

ENSEMBLE_FILE = "ensemble.json"


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Hold the best models of several folds as one model of nnU-Net's."""

    configuration: str
    plans: str
    members: tuple[dict[str, Any], ...]
    """Of each fold its ``fold``, ``run``, ``round``, ``configuration`` and the hash of its ``checkpoint``."""
    dice: dict[str, float | None]
    """Out-of-fold Dice of each class or region, named as in nnU-Net's summaries: the mean over labelled cases."""

    @property
    def folds(self) -> tuple[str, ...]:
        """Return the folds."""
        return tuple(str(member["fold"]) for member in self.members)

    def to_json(self) -> dict[str, Any]:
        """Return the ensemble as a JSON value."""
        return {
            "configuration": self.configuration,
            "plans": self.plans,
            "members": list(self.members),
            "dice": self.dice,
        }


def folds_asked(folders: DatasetFolders, cohort: Cohort, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the folds that ``-f`` names, each once; `ALL_FOLDS` stands for every fold of the labelled cases."""
    if ALL_FOLDS not in asked:
        if len(asked) > 1 and "all" in asked:
            raise InputError("-f all holds nothing out and goes with no other fold; give it alone, or -f cv")
        return tuple(dict.fromkeys(asked))
    if len(asked) > 1:
        raise InputError("-f cv stands for every fold; give it alone")
    splits = folders.preprocessed / SPLITS_FILE
    count = len(read_json(splits) if splits.is_file() else make_splits(cohort))
    if count < 2:
        raise InputError(f"-f cv: the labelled cases of {cohort.name} are one patient's and give no folds; give -f all")
    return tuple(map(str, range(count)))


def ensemble_name(options: RunOptions) -> str:
    """Return the name of the ensemble's configuration, such as ``3d_fullres_cv``."""
    return f"{options.configuration}" + (f"_{options.branch}" if options.branch else "") + f"_{ALL_FOLDS}"


def make_ensemble(folders: DatasetFolders, cohort: Cohort, states: Sequence[RunState]) -> Ensemble:
    """Put the best models of several runs, of a fold each, into one model folder, with what they drew out of fold.

    The checkpoints are links; nothing is trained. Post-processing is decided on all held-out cases together, as nnU-Net
    does after a cross-validation. A folder that holds the same already is left as it is.
    """
    options = RunOptions.from_json(states[0].options, where=states[0].folder)
    name, plans = ensemble_name(options), options.plans
    members = [_member(folders, state) for state in states]
    record = folders.results / RUNS_FOLDER / name / ENSEMBLE_FILE
    model = nnunet.model_folder(folders, name, plans=plans)
    if record.is_file() and (model / "plans.json").is_file():
        known = _from_json(read_json(record))
        if list(known.members) == members:
            return known
    _add_configuration(folders, options, name, str(members[0]["configuration"]))
    first = nnunet.model_folder(folders, str(members[0]["configuration"]), plans=plans)
    with atomic_folder(model) as folder:
        for member in members:
            source = nnunet.fold_folder(folders, member["configuration"], member["fold"], plans=plans)
            shutil.copytree(source, folder / f"fold_{member['fold']}", copy_function=_link)
        for file in ("dataset.json", "dataset_fingerprint.json"):
            if (first / file).is_file():
                shutil.copyfile(first / file, folder / file)
        write_text(folder / "plans.json", json.dumps(nnunet.read_plans(folders, plans), indent=4))
        out_of_fold = _out_of_fold(folder, cohort)
        nnunet.write_postprocessing(folder, nnunet.decide_postprocessing(cohort, out_of_fold))
    found = Ensemble(configuration=name, plans=plans, members=tuple(members), dice=_dice(folders, members, plans))
    write_json(record, found.to_json())
    return found


def find_ensemble(folders: DatasetFolders, folds: Sequence[str], name: str | None = None) -> Ensemble:
    """Find the ensemble of these folds, of any where `ALL_FOLDS` is asked for: the last that was made, or the named."""
    made = sorted(
        (folders.results / RUNS_FOLDER).glob(f"{name or '*'}/{ENSEMBLE_FILE}"), key=lambda path: path.stat().st_mtime
    )
    found = [_from_json(read_json(path)) for path in made]
    fitting = [e for e in found if list(folds) == [ALL_FOLDS] or set(folds) == set(e.folds)]
    if not fitting:
        known = "; ".join(f"{e.configuration} of folds {' '.join(e.folds)}" for e in found) or "none"
        raise InputError(
            f"{folders.name} has no ensemble of folds {' '.join(folds)}; there are: {known}. "
            f"Make one with: nnunet_sam2 run -d {folders.dataset_id} -f {' '.join(folds)}"
        )
    return fitting[-1]


def _member(folders: DatasetFolders, state: RunState) -> dict[str, Any]:
    configuration = state.configuration_of()
    checkpoint = nnunet.final_checkpoint(folders, configuration, state.fold, plans=state.plans)
    return {
        "fold": state.fold,
        "run": state.folder.name,
        "round": state.best_round,
        "configuration": configuration,
        "checkpoint": file_hash(checkpoint),
    }


def _add_configuration(folders: DatasetFolders, options: RunOptions, name: str, like: str) -> None:
    """Give the plans a configuration of the ensemble's name, by which nnU-Net's commands know it."""
    with only_writer(folders):
        plans = nnunet.read_plans(folders, options.plans)
        # The network and patch of the rounds; the settings tell it from what nnU-Net planned.
        plans["configurations"][name] = {"inherits_from": options.configuration, **resolved_configuration(plans, like)}
        write_plans(folders, plans, options.plans)


def _out_of_fold(folder: Path, cohort: Cohort) -> dict[str, Path]:
    """Map each labelled case to what the network of its fold drew."""
    files = folder.glob(f"fold_*/validation/*{cohort.file_ending}")
    return {path.name.removesuffix(cohort.file_ending): path for path in sorted(files)}


def _dice(folders: DatasetFolders, members: Sequence[Mapping[str, Any]], plans: str) -> dict[str, float | None]:
    rows: dict[str, list[float]] = {}
    for member in members:
        found = nnunet.read_validation(folders, member["configuration"], member["fold"], plans=plans)
        for case in found.cases.values() if found else ():
            for value, dice in case.items():
                rows.setdefault(value, []).extend([] if dice is None else [dice])
    return {value: sum(row) / len(row) if row else None for value, row in rows.items()}


def _from_json(value: Mapping[str, Any]) -> Ensemble:
    return Ensemble(
        configuration=value["configuration"],
        plans=value["plans"],
        members=tuple(value["members"]),
        dice=dict(value["dice"]),
    )


def _link(source: str, target: str) -> None:
    """Hard-link a file, or copy it where the disk has no links: checkpoints are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
