"""Versions and machine of this process: what a result may depend on besides its inputs."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from nnunet_sam2 import __version__

PACKAGES = (
    "nnunetv2",
    "torch",
    "torchvision",
    "sam2",
    "numpy",
    "scipy",
    "SimpleITK",
    "nibabel",
    "scikit-image",
    "batchgenerators",
    "batchgeneratorsv2",
    "blosc2",
)


def provenance(*, gpu: bool = False) -> dict[str, Any]:
    """Return versions of the packages that results depend on, and the machine, as a JSON value.

    torch is imported only to name the ``gpu``.
    """
    return {
        "packages": {"nnunet_sam2": __version__, **{name: _version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpu": _gpu() if gpu else None,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> str | None:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
