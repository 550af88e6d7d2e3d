"""The computer: accelerator, cores and threads, memory, shared memory, text encoding, nnU-Net's workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nnunet_sam2.doctor.finding import Finding, fail, ok, warn
from nnunet_sam2.machine import Memory
from nnunet_sam2.rounds.disk import readable

LEAST_MEMORY, GOOD_MEMORY = 3 * 10**9, 12 * 10**9
"""Bytes: what a small cohort with the CPU profile takes (hippocampus: 2 GB), and what 3D volumes of usual size do."""

GOOD_SHARED_MEMORY = 2 * 10**9
"""Bytes through which torch's augmentation workers hand batches to an accelerator's training."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
STOCK_WORKERS = 8
"""Processes that nnU-Net starts where ``nnUNet_def_n_proc`` says nothing."""

WORKERS = "nnUNet_def_n_proc"
_WORKER_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Hold what torch says of accelerators."""

    cuda: bool
    mps: bool
    built_for_cuda: bool
    name: str = ""
    memory: int = 0
    problem: str = ""
    """Why torch could not be asked."""


def read_accelerator() -> Accelerator:
    """Ask torch."""
    try:
        import torch

        cuda = torch.cuda.is_available()
        # Not by `mem_get_info`, for which a device that another program has to itself must be opened.
        device = torch.cuda.get_device_properties(0) if cuda else None
        return Accelerator(
            cuda=cuda,
            mps=torch.backends.mps.is_available(),
            built_for_cuda=torch.version.cuda is not None,
            name=device.name if device else "",
            memory=int(device.total_memory) if device else 0,
        )
    except Exception as error:  # whatever a broken installation raises is what the user wants to read
        text = str(error).strip().splitlines()
        return Accelerator(
            cuda=False, mps=False, built_for_cuda=False, problem=f"{type(error).__name__}: {text[-1] if text else ''}"
        )


def check_accelerator(found: Accelerator, *, has_nvidia: bool) -> Finding:
    """Say what trains; ``has_nvidia`` where the system shows an NVIDIA device."""
    if found.problem:
        return fail(
            "accelerator", f"torch does not import: {found.problem}", "pip install --force-reinstall torch torchvision"
        )
    if found.cuda:
        return ok("accelerator", f"CUDA: {found.name}, {readable(found.memory)}")
    if has_nvidia and found.built_for_cuda:
        return warn(
            "accelerator",
            "an NVIDIA device is there, but torch cannot use it",
            "update its driver (nvidia-smi shows it), or in a container give --gpus all",
        )
    if has_nvidia:
        return warn(
            "accelerator", "an NVIDIA device, but a torch for CPUs", "install the torch of PyPI: pip install torch"
        )
    if found.mps:
        return ok("accelerator", "MPS (Apple)")
    return ok("accelerator", "none: run takes the CPU profile, a lighter network and schedule")


def check_threads(environment: Mapping[str, str], cores: int) -> Finding:
    """Hold the variables that set numbers of threads against the cores."""
    for name in THREAD_VARIABLES:
        text = environment.get(name, "").strip()
        if text and (not text.isdecimal() or int(text) < 1):
            return fail("threads", f"{name}={text} is no number of threads", f"unset {name}")
        if text and int(text) > cores:
            return warn("threads", f"{name}={text}, but {cores} cores may be used", f"export {name}={cores}")
    return ok("threads", f"{cores} cores may be used")


def check_memory(memory: Memory) -> Finding:
    """Hold memory against what runs took."""
    limit = "" if memory.limit is None else " (the limit of this container or job)"
    text = f"{readable(memory.usable)}{limit}, {readable(memory.available)} free now"
    estimate = "nnunet_sam2 run -d ID --dry-run says what a run needs"
    if memory.usable < LEAST_MEMORY:
        raised = "give the container or job more" if memory.limit is not None else "use a machine with more"
        return fail("memory", text, f"{raised}, {readable(LEAST_MEMORY)} at least; {estimate}")
    if min(memory.usable, memory.available) < GOOD_MEMORY:
        return warn("memory", text, f"enough for small volumes; for others end other programs; {estimate}")
    return ok("memory", text)


def check_shared_memory(size: int | None, *, accelerator: bool) -> Finding:
    """Hold the shared memory against what workers of an accelerator's training need."""
    if size is None:
        return ok("shared memory", "no /dev/shm on this system")
    if size < GOOD_SHARED_MEMORY and accelerator:
        mend = "in a container: docker run --shm-size=8g, or --ipc=host; else export nnUNet_n_proc_DA=0"
        return warn("shared memory", f"/dev/shm has {readable(size)}: nnU-Net's workers may die in it", mend)
    return ok("shared memory", f"/dev/shm has {readable(size)}")


def check_locale(encoding: str, *, utf8_mode: bool) -> Finding:
    """Hold the encoding of files and names against UTF-8."""
    if utf8_mode or encoding.lower().replace("-", "").replace("_", "") == "utf8":
        return ok("locale", encoding)
    return warn(
        "locale",
        f"text files are read as {encoding}: names with other letters may break nnU-Net",
        "export PYTHONUTF8=1",
    )


def check_workers(environment: Mapping[str, str], *, cores: int, memory: int) -> Finding:
    """Give advice on the processes that stock nnU-Net commands start; a loop sets its own number."""
    text = environment.get(WORKERS, "").strip()
    good = max(1, min(cores, memory // _WORKER_BYTES))
    if text and (not text.isdecimal() or int(text) < 1):
        return fail(WORKERS, f"{text} is no number of processes: nnU-Net will not start", f"export {WORKERS}={good}")
    count = int(text) if text else STOCK_WORKERS
    if count > good:
        set_by = "" if text else " (nnU-Net's default)"
        what = (
            f"{count} processes{set_by} on {cores} cores and {readable(memory)}: stock nnU-Net commands may run short"
        )
        return warn(WORKERS, what, f"export {WORKERS}={good}")
    return ok(WORKERS, f"{count} processes")
