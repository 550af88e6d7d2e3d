"""Does stock nnU-Net find the trainer?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_sam2.doctor.finding import Finding, fail, ok, warn
from nnunet_sam2.trainers.discovery import (
    EXTENSION_VARIABLE,
    HOOK_FILE,
    TRAINER_NAME,
    environment,
    extension_folder,
    hook_line,
)

_MARK = "nnunet_sam2 doctor: found"
_CODE = (
    "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find; "
    f"print({_MARK!r}, find({TRAINER_NAME!r}).__name__)"
)
_MOST_SECONDS = 300


def ask_nnunet(variables: Mapping[str, str]) -> str:
    """Let a process with these variables look for the trainer as ``nnUNetv2_train`` does; return why it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE],
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MOST_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0 and _MARK in done.stdout:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def look_for_trainer(variables: Mapping[str, str] | None = None, *, trial: bool = False) -> Finding:
    """Look, with the user's own variables and else with those of a loop, where nnU-Net looks.

    A ``trial`` lets nnU-Net itself find and import the trainer, which takes some ten seconds of processor time.
    """
    variables = os.environ if variables is None else variables
    look = ask_nnunet if trial else _by_rule
    as_it_is = look(variables)
    in_loops = look({**variables, **environment(variables)}) if as_it_is else ""
    return check_trainer(as_it_is, in_loops, tried=trial)


def _by_rule(variables: Mapping[str, str]) -> str:
    """Return why nnU-Net would not find the trainer, by the rule that it goes by; nothing is imported."""
    folder = extension_folder()
    if str(folder) not in variables.get(EXTENSION_VARIABLE, "").split(os.pathsep):
        return f"{EXTENSION_VARIABLE} does not name {folder}"
    return "" if any(folder.glob("*.py")) else f"{folder} is empty"


def check_trainer(as_it_is: str, in_loops: str, *, tried: bool = True) -> Finding:
    """Judge why nnU-Net does not find the trainer with the user's own variables and with those of a loop."""
    if not as_it_is:
        untried = "" if tried else f" (where {EXTENSION_VARIABLE} says; doctor --trial imports it)"
        return ok("trainer", f"stock nnU-Net finds {TRAINER_NAME}{untried}")
    if not in_loops:
        return warn(
            "trainer",
            f"nnunet_sam2's own commands find {TRAINER_NAME}, stock nnU-Net's do not",
            'eval "$(nnunet_sam2 env)" in a shell, or once: nnunet_sam2 hook install',
        )
    mend = f"unset {EXTENSION_VARIABLE} if nothing else needs it; else pip install --force-reinstall nnunet_sam2"
    return fail("trainer", f"nnU-Net does not find {TRAINER_NAME}: {in_loops}", mend)


def check_hook(folders: Sequence[Path]) -> Finding:
    """Check that an installed start-up hook is this installation's."""
    for folder in folders:
        path = folder / HOOK_FILE
        if path.is_file():
            if path.read_text(encoding="utf-8", errors="replace") == hook_line():
                return ok("start-up hook", str(path))
            return warn("start-up hook", f"{path} is another installation's", "nnunet_sam2 hook install")
    return ok("start-up hook", "not installed (nnunet_sam2 env does the same for one shell)")
