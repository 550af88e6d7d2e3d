"""``nnunet_sam2 report``: what a run came to, as one HTML file to open in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or DatasetXXX_Name")
    parser.add_argument("--run", dest="run_name", help="name of the run (default: the last one with a finished round)")
    parser.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="file to write (default: report.html in the run's folder)"
    )
    parser.add_argument(
        "--pictures",
        type=_count,
        metavar="N",
        help="read the images of the N unlabelled cases to look at first, and of N labelled ones (default: of all)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it lies."""
    from nnunet_sam2.folders import find_dataset
    from nnunet_sam2.progress import say
    from nnunet_sam2.report.write import write_report
    from nnunet_sam2.rounds.state import read_state

    folders = find_dataset(args.dataset)
    state = read_state(folders, args.run_name)
    path = write_report(folders, state.folder, output=args.output, most_pictures=args.pictures)
    say(f"report ({path.stat().st_size / 1e6:.1f} MB), open it in a browser: {path}")
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("give 0 or more")
    return number
