"""``nnunet_sam2``: find the subcommand, run it, turn errors into one line and an exit status."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence

from nnunet_sam2 import __version__
from nnunet_sam2.errors import DISK_REFUSALS, NnunetSam2Error, describe_os_error
from nnunet_sam2.stopping import Stopped, end_now, last_word, stoppable

# name -> (module under nnunet_sam2.cli, help). A module offers add_arguments(parser) and run(args) -> int and is
# imported only when its name is called for: --help must answer without torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("convert", "make an nnU-Net dataset of labelled, unlabelled and test cases"),
    "label": ("label", "label the unlabelled cases with SAM 2"),
    "run": ("run", "alternate SAM 2 labelling and nnU-Net training until the labels stop changing"),
    "status": ("status", "show how far a run has come"),
    "clean": ("clean", "remove what killed runs left, embeddings, or a whole run; human labels are never touched"),
    "report": ("report", "write one HTML file on how a run went, with every case to look through"),
    "review": ("review", "look through a run's labels in a page, accept, reject or correct them"),
    "predict": ("predict", "segment images with the best round's model"),
    "evaluate": ("evaluate", "compare predictions with reference labels"),
    "check-submission": ("check_submission", "list what is missing or wrong in a folder or zip of predictions"),
    "export": ("export", "write a model folder that stock nnU-Net predicts with"),
    "weights": ("weights", "SAM 2 checkpoints by name: list, show, fetch, add, verify"),
    "env": ("env", "print the export lines with which stock nnU-Net finds the trainer"),
    "doctor": ("doctor", "check machine, installation and a dataset, and say how to mend what is amiss"),
    "hook": ("hook", "install or remove the start-up hook with which stock nnU-Net finds the trainer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed, 2 refused."""
    # Threads that spin while they wait for each other burn time where cores are shared (docs/performance.md); torch's
    # OpenMP reads this once, when it is loaded, and nnU-Net's processes inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="nnunet_sam2",
        description="A few labelled volumes and many unlabelled ones become a trained nnU-Net.",
        epilog="nnunet_sam2 COMMAND --help shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_sam2 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module_name, help_text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", allow_abbrev=False
        )
        if name == called:
            module = importlib.import_module(f"nnunet_sam2.cli.{module_name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    _write_what_the_locale_cannot()
    if called is not None and called not in COMMANDS:
        parser.error(f"there is no command {called!r}{_nearest(called, COMMANDS)}; known: {', '.join(COMMANDS)}")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        own = subparsers.choices[args.command]
        flags = [flag for action in own._actions for flag in action.option_strings]
        own.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(unknown[0].split('=')[0], flags)}")

    again = shlex.join(["nnunet_sam2", *arguments])

    def say_last(stopped: Stopped) -> None:
        _say_error(args.command, f"stopped by {stopped.name}; what is finished is kept, go on with: {again}")

    try:
        with stoppable(say_last):
            return int(args.run(args))
    except NnunetSam2Error as error:
        _say_error(args.command, _with_command(str(error), again))
        return error.exit_status
    except Stopped as stopped:
        last_word(say_last, stopped)
        if argv is None:  # the process is this command's own, and nothing after the last word may wait
            end_now(stopped.exit_status)
        return stopped.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_read_no_further():
            _say_error(args.command, "what it prints is read no further; it ends here, what is finished is kept")
            return 128 + signal.SIGPIPE
        if error.errno not in DISK_REFUSALS:
            raise
        _say_error(args.command, _with_command(describe_os_error(error), again))
        return 1


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that a mistyped one was most likely meant for, as the end of a message."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _with_command(text: str, again: str) -> str:
    """Write out, to be copied, the command that a message's way out calls the same one."""
    return text.replace("the same command", f"the same command ({again})", 1)


def _say_error(command: str, text: str) -> None:
    print(f"nnunet_sam2 {command}: {text}", file=sys.stderr, flush=True)


def _is_read_no_further() -> bool:
    """Say whether the reader of standard output has gone (``| head``); what is left to be written goes nowhere then."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _write_what_the_locale_cannot() -> None:
    """Let names with letters that the locale (LANG=C) or UTF-8 lacks be written as escapes, not end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
