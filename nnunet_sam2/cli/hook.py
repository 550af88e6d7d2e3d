"""``nnunet_sam2 hook``: let every start of this Python tell nnU-Net where the trainer is."""

from __future__ import annotations

import argparse

from nnunet_sam2.progress import say
from nnunet_sam2.trainers.discovery import TRAINER_NAME, install_hook, remove_hook, require_nnunet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "action", choices=("install", "remove"), help="write the start-up file into site-packages, or take it away"
    )


def run(args: argparse.Namespace) -> int:
    """Install or remove the hook and say which file it is."""
    if args.action == "install":
        require_nnunet()
        path = install_hook()
        say(f"installed {path}: nnUNetv2_train -tr {TRAINER_NAME} now works without further settings")
        say("before uninstalling nnunet_sam2: nnunet_sam2 hook remove")
        return 0
    removed = remove_hook()
    say("\n".join(f"removed {path}" for path in removed) if removed else "no hook is installed")
    return 0
