"""What a cell of the bench labels: supports, queries with their truth, and what is scored of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from bench_sets import SETS, Sam2BenchSet, draw_cases, drawn_cases, load_case

from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Support

FEW_SHOT = "chaos_t2_mr, organ by organ"
"""Name of the few-shot protocol among the sets: one support, each organ for itself."""

_FEW_SHOT_SET = "chaos_t2_mr"


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Hold one labelling problem."""

    name: str
    scored: Mapping[str, tuple[int, ...]]
    supports: Sequence[Support]
    queries: Sequence[Support]
    """With their truth, which nobody but the scores looks at."""

    @property
    def class_values(self) -> tuple[int, ...]:
        """Return the classes that the supports show."""
        return tuple(sorted({int(v) for support in self.supports for v in np.unique(support.label_zyx) if v}))


def set_of(name: str) -> Sam2BenchSet:
    """Return what a name of the bench stands for; the few-shot protocol's four organs are those of its set."""
    return SETS[_FEW_SHOT_SET if name == FEW_SHOT else name]


def case_names(name: str, supports: int, queries: int, seed: int) -> tuple[list[str], list[str]]:
    """Name the support and query files of a cell; fewer queries are the first ones of more.

    The few-shot protocol has the one support of the set's own cells, and every other patient is a query.
    """
    bench = set_of(name)
    if name != FEW_SHOT:
        given, asked = draw_cases(bench, supports, bench.queries, seed)
        return given, asked[:queries]
    drawn = drawn_cases(bench, seed)
    support = drawn[bench.queries]
    return [support], [case for case in drawn if case != support][:queries]


class Cases:
    """Read and encode each case once for all cells of one back end."""

    def __init__(self, backend: Sam2Backend | None) -> None:
        self._backend = backend
        self._read: dict[tuple[str, str], Support] = {}

    def case(self, bench: Sam2BenchSet, name: str) -> Support:
        """Return a case with its label."""
        key = (bench.name, name)
        if key not in self._read:
            self._read[key] = load_case(bench, name, self._backend)
        return self._read[key]

    def tasks(self, name: str, supports: int, queries: int, seed: int) -> list[Task]:
        """Return the labelling problems of a cell: one, or one for each organ."""
        bench = set_of(name)
        support_names, query_names = case_names(name, supports, queries, seed)
        given = [self.case(bench, case) for case in support_names]
        asked = [self.case(bench, case) for case in query_names]
        if name != FEW_SHOT:
            return [Task(name=name, scored=bench.scored, supports=given, queries=asked)]
        return [
            Task(
                name=organ,
                scored={organ: (1,)},
                supports=[_only(case, values) for case in given],
                queries=[_only(case, values) for case in asked],
            )
            for organ, values in bench.scored.items()
        ]


def _only(case: Support, values: Sequence[int]) -> Support:
    return replace(case, label_zyx=np.isin(case.label_zyx, values).astype(np.uint8))
