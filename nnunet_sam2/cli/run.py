"""``nnunet_sam2 run``: the whole loop, and the same command again to continue it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.registry import parse_settings
from nnunet_sam2.rounds.options import FINAL_STARTS, PROFILES, RunOptions
from nnunet_sam2.sam2.weights.registry import EMBEDDED

if TYPE_CHECKING:
    from nnunet_sam2.folders import DatasetFolders
    from nnunet_sam2.rounds.state import RunState

_DEFAULTS = RunOptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; nnU-Net's letters where nnU-Net has one."""
    daily = parser.add_argument_group("every day")
    labels = parser.add_argument_group("what SAM 2 labels with")
    student = parser.add_argument_group("what nnU-Net is and learns with")
    schedule = parser.add_argument_group("schedule")
    stopping = parser.add_argument_group("when it stops")
    machine = parser.add_argument_group("machine")
    daily.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    daily.add_argument("-c", dest="configuration", default=_DEFAULTS.configuration, help="nnU-Net configuration")
    daily.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        default=[_DEFAULTS.fold],
        help="fold of the labelled cases, or 'all'; several, or cv for every one: run after run, and their ensemble",
    )
    student.add_argument(
        "-p",
        dest="plans",
        default=_DEFAULTS.plans,
        help="nnU-Net's plans: nnUNetResEncUNetMPlans (L, XL) are planned where they are not there yet, others must be "
        "(default: %(default)s)",
    )
    student.add_argument(
        "--pretrained",
        metavar="CHECKPOINT",
        help="weights that trainings from scratch start from, as by nnUNetv2_train -pretrained_weights: heads left out",
    )
    labels.add_argument(
        "--sam2",
        default=EMBEDDED,
        metavar="NAME_OR_FILE",
        help="SAM 2: a name (nnunet_sam2 weights list) or a checkpoint file; default: the %(default)s one",
    )
    labels.add_argument("--strategy", default=_DEFAULTS.strategy, help="labelling strategy (default: %(default)s)")
    labels.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the strategy, repeatable",
    )
    labels.add_argument("--image-size", type=int, help="SAM 2 input size in pixels (default: the checkpoint's)")
    labels.add_argument(
        "--supports",
        default=_DEFAULTS.supports,
        choices=["train", "all"],
        help="cases that prompt SAM 2: the fold's training cases (validation stays untouched) or all",
    )
    stopping.add_argument(
        "--rounds",
        dest="round_limit",
        type=int,
        default=_DEFAULTS.round_limit,
        help="most rounds after the baseline (default: %(default)s)",
    )
    stopping.add_argument(
        "--mean-change",
        type=float,
        default=_DEFAULTS.mean_change,
        help="stop when labels change by no more on the mean (1 - Dice, default: %(default)s) ...",
    )
    stopping.add_argument(
        "--worst-tenth-change",
        type=float,
        default=_DEFAULTS.worst_tenth_change,
        help="... and by no more in the worst tenth (default: %(default)s)",
    )
    stopping.add_argument(
        "--validation-drop",
        type=float,
        default=_DEFAULTS.validation_drop,
        help="stop when validation Dice falls this far below the best (default: %(default)s)",
    )
    stopping.add_argument(
        "--volume-drift",
        type=float,
        default=_DEFAULTS.volume_drift,
        help="stop when a class's mean volume moves away from the human labels' by this factor since the first round "
        "(default: %(default)s)",
    )
    stopping.add_argument(
        "--empty-rise",
        type=float,
        default=_DEFAULTS.empty_rise,
        help="stop when a class is missing in this share of cases more than in the first round and in the human labels "
        "(default: %(default)s)",
    )
    stopping.add_argument(
        "--oscillation",
        type=float,
        default=_DEFAULTS.oscillation,
        help="stop when labels differ from those of two rounds before by less than this part of their last change "
        "(default: %(default)s; 0: never)",
    )
    labels.add_argument(
        "--least-quality",
        type=float,
        default=_DEFAULTS.least_quality,
        help="estimated Dice below which a class of a case is not learnt from in a round (default: %(default)s)",
    )
    schedule.add_argument("--skip-baseline", action="store_true", help="leave out round 0, nnU-Net on the labels alone")
    schedule.add_argument(
        "--profile",
        default="auto",
        choices=["auto", *PROFILES],
        help="network and schedule; auto: gpu where CUDA is, else cpu",
    )
    schedule.add_argument("--epochs", dest="num_epochs", type=int, help="epochs a round (default: the profile's)")
    schedule.add_argument("--iterations", dest="num_iterations_per_epoch", type=int, help="iterations an epoch")
    schedule.add_argument(
        "--final-epochs", type=int, help="epochs of the training after the last round; 0: none (default: the profile's)"
    )
    schedule.add_argument(
        "--final-start",
        choices=FINAL_STARTS,
        help="what that training starts with: nothing, or the best round's weights (default: warm on the cpu profile)",
    )
    student.add_argument(
        "--pseudo-per-batch",
        type=float,
        default=_DEFAULTS.pseudo_per_batch,
        help="share of pseudo-labelled samples in a batch (default: %(default)s)",
    )
    student.add_argument(
        "--ema-decay",
        type=float,
        metavar="DECAY",
        help="average the student's weights with this decay a step, such as 0.99; the average predicts and labels "
        "(default: the last step's weights)",
    )
    student.add_argument(
        "--copy-paste",
        type=float,
        default=_DEFAULTS.copy_paste,
        metavar="SHARE",
        help="share of the batches in which labelled and pseudo-labelled samples exchange a box (default: %(default)g)",
    )
    student.add_argument(
        "--soft-targets",
        action="store_true",
        help="learn pseudo-labels as probabilities, weighted by confidence, instead of as hard labels",
    )
    student.add_argument(
        "--warm-lr",
        type=float,
        metavar="RATE",
        help="first learning rate of trainings that start from the last round's weights (default: the profile's)",
    )
    daily.add_argument("--branch", help="name of a new run beside an earlier one with other options")
    schedule.add_argument("--seed", type=int, default=_DEFAULTS.seed)
    machine.add_argument("--device", "-device", default=_DEFAULTS.device, choices=["auto", "cpu", "cuda", "mps"])
    machine.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    machine.add_argument(
        "--hang-minutes",
        type=float,
        default=_DEFAULTS.hang_minutes,
        help="end a process of nnU-Net that neither writes nor computes for so long (default: %(default)g)",
    )

    daily.add_argument(
        "--dry-run",
        action="store_true",
        help="begin nothing: print the stages with the time, memory and disk that each will take (exit status 2 where "
        "the run cannot fit)",
    )
    daily.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    daily.add_argument("--again", action="store_true", help="with --dry-run: measure this machine anew")


def run(args: argparse.Namespace) -> int:
    """Run or continue the loop, fold by fold where several are asked for, and print where everything lies."""
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.folders import find_dataset
    from nnunet_sam2.progress import say
    from nnunet_sam2.rounds.ensemble import folds_asked, make_ensemble

    if (args.json or args.again) and not args.dry_run:
        raise InputError("--json and --again go with --dry-run")
    folders = find_dataset(args.dataset)
    cohort = Cohort.load(folders.raw).as_planned()
    asked = [options_of(args, fold) for fold in folds_asked(folders, cohort, args.folds)]
    if args.dry_run:
        return _foretell(args, folders, asked)
    if len(asked) == 1:
        _run_fold(folders, asked[0])
        say(f"segment new images with: nnunet_sam2 predict -d {folders.dataset_id} -i IMAGES -o OUT")
        return 0
    states = []
    for options in asked:
        say(f"fold {options.fold} of {', '.join(other.fold for other in asked)}")
        states.append(_run_fold(folders, options))
    found = make_ensemble(folders, cohort, states)
    told = ", ".join(f"{name}: {'-' if dice is None else f'{dice:.3f}'}" for name, dice in found.dice.items())
    say(f"Dice of the labelled cases, each by the network of the fold that held it out: {told}")
    say(f"the ensemble of folds {', '.join(found.folds)} is a model of nnU-Net's: {found.configuration}")
    chosen = " ".join(args.folds)
    say(f"segment new images with: nnunet_sam2 predict -d {folders.dataset_id} -i IMAGES -o OUT -f {chosen}")
    return 0


def _run_fold(folders: DatasetFolders, options: RunOptions) -> RunState:
    from nnunet_sam2.cli.status import rounds_table
    from nnunet_sam2.progress import say
    from nnunet_sam2.report.write import PICTURES_BETWEEN_ROUNDS, REPORT_FILE, try_to_report
    from nnunet_sam2.rounds.orchestrator import run_loop
    from nnunet_sam2.rounds.state import run_folder

    folder = run_folder(folders, options.run_name)

    def report(finished: bool) -> None:
        try_to_report(folders, folder, most_pictures=None if finished else PICTURES_BETWEEN_ROUNDS)

    state = run_loop(folders, options, report=report)
    say(rounds_table(state))
    say(f"stopped: {state.stop_reason}; best round: {state.best_round} ({state.configuration_of()})")
    if state.evidence.get("text"):
        say(f"evidence: {state.evidence['text']}")
    say(f"labels, confidence and the ledger: {state.folder}")
    if (state.folder / REPORT_FILE).is_file():
        say(f"report, to open in a browser: {state.folder / REPORT_FILE}")
    return state


def _foretell(args: argparse.Namespace, folders: DatasetFolders, asked: Sequence[RunOptions]) -> int:
    from nnunet_sam2.cli.dry_run import show_estimate
    from nnunet_sam2.rounds.estimate import estimate_run

    if args.json and len(asked) > 1:
        raise InputError("--json foretells one fold; give one with -f")
    status = 0
    for options in asked:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            estimate = estimate_run(folders, options, again=args.again)
        if len(asked) > 1:
            print(f"fold {options.fold}:")
        status = max(status, show_estimate(estimate, as_json=args.json))
    return status


def options_of(args: argparse.Namespace, fold: str) -> RunOptions:
    """Return the options of parsed arguments for one fold, device and profile as this machine has them."""
    device = args.device if args.device != "auto" else _best_device()
    profile = args.profile if args.profile != "auto" else ("gpu" if device == "cuda" else "cpu")
    return RunOptions(
        configuration=args.configuration,
        fold=fold,
        branch=args.branch,
        plans=args.plans,
        pretrained=str(Path(args.pretrained).resolve()) if args.pretrained else None,
        sam2=args.sam2,
        strategy=args.strategy,
        strategy_options=parse_settings(args.settings),
        image_size=args.image_size,
        supports=args.supports,
        profile=profile,
        round_limit=args.round_limit,
        mean_change=args.mean_change,
        worst_tenth_change=args.worst_tenth_change,
        validation_drop=args.validation_drop,
        volume_drift=args.volume_drift,
        empty_rise=args.empty_rise,
        oscillation=args.oscillation,
        least_quality=args.least_quality,
        skip_baseline=args.skip_baseline,
        pseudo_per_batch=args.pseudo_per_batch,
        ema_decay=args.ema_decay,
        copy_paste=args.copy_paste,
        soft_targets=args.soft_targets,
        warm_lr=args.warm_lr,
        num_epochs=args.num_epochs,
        num_iterations_per_epoch=args.num_iterations_per_epoch,
        final_epochs=args.final_epochs,
        final_start=args.final_start,
        seed=args.seed,
        device=device,
        threads=args.threads,
        hang_minutes=args.hang_minutes,
    )


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
