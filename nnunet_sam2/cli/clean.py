"""``nnunet_sam2 clean``: make room, without ever touching raw data and human labels."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    parser.add_argument("--keep-embeddings", action="store_true", help="keep SAM 2's features for the next run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", dest="run_name", help="also delete this whole run: labels, models, decisions on it")
    which.add_argument("--all", action="store_true", help="also delete all runs of the dataset")
    parser.add_argument("--yes", action="store_true", help="delete features and runs without being asked")


def run(args: argparse.Namespace) -> int:
    """Remove temporary files and embeddings, and runs where that is asked for; print what went."""
    from nnunet_sam2.errors import InputError
    from nnunet_sam2.folders import find_dataset
    from nnunet_sam2.progress import say
    from nnunet_sam2.rounds.cleaning import all_runs, clean, parts_of_run
    from nnunet_sam2.rounds.disk import folder_bytes, readable
    from nnunet_sam2.rounds.state import EMBEDDINGS, RUNS_FOLDER

    folders = find_dataset(args.dataset)
    runs = all_runs(folders) if args.all else [args.run_name] if args.run_name else []
    parts = [path for name in runs for path in parts_of_run(folders, name)]
    features = folders.results / RUNS_FOLDER / EMBEDDINGS
    if not args.keep_embeddings and folder_bytes(features):
        parts.append(features)
    if parts and not args.yes:
        for path in parts:
            say(f"would delete {path} ({readable(folder_bytes(path))})")
        what = [*runs, *(["SAM 2's features, which take hours to compute again"] if features in parts else [])]
        if not _agreed():
            raise InputError(f"nothing was deleted of {', '.join(what)}; give --yes to do it, or --keep-embeddings")
    removed = clean(folders, embeddings=not args.keep_embeddings, runs=runs)
    for removal in removed:
        say(f"removed {removal.what}: {len(removal.paths)} files and folders, {readable(removal.count)}")
    if not removed:
        say("nothing to remove")
    return 0


def _agreed() -> bool:
    """Ask at a terminal; nobody there has not agreed."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("delete this? [y/N] ").strip().casefold() in ("y", "yes")
    except EOFError:
        return False
