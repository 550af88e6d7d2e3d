"""SAM 2 on a GPU that is full: what is left of a stage is done on the CPU, once, and said so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nnunet_sam2.progress import say
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.nnunet.failures import Cause

Result = TypeVar("Result")


def on_cpu_if_full(run: RunContext, work: Callable[[Any], Result]) -> Result:
    """Do ``work`` with the run's SAM 2; where the GPU's memory does not suffice, what is left of it on the CPU.

    The back end has halved its batch down to one slice by then. Cases that are done stay done: labels are kept case by
    case, and the CPU computes in the same number format.
    """
    backend = run.backend
    try:
        return work(backend)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    remedy = "SAM 2 does the rest of this stage on the CPU"
    say(f"{Cause.DEVICE_MEMORY.value} ({reason}); {remedy}")
    run.ledger.note_retry(Cause.DEVICE_MEMORY.value, remedy)
    return work(run.cpu_backend(backend))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a GPU, of whatever maker, had too little memory."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()
