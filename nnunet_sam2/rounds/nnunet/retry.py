"""What is tried once more, and how, after a child process failed: by the cause, never twice, never silently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from nnunet_sam2.progress import say
from nnunet_sam2.rounds.nnunet.failures import Cause, ProcessError

Result = TypeVar("Result")
Note = Callable[[str, str], None]
"""Takes cause and remedy of a second attempt, before it begins."""

FEW_WORKERS = 2
"""Augmentation processes of a second attempt; nnU-Net's own choice is up to 12."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Hold what a second attempt does otherwise."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of the first attempt's."""
    offload: bool = False
    """Gather a prediction in main memory instead of the GPU's."""


def no_note(cause: str, remedy: str) -> None:
    """Note a second attempt nowhere but in the output."""


def once_more(
    attempt: Callable[[Remedy | None], Result], choose: Callable[[Cause], Remedy | None], *, note: Note = no_note
) -> Result:
    """Make an attempt, and a second one where the first fails for a cause that has a remedy."""
    try:
        return attempt(None)
    except ProcessError as error:
        remedy = choose(error.cause)
        if remedy is None:
            raise
        say(f"{str(error).splitlines()[0]}\ntrying once more, {remedy.name}")
        note(error.cause.value, remedy.name)
    return attempt(remedy)


def training_remedy(cause: Cause, *, on_gpu: bool) -> Remedy | None:
    """Choose how a training goes on from its latest checkpoint; None where the same would happen again.

    A smaller batch is no remedy: it is part of the plans, and the round would no longer be what its record says.
    """
    if cause is Cause.DEVICE_MEMORY:
        return Remedy(
            name="with memory segments that can grow (less is lost between them)",
            environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        )
    if cause in (Cause.KILLED, Cause.WORKERS, Cause.SHARED_MEMORY, Cause.HUNG) and on_gpu:
        workers = "0" if cause is Cause.SHARED_MEMORY else str(FEW_WORKERS)
        return Remedy(
            name=f"from the latest checkpoint, with {workers} augmentation processes",
            environment={"nnUNet_n_proc_DA": workers},
        )
    if cause in (Cause.KILLED, Cause.HUNG):
        return Remedy(name="from the latest checkpoint")
    return None


def prediction_remedy(cause: Cause) -> Remedy | None:
    """Choose how the cases that are not yet predicted are."""
    if cause is Cause.DEVICE_MEMORY:
        return Remedy(name="gathering the results in main memory instead of the GPU's", offload=True)
    if cause in (Cause.KILLED, Cause.WORKERS, Cause.SHARED_MEMORY):
        return Remedy(name="with one process", environment={"nnUNet_def_n_proc": "1"})
    if cause is Cause.HUNG:
        return Remedy(name="with the cases that are left")
    return None
