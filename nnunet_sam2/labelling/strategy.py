"""What a labelling strategy gets, and what it has to offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support


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
        """Check on all supports, each patient left out in turn, and return a JSON record of what was found.

        What was found on a case is not used when that case is itself the query.
        """
        ...


@runtime_checkable
class PreparesCohort(Protocol):
    """Mark a strategy that looks at the images of the whole cohort, once, before any query."""

    def prepare_cohort(
        self,
        cases: Sequence[Query],
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
    ) -> dict[str, Any]:
        """Look at all cases and return a JSON record of what was found.

        ``cases`` are the labelled and unlabelled cases, without labels, in the cohort's order; each is read anew
        whenever it is asked for. Test cases are not among them. What human labels of ``supports`` say about a case is
        not used when that case is itself the query.
        """
        ...


@runtime_checkable
class Limits(Protocol):
    """Mark a strategy that cannot serve every case, or that needs something which may be absent."""

    def check(self, case_id: str, slices: int) -> None:
        """Raise `InputError` where a case with so many slices cannot be labelled; asked before anything is written."""
        ...


@runtime_checkable
class BringsFusion(Protocol):
    """Mark a strategy whose options may say how its members are fused."""

    def fusion(self, asked: FusionOptions) -> FusionOptions:
        """Return ``asked`` with what the strategy's own options say instead."""
        ...


@runtime_checkable
class WithoutOtherClasses(Protocol):
    """Mark a strategy that takes a single class for more than one of several; see `class_groups.GroupLabeller`."""

    def without_other_classes(self) -> Strategy:
        """Return a strategy like this one for some of the cohort's classes, which has looked at nothing yet."""
        ...
