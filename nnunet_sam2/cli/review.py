"""``nnunet_sam2 review``: look through a run's labels, decide about them, correct them by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_sam2.folders import DatasetFolders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--run", dest="run_name", help="name of the run (default: the last one with a finished round)")
    chosen.add_argument("--branch", help="branch of the run")
    parser.add_argument("--no-browser", action="store_true", help="print the page's address and do not open it")
    parser.add_argument("--port", type=_port, default=0, help="port of the page (default: any free one)")
    parser.add_argument("--pictures", type=_count, metavar="N", help="read the images of N cases (default: of all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--export", metavar="CASE", help="write a folder for your editor (ITK-SNAP, 3D Slicer, napari) and end"
    )
    what.add_argument(
        "--import", dest="files", nargs="+", type=Path, metavar="FILE", help="take in corrected labels and end"
    )
    parser.add_argument(
        "--output", "-o", type=Path, metavar="FOLDER", help="folder to export to (default: in the run's review folder)"
    )
    parser.add_argument("--case", help="case of the one file to import (default: from the file's name)")
    parser.add_argument(
        "--classes", metavar="A,B", help="classes that the imported file answers for (default: all, every voxel)"
    )
    parser.add_argument("--replace", action="store_true", help="import in the place of a label imported before")
    parser.add_argument("--allow-empty", action="store_true", help="import a label that shows no class at all")


def run(args: argparse.Namespace) -> int:
    """Serve the page, or export, or import."""
    from nnunet_sam2.errors import InputError
    from nnunet_sam2.folders import find_dataset

    folders = find_dataset(args.dataset)
    if not args.files and (args.case or args.classes or args.replace or args.allow_empty):
        raise InputError("--case, --classes, --replace and --allow-empty go with --import FILE")
    if args.output and not args.export:
        raise InputError("--output goes with --export CASE")
    if args.files:
        _take_in(args, folders)
    elif args.export:
        _hand_over(args, folders)
    else:
        from nnunet_sam2.review.serve import serve_review

        serve_review(
            folders, _run(args, folders), port=args.port, browser=not args.no_browser, most_pictures=args.pictures
        )
    return 0


def _run(args: argparse.Namespace, folders: DatasetFolders) -> Path:
    from nnunet_sam2.errors import InputError
    from nnunet_sam2.rounds.state import find_runs, read_state

    name = args.run_name
    if args.branch:
        found = [path.name for path in find_runs(folders) if path.name.endswith(f"_{args.branch}")]
        if len(found) != 1:
            known = ", ".join(path.name for path in find_runs(folders)) or "none"
            raise InputError(f"--branch {args.branch} is not the name of one run; there are: {known}; give --run NAME")
        name = found[0]
    return read_state(folders, name).folder


def _hand_over(args: argparse.Namespace, folders: DatasetFolders) -> None:
    from nnunet_sam2.progress import say
    from nnunet_sam2.review.hand_over import hand_over

    out = hand_over(folders, _run(args, folders), args.export, out=args.output)
    say(f"{args.export} for your editor, how to go on is in README.txt: {out}")


def _take_in(args: argparse.Namespace, folders: DatasetFolders) -> None:
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.progress import say
    from nnunet_sam2.report.run_files import RunFiles
    from nnunet_sam2.review.agreement import LITTLE, agreement
    from nnunet_sam2.review.take_in import class_values_of, take_in
    from nnunet_sam2.rounds.state import find_runs

    classes = None if args.classes is None else [part.strip() for part in args.classes.split(",") if part.strip()]
    taken = take_in(
        folders.raw, args.files, case_id=args.case, classes=classes, replace=args.replace, allow_empty=args.allow_empty
    )
    run = next((RunFiles.open(folders, path) for path in reversed(find_runs(folders))), None)
    values = None if classes is None else class_values_of(Cohort.load(folders.raw), classes)
    for case_id, label in taken:
        part = "" if classes is None else f" of {', '.join(classes)}"
        say(f"{case_id}: human label{part} {label}")
        dice = agreement(run, case_id, label, classes=values) if run else {}
        if dice:
            told = ", ".join(f"{name} {value:.2f}" for name, value in dice.items())
            say(f"{case_id}: Dice with the label that the run had drawn: {told}")
            if sum(dice.values()) / len(dice) < LITTLE:
                say(f"{case_id}: that is little; if the file is another case's, give the right one with --replace")
    if run:
        command = run.options.command(folders.dataset_id)
        say(f"learnt from the next round on; what goes on with run {run.folder.name}: {command}")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("give 0 or more")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("give 0 (any free one) to 65535")
    return number
