"""``nnunet_sam2 env``: print what to set so that stock nnU-Net finds the trainer."""

from __future__ import annotations

import argparse

from nnunet_sam2.trainers.discovery import SHELLS, TRAINER_NAME, export_lines, require_nnunet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--shell", choices=SHELLS, default=SHELLS[0], help="syntax of the lines (default: %(default)s)")
    parser.epilog = (
        f'In a shell: eval "$(nnunet_sam2 env)", then nnUNetv2_train DATASET CONFIGURATION FOLD -tr {TRAINER_NAME}. '
        "To have it in every shell of this Python: nnunet_sam2 hook install."
    )


def run(args: argparse.Namespace) -> int:
    """Print the export lines on standard output, and nothing else, so that a shell can evaluate them."""
    require_nnunet()
    print("\n".join(export_lines(args.shell)))
    return 0
