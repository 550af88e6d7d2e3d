"""Is this machine ready for a run, and if not, how is that mended? Checks only; nothing is changed."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nnunet_sam2.doctor import checkpoints, computer, packages, storage_places, trainer
from nnunet_sam2.doctor.finding import Finding, Level, fail
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.machine import read_memory, shared_memory_bytes, usable_cores
from nnunet_sam2.sam2.weights.cache import VARIABLE as WEIGHTS_VARIABLE
from nnunet_sam2.sam2.weights.cache import cache_folder as weights_folder
from nnunet_sam2.trainers.discovery import hook_places

__all__ = ["Finding", "Level", "examine", "examine_dataset"]


def examine(*, trial: bool = False) -> Iterator[Finding]:
    """Look at this machine and installation, a finding at a time; what an installation is too broken for is one too.

    With ``trial``, nnU-Net is asked to find and import the trainer.
    """
    yield from _tried("packages", _packages)
    yield from _tried("computer", _computer)
    yield from _tried("folders", _folders)
    yield from _tried("weights cache", _weights_cache)
    yield from _tried("measurements", _measurements)
    yield from _tried("weights", _weights)
    yield from _tried("trainer", partial(_trainer, trial=trial))


def examine_dataset(folders: DatasetFolders) -> Iterator[Finding]:
    """Look at a dataset, a finding at a time."""
    from nnunet_sam2.doctor.dataset import check_dataset

    return check_dataset(folders)


def _has_nvidia() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _tried(check: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except Exception as error:  # as in `read_accelerator`: a package that is missing or broken may raise anything
        text = str(error).strip().splitlines()
        what = f"cannot be looked at: {type(error).__name__}: {text[-1] if text else ''}"
        yield fail(
            check, what, "mend what else fails, then ask doctor again; else pip install --force-reinstall nnunet_sam2"
        )


def _packages() -> Iterator[Finding]:
    requirements = packages.own_requirements()
    yield packages.check_python(platform.python_version(), packages.own_python())
    yield from packages.check_packages(requirements, packages.installed_version)
    yield from packages.check_extras(requirements, packages.installed_version)


def _computer() -> Iterator[Finding]:
    found = computer.read_accelerator()
    cores, memory = usable_cores(), read_memory()
    yield computer.check_accelerator(found, has_nvidia=_has_nvidia())
    yield computer.check_threads(os.environ, cores)
    yield computer.check_memory(memory)
    yield computer.check_shared_memory(shared_memory_bytes(), accelerator=found.cuda)
    yield computer.check_locale(locale.getpreferredencoding(False), utf8_mode=bool(sys.flags.utf8_mode))
    yield computer.check_workers(os.environ, cores=cores, memory=memory.usable)


def _folders() -> Iterator[Finding]:
    yield from storage_places.check_roots(os.environ)
    yield from storage_places.check_room(os.environ)


def _weights_cache() -> Iterator[Finding]:
    yield storage_places.check_cache("weights cache", weights_folder(), variable=WEIGHTS_VARIABLE)


def _measurements() -> Iterator[Finding]:
    from nnunet_sam2.rounds.estimate.selfbench import CACHE_VARIABLE, cache_folder

    yield storage_places.check_cache("measurements", cache_folder(), variable=CACHE_VARIABLE)


def _weights() -> Iterator[Finding]:
    yield checkpoints.check_embedded()
    yield from checkpoints.check_kept()


def _trainer(*, trial: bool) -> Iterator[Finding]:
    yield trainer.check_hook(hook_places())
    yield trainer.look_for_trainer(trial=trial)
