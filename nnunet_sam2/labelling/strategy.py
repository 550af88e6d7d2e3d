"""What a labelling strategy gets, and what it has to offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """Hold the volume that wants a label."""

    case_id: str
    frames: Frames
    embeddings: Embeddings
    geometry: Geometry
    student_prob_czyx: np.ndarray | None = None
    """The student's probabilities on the query's grid, background first, where a round has a student."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Support:
    """Hold a labelled volume that a strategy may learn from."""

    case_id: str
    frames: Frames
    embeddings: Embeddings
    label_zyx: np.ndarray
    """The human label map, unsigned integers, on the volume's own grid."""
    geometry: Geometry
    ignore_value: int | None = None
    """Value of voxels that nobody has judged: they are evidence neither for a class nor for the background."""
    student_prob_czyx: np.ndarray | None = None
    """The student's probabilities for this case, where there are some: lets prompting be checked on it."""

    def __post_init__(self) -> None:
        if self.label_zyx.shape != self.geometry.shape_zyx:
            raise ValueError(
                f"support {self.case_id}: label shape {self.label_zyx.shape} against {self.geometry.shape_zyx}"
            )

    def as_query(self) -> Query:
        """Return the case as a query, for checks that leave it out of the supports."""
        return Query(
            case_id=self.case_id,
            frames=self.frames,
            embeddings=self.embeddings,
            geometry=self.geometry,
            student_prob_czyx=self.student_prob_czyx,
        )


class Strategy(Protocol):
    """Turn supports and a query into members; made with one frozen dataclass of options."""

    name: ClassVar[str]
    needs_memory: ClassVar[bool]
    """True where the strategy calls `Sam2Backend.propagate`: an image-only checkpoint is then refused by name."""

    @property
    def options(self) -> Any:
        """Return the frozen options dataclass; it goes into the record of every label."""
        ...

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the members one by one, so that fifty of them never lie in memory together.

        ``class_values`` are ascending and define axis k of the members. ``supports`` never hold the query itself. The
        same ``rng`` state gives the same members.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """Mark a strategy that checks something on the labelled cases, once, before any query."""

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Check on all supports, each left out in turn, and return a JSON record of what was found.

        What was found on a case is not used when that case is itself the query.
        """
        ...
