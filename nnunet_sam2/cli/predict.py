"""``nnunet_sam2 predict``: segment new images with the model of the best round, or of one that is named."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_sam2.cohort.layouts.file_names import add_suffix_argument, cases_of_files
from nnunet_sam2.cohort.layouts.found import image_files
from nnunet_sam2.cohort.names import checked_case_id
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import VOLUME_ENDINGS, file_ending, readable
from nnunet_sam2.folders import DatasetFolders, find_dataset
from nnunet_sam2.submission import UNFILTERED

if TYPE_CHECKING:
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.geometry import Geometry
    from nnunet_sam2.rounds.new_images import BothSources
    from nnunet_sam2.rounds.state import RunState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; nnU-Net's letters where nnU-Net has one."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    parser.add_argument(
        "-i",
        dest="images",
        type=Path,
        required=True,
        help="folder of images: CASE_0000 and so on, one file a channel; CASE alone where there is one channel",
    )
    parser.add_argument("-o", dest="out", type=Path, required=True, help="folder for the label maps")
    add_suffix_argument(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--with-sam2",
        action="store_true",
        help="let SAM 2 label the images too, from the run's supports, and fuse both by the run's own rule; their own "
        "labels are in OUT/student and OUT/sam2, estimates of each label's Dice in OUT/quality.json",
    )
    parser.add_argument(
        "--save_probabilities",
        "--save-probabilities",
        action="store_true",
        help="also write OUT/probabilities/CASE.npz",
    )
    parser.add_argument("--disable_tta", action="store_true", help="do not mirror, even if the model was trained so")
    islands = parser.add_mutually_exclusive_group()
    islands.add_argument(
        "--no-postprocessing",
        dest="postprocessing",
        action="store_false",
        help="give what the network says, without the post-processing that the run decided on its held-out cases",
    )
    islands.add_argument(
        "--keep-largest",
        action="store_true",
        help="instead of what the run decided: of each class that is one piece in every human label, keep the largest "
        "piece of a case alone; what the network gave is in OUT/unfiltered",
    )
    parser.add_argument("--device", "-device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose a model among a dataset's runs and rounds."""
    parser.add_argument("--round", type=int, help="round whose model to use (default: the best one)")
    parser.add_argument("--run", dest="run_name", help="run, by the name that status shows (default: the last one)")
    parser.add_argument(
        "-f",
        dest="fold",
        nargs="+",
        help="fold of the run (default: that of the last run); several, or cv: the ensemble of the runs of these folds",
    )


def run(args: argparse.Namespace) -> int:
    """Predict every case of the input folder; what is there already and was made from the same is kept."""
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.progress import say, track
    from nnunet_sam2.rounds.nnunet import model_folder, predict_cases, read_postprocessing
    from nnunet_sam2.volumes import read_stored

    folders = find_dataset(args.dataset)
    chosen = chosen_model(folders, args)
    cohort = Cohort.load(folders.raw)
    with readable(args.images):
        same = args.out.resolve() == args.images.resolve()
    if same:
        raise InputError(f"-o {args.out} is the folder of the images; give another one")
    endings = VOLUME_ENDINGS if cohort.file_ending in VOLUME_ENDINGS else (cohort.file_ending,)
    cases = find_cases(
        args.images,
        endings,
        files_a_case=len(cohort.cases[0].images),
        known=[case.case_id for case in cohort.cases],
        suffix=args.suffix,
    )
    say(f"{len(cases)} cases with {chosen.configuration}, {chosen.described_folds}")
    # nnU-Net's reader takes a file that is cut off for a whole one, and NaN for 0.
    stored: dict[str, Geometry] = {}
    for case_id, path in track([(c, path) for c, paths in cases.items() for path in paths], what="checking"):
        stored[case_id] = read_stored(path)[1]
    _tell_orientation(cohort, stored)
    device = args.device if args.device != "auto" else _best_device()
    both = _both_sources(args, folders, chosen.run, device) if args.with_sam2 else None
    student = args.out / "student" if both else args.out
    model = model_folder(folders, chosen.configuration, plans=chosen.plans)
    decided = read_postprocessing(model) if args.postprocessing else None
    steps = decided.steps if decided and not args.keep_largest else ()
    if decided and steps:
        say(f"post-processing, as decided on held-out patients: {decided.described(cohort)} (--no-postprocessing: not)")
    predict_cases(
        folders,
        chosen.configuration,
        chosen.folds,
        cases,
        args.out / UNFILTERED if args.keep_largest else student,
        device=device,
        log=args.out / "predict.log",
        save_probabilities=args.save_probabilities or both is not None,
        mirroring=not args.disable_tta,
        postprocessing=steps,
        plans=chosen.plans,
        threads=args.threads,
    )
    if args.keep_largest:
        _keep_largest(cohort, args.out, cases)
    if both is not None:
        _tell_quality(both.label(cases, args.out, save_probabilities=args.save_probabilities), args.out)
    say(f"label maps: {args.out}")
    return 0


def _tell_orientation(cohort: Cohort, stored: Mapping[str, Geometry]) -> None:
    """Say which new images are stored in an orientation that the model's own cases are not."""
    from nnunet_sam2.orientation import axis_code
    from nnunet_sam2.progress import say

    known = {axis_code(case.geometry.direction) for case in cohort.cases}
    other = {case_id: code for case_id, g in stored.items() if (code := axis_code(g.direction)) not in known}
    if other:
        first = next(iter(other))
        say(
            f"note: {len(other)} of {len(stored)} images are stored in an orientation that no case of {cohort.name} "
            f"has ({first}: {other[first]}, known: {', '.join(sorted(known))}); nnU-Net sees voxels as they are "
            "stored, so store them alike"
        )


def _keep_largest(cohort: Cohort, out: Path, cases: Iterable[str]) -> None:
    from nnunet_sam2.labelling.explain.cases import class_names
    from nnunet_sam2.labelling.largest import single_classes, write_largest
    from nnunet_sam2.progress import say

    values = single_classes(cohort)
    names = [f"{case_id}{cohort.file_ending}" for case_id in cases]
    dropped = [count for count in write_largest(out / UNFILTERED, out, names, values).values() if count]
    known = class_names(cohort)
    of = ", ".join(known[str(value)] for value in values) or "no class, for none is one piece in every human label"
    say(f"largest pieces kept of {of}: {sum(dropped)} voxels dropped in {len(dropped)} of {len(names)} cases")


def _both_sources(
    args: argparse.Namespace, folders: DatasetFolders, state: RunState | None, device: str
) -> BothSources:
    from nnunet_sam2.rounds.new_images import BothSources

    if state is None:
        raise InputError("--with-sam2 fuses by the rule of one run; give one fold with -f, or a run with --run")
    if args.keep_largest:
        raise InputError("--with-sam2 keeps the largest piece of such classes as it fuses; leave out --keep-largest")
    both = BothSources.of(folders, state, device=device, threads=args.threads)
    if args.round not in (None, both.best_round):
        raise InputError(
            f"--with-sam2 fuses by what the run found of the model of round {both.best_round}; leave out --round"
        )
    return both


def _tell_quality(quality: Mapping[str, Any], out: Path) -> None:
    from nnunet_sam2.labelling.leave_one_out import mean_dice
    from nnunet_sam2.progress import say

    names, cases = quality["classes"], quality["cases"].values()
    for what, of in (("SAM 2", "sam2"), ("student", "student"), ("both, fused", None)):
        tables = [{int(v): (row[of] if of else row)["dice"] for v, row in case.items()} for case in cases]
        means = mean_dice(tables, [int(value) for value in names])
        told = ", ".join(f"{names[str(v)]}: {'-' if dice is None else f'{dice:.3f}'}" for v, dice in means.items())
        say(f"estimated Dice, {what}: {told}")
    if not quality["calibrated"]:
        say("these estimates are not calibrated: it takes labelled cases of two patients that SAM 2 can label")
    say(f"estimates and lower bounds of every case and class: {out / 'quality.json'}")


@dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """Name a model folder of nnU-Net's and the folds of it that predict."""

    configuration: str
    folds: tuple[str, ...]
    plans: str
    run: RunState | None
    """The run that trained it; None for an ensemble of several."""

    @property
    def described_folds(self) -> str:
        """Say which folds predict."""
        return f"fold {self.folds[0]}" if len(self.folds) == 1 else f"the mean of folds {', '.join(self.folds)}"


def chosen_model(folders: DatasetFolders, args: argparse.Namespace) -> ChosenModel:
    """Return the model that the options choose: of a round of a run, or the ensemble of several folds."""
    from nnunet_sam2.rounds.ensemble import ALL_FOLDS, find_ensemble

    if args.fold and (len(args.fold) > 1 or args.fold == [ALL_FOLDS]):
        if args.round is not None:
            raise InputError("--round chooses among the rounds of one run; an ensemble has the best one of each fold")
        found = find_ensemble(folders, args.fold, args.run_name)
        return ChosenModel(configuration=found.configuration, folds=found.folds, plans=found.plans, run=None)
    state = _chosen_run(folders, args.run_name, args.fold[0] if args.fold else None)
    configuration = state.configuration_of(args.round)
    return ChosenModel(configuration=configuration, folds=(state.fold,), plans=state.plans, run=state)


def _chosen_run(folders: DatasetFolders, run_name: str | None, fold: str | None) -> RunState:
    from nnunet_sam2.rounds.state import find_runs, read_state

    if run_name is not None or fold is None:
        state = read_state(folders, run_name)
    else:
        states = [read_state(folders, path.name) for path in find_runs(folders)]
        fitting = [state for state in states if state.fold == fold]
        if not fitting:
            known = ", ".join(sorted({state.fold for state in states})) or "none"
            raise InputError(f"{folders.name} has no run of fold {fold}; folds with runs: {known}")
        state = fitting[-1]
    if fold is not None and state.fold != fold:
        raise InputError(f"run {run_name} trained fold {state.fold}, not {fold}; leave out -f")
    return state


def find_cases(
    folder: Path, endings: Sequence[str], *, files_a_case: int, known: Iterable[str] = (), suffix: str = "auto"
) -> dict[str, list[Path]]:
    """Find the cases of a folder: id -> its image files in the order of their channels.

    A case is ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` and so on, as in nnU-Net; where a case is one file, plain
    ``CASE.nii.gz`` will do. ``known`` are the ids of the model's own cases: where these end in four digits, so do new
    ones. Files that the model does not read are told of. Raises `InputError` for names that fit no reading, or two,
    and where nothing is found.
    """
    from nnunet_sam2.progress import say

    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of the images with -i")
    files = image_files(folder)
    passed_over = {stem: path for stem, path in files.items() if file_ending(path) not in endings}
    files = {stem: path for stem, path in files.items() if stem not in passed_over}
    if not files:
        raise InputError(f"{folder} holds no images with the ending {' or '.join(endings)}, which the model reads")
    if passed_over:
        names = ", ".join(sorted(path.name for path in passed_over.values())[:3])
        say(f"note: {len(passed_over)} files are passed over ({names}): the model reads {' '.join(endings)}")
    numbered = [(case_id, case_id) for case_id in known if re.fullmatch(r".+_\d{4}", case_id)]
    cases = cases_of_files(files, counts=(files_a_case,), others=numbered, suffix=suffix)
    for case_id, paths in cases.items():
        checked_case_id(case_id, where=paths[0])
    return {case_id: list(paths) for case_id, paths in cases.items()}


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
