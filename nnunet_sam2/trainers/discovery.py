"""How stock nnU-Net finds the trainer: a folder with one module, named in ``nnUNet_extTrainer``."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import write_text

EXTENSION_VARIABLE = "nnUNet_extTrainer"
TRAINER_NAME = "nnUNetTrainerSAM2"
SHELLS = ("posix", "fish", "powershell")
HOOK_FILE = "nnunet_sam2_hook.pth"
NNUNET_VERSIONS = ((2, 8), (2, 9))
"""First nnU-Net version that works, and the first that is not known to: the trainer overrides its methods."""


def extension_folder() -> Path:
    """Return the folder that holds the shim module and nothing else.

    nnU-Net imports every module of the folder, and forgets them afterwards: a folder with the trainer itself would
    give a second, unpicklable copy of its class. The shim only imports it from the package.
    """
    return Path(__file__).resolve().parent / "ext"


def search_path(current: str | None) -> str:
    """Append the extension folder to a value of ``nnUNet_extTrainer``; what the user set stays in front."""
    folder = str(extension_folder())
    parts = [part for part in (current or "").split(os.pathsep) if part.strip()]
    return os.pathsep.join(parts if folder in parts else [*parts, folder])


def environment(current: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables to set, beside those of ``current``, for an nnU-Net process that shall find the trainer."""
    current = os.environ if current is None else current
    return {EXTENSION_VARIABLE: search_path(current.get(EXTENSION_VARIABLE))}


def export_lines(shell: str = "posix", current: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines that set `environment` in a shell: ``posix``, ``fish`` or ``powershell``."""
    if shell not in SHELLS:
        raise InputError(f"unknown shell {shell!r}; known: {', '.join(SHELLS)}")
    variables = environment(current)
    if shell == "powershell":
        return ["$env:{} = '{}'".format(name, value.replace("'", "''")) for name, value in variables.items()]
    form = "export {}={}" if shell == "posix" else "set -gx {} {}"
    return [form.format(name, shlex.quote(value)) for name, value in variables.items()]


def require_nnunet() -> str:
    """Return the version of the installed nnunetv2; raise `InputError` where it is missing or not supported."""
    wanted = "{}.{}".format(*NNUNET_VERSIONS[0])
    below = "{}.{}".format(*NNUNET_VERSIONS[1])
    way_out = f"install it with: pip install 'nnunetv2>={wanted},<{below}'"
    try:
        version = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"nnunetv2 is not installed; {way_out}") from None
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise InputError(f"nnunetv2 has the unreadable version {version!r}; {way_out}") from None
    if not NNUNET_VERSIONS[0] <= (major, minor) < NNUNET_VERSIONS[1]:
        raise InputError(f"nnunetv2 {version} is not supported, only {wanted} up to, not including, {below}; {way_out}")
    return version


def hook_folder() -> Path:
    """Return the site-packages folder of this Python that can be written to."""
    candidates = [Path(sysconfig.get_path("purelib"))]
    if sys.prefix == sys.base_prefix and site.ENABLE_USER_SITE:
        candidates.append(Path(site.getusersitepackages()))
    for folder in candidates:
        if os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
            return folder
    raise InputError(
        f"no right to write to {candidates[0]}; use a virtual environment, or `nnunet_sam2 env` instead of the hook"
    )


def hook_places() -> list[Path]:
    """Return the folders in which the start-up hook may lie: this Python's, and the user's own where it reads that."""
    user = [Path(site.getusersitepackages())] if sys.prefix == sys.base_prefix else []
    return [Path(sysconfig.get_path("purelib")), *user]


def hook_line() -> str:
    """Return the start-up line: it runs at every start of Python, so it costs one look at the environment."""
    folder, name = str(extension_folder()), EXTENSION_VARIABLE
    return (
        f"import os; _f = {folder!r}; _v = {name!r}; "
        "_p = [p for p in os.environ.get(_v, '').split(os.pathsep) if p.strip()]; "
        "_p += [_f] if os.path.isdir(_f) and _f not in _p else []; "
        "_p and os.environ.__setitem__(_v, os.pathsep.join(_p)); del _f, _v, _p\n"
    )


def install_hook(folder: Path | None = None) -> Path:
    """Write the start-up hook into a site-packages folder and return its path; writing it again changes nothing."""
    path = (hook_folder() if folder is None else folder) / HOOK_FILE
    write_text(path, hook_line())
    return path


def remove_hook(folder: Path | None = None) -> list[Path]:
    """Remove the start-up hook wherever `install_hook` may have put it and return the removed files."""
    folders = [folder] if folder is not None else hook_places()
    removed = []
    for path in (candidate / HOOK_FILE for candidate in folders):
        if path.is_file():
            path.unlink()
            removed.append(path)
    return removed
