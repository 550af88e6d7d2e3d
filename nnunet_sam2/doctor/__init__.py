"""Is this machine ready for a run, and if not, how is that mended? Checks only; nothing is changed."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from nnunet_sam2.doctor import checkpoints, computer, packages, storage_places, trainer
from nnunet_sam2.doctor.finding import Finding, Level
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.machine import read_memory, shared_memory_bytes, usable_cores
from nnunet_sam2.rounds.estimate.selfbench import CACHE_VARIABLE
from nnunet_sam2.rounds.estimate.selfbench import cache_folder as estimates_folder
from nnunet_sam2.sam2.weights.cache import VARIABLE as WEIGHTS_VARIABLE
from nnunet_sam2.sam2.weights.cache import cache_folder as weights_folder
from nnunet_sam2.trainers.discovery import hook_places

__all__ = ["Finding", "Level", "examine", "examine_dataset"]


def examine() -> Iterator[Finding]:
    """Look at this machine and installation, a finding at a time."""
    requirements = packages.own_requirements()
    yield packages.check_python(platform.python_version(), packages.own_python())
    yield from packages.check_packages(requirements, packages.installed_version)
    yield from packages.check_extras(requirements, packages.installed_version)
    found = computer.read_accelerator()
    cores, memory = usable_cores(), read_memory()
    yield computer.check_accelerator(found, has_nvidia=_has_nvidia())
    yield computer.check_threads(os.environ, cores)
    yield computer.check_memory(memory)
    yield computer.check_shared_memory(shared_memory_bytes(), accelerator=found.cuda)
    yield computer.check_locale(locale.getpreferredencoding(False), utf8_mode=bool(sys.flags.utf8_mode))
    yield computer.check_workers(os.environ, cores=cores, memory=memory.usable)
    yield from storage_places.check_roots(os.environ)
    yield from storage_places.check_room(os.environ)
    yield storage_places.check_cache("weights cache", weights_folder(), variable=WEIGHTS_VARIABLE)
    yield storage_places.check_cache("measurements", estimates_folder(), variable=CACHE_VARIABLE)
    yield checkpoints.check_embedded()
    yield from checkpoints.check_kept()
    yield trainer.check_hook(hook_places())
    yield trainer.look_for_trainer()


def examine_dataset(folders: DatasetFolders) -> Iterator[Finding]:
    """Look at a dataset, a finding at a time."""
    from nnunet_sam2.doctor.dataset import check_dataset

    return check_dataset(folders)


def _has_nvidia() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
