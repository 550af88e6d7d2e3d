"""One cell of the bench: label the queries as `nnunet_sam2 label` does, score, count, and foretell the scores."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from baselines import CopyBaseline
from registration_baseline import DeformableBaseline

from methods_bench.counting import CountingBackend, spent
from methods_bench.scores import organ_slice_dice
from methods_bench.tasks import Task
from methods_bench.variants import COPIES, DEFORMABLE, STUDENT, Variant
from nnunet_sam2.evaluation import compare
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class, of_other_patients, several_patients
from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.calibration import Calibration, Pair
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.probe import QualityProbe
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategy import BringsFusion, Limits, Prepares, PreparesCohort, Strategy
from nnunet_sam2.support.cases import Query, Support

_DECIMALS = 4
Cost = dict[str, Any]


class Labeller:
    """Label cases of one task by one strategy, as the labelling job does."""

    def __init__(
        self, strategy: Strategy, supports: Sequence[Support], task: Task, backend: CountingBackend, seed: int
    ):
        self._strategy = strategy
        self._supports = supports
        self._values = task.class_values
        self._backend = backend
        self._seed = seed
        asked = FusionOptions()
        self._fusion = strategy.fusion(asked) if isinstance(strategy, BringsFusion) else asked

    def prepare(self, queries: Sequence[Query]) -> None:
        """Let the strategy look at supports, and at all images where it wants to."""
        if isinstance(self._strategy, Limits):
            for query in queries:
                self._strategy.check(query.case_id, len(query.frames))
        if isinstance(self._strategy, PreparesCohort):
            cohort = [*(support.as_query() for support in self._supports), *queries]
            self._strategy.prepare_cohort(cohort, self._supports, self._values, self._backend)
        elif isinstance(self._strategy, Prepares):
            self._strategy.prepare(self._supports, self._values, self._backend)

    def label(self, query: Query, *, labelled: bool) -> PseudoLabel:
        """Label one case: a labelled one from the supports of other patients, any other from all supports."""
        others = of_other_patients(query, self._supports) if labelled else list(self._supports)
        single = single_component_classes([support.label_zyx for support in others], self._values)
        fusion = dataclasses.replace(self._fusion, single_component_classes=single)
        # Not Python's own hash, which differs from process to process.
        rng = np.random.default_rng([self._seed, zlib.crc32(query.case_id.encode())])
        return fuse(self._strategy.members(query, others, self._values, self._backend, rng), self._values, fusion)


class Students:
    """Keep what `STUDENT` makes of a task's cases, for the strategies that redraw a student's map."""

    def __init__(self, backend: CountingBackend, seed: int) -> None:
        self._backend = backend
        self._seed = seed
        self._kept: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}

    def keep(self, task: Task, case_id: str, prob_czyx: np.ndarray) -> None:
        """Keep a case's probabilities as a student's are stored, (C, Z, Y, X) uint8."""
        self._maps(task)[case_id] = np.rint(prob_czyx * 255.0).astype(np.uint8)

    def of(self, task: Task) -> dict[str, np.ndarray]:
        """Return the probabilities of queries and supports, the latter labelled from other patients, if any."""
        maps = self._maps(task)
        wanted = [*(task.supports if several_patients(task.supports) else ()), *task.queries]
        missing = [case for case in wanted if case.case_id not in maps]
        if missing:
            labeller = Labeller(make_strategy(STUDENT), task.supports, task, self._backend, self._seed)
            labeller.prepare([])
            for case in missing:
                labelled = case in task.supports
                self.keep(task, case.case_id, labeller.label(case.as_query(), labelled=labelled).prob_czyx)
        return maps

    def _maps(self, task: Task) -> dict[str, np.ndarray]:
        key = (task.name, tuple(support.case_id for support in task.supports))
        return self._kept.setdefault(key, {})


def measure(
    variant: Variant,
    strategy: Strategy,
    tasks: Sequence[Task],
    backend: CountingBackend,
    students: Students,
    *,
    seed: int,
    quality: QualityOptions,
    calibrate: bool,
) -> dict[str, Any]:
    """Label and score every query of every task; a JSON value with ``cases`` and what all cases share."""
    # Organs of one case share its embeddings: they are counted once.
    backend.counter.new_cell()
    rows = []
    for number, task in enumerate(tasks):
        # What a strategy has prepared belongs to one task.
        own = strategy if number == 0 else type(strategy)(strategy.options)
        rows.append(
            _measure_task(variant, own, task, backend, students, seed=seed, quality=quality, calibrate=calibrate)
        )
    return merged(rows)


def measure_copies(variant: Variant, tasks: Sequence[Task]) -> dict[str, Any]:
    """Label and score every query by one of the copies."""
    rows = []
    for task in tasks:
        with _meter(None) as prepared:
            copies: CopyBaseline | DeformableBaseline
            if variant.strategy == DEFORMABLE:
                copies = DeformableBaseline(task.supports)
            else:
                copies = CopyBaseline(task.supports, registered=variant.strategy == COPIES[1])
        cases = {}
        for case in task.queries:
            with _meter(None) as cost:
                label_zyx = copies.label(case.as_query())
            cases[case.case_id] = {**scored(case, label_zyx, task), "quality": {}, "cost": cost}
        rows.append({"cases": cases, "prepare": prepared, "quality_cost": {}, "calibration": None})
    return merged(rows)


def scored(case: Support, label_zyx: np.ndarray, task: Task) -> dict[str, Any]:
    """Compare a label with the truth, by part; see `compare` for what a missed part gets."""
    found = compare(case.label_zyx, label_zyx, case.geometry, classes=task.scored)
    axis = case.frames.slice_axis
    return {
        "dice": {part: rounded(row["dice"]) for part, row in found.items()},
        "hd95": {part: rounded(row["hd95"], 2) for part, row in found.items()},
        "organ_slices": {
            part: rounded(organ_slice_dice(np.isin(label_zyx, values), np.isin(case.label_zyx, values), axis))
            for part, values in task.scored.items()
        },
    }


def merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the tasks of a cell together: a case has the parts of all of them, and costs their sum."""
    if len(rows) == 1:
        return rows[0]
    cases: dict[str, Any] = {}
    for row in rows:
        for case_id, case in row["cases"].items():
            if case_id not in cases:
                cases[case_id] = case
                continue
            mine = cases[case_id]
            for kind in ("dice", "hd95", "organ_slices", "quality"):
                mine[kind] = {**mine[kind], **case[kind]}
            mine["cost"] = added(mine["cost"], case["cost"])
    return {
        "cases": cases,
        "prepare": _sum([row["prepare"] for row in rows]),
        "quality_cost": _sum([row["quality_cost"] for row in rows]),
        "calibration": rows[0]["calibration"],
    }


def added(a: Mapping[str, Any], b: Mapping[str, Any]) -> Cost:
    """Add two costs."""
    return {name: rounded(a.get(name, 0) + b.get(name, 0)) for name in {**a, **b}}


def rounded(value: float | None, decimals: int = _DECIMALS) -> float | None:
    """Round what is known; whole numbers stay whole."""
    return value if value is None or isinstance(value, int) else round(float(value), decimals)


def _measure_task(
    variant: Variant,
    strategy: Strategy,
    task: Task,
    backend: CountingBackend,
    students: Students,
    *,
    seed: int,
    quality: QualityOptions,
    calibrate: bool,
) -> dict[str, Any]:
    supports, queries = list(task.supports), [case.as_query() for case in task.queries]
    if getattr(strategy, "uses_student", False):
        maps = students.of(task)
        supports = [dataclasses.replace(s, student_prob_czyx=maps.get(s.case_id)) for s in supports]
        queries = [dataclasses.replace(q, student_prob_czyx=maps[q.case_id]) for q in queries]
    labeller = Labeller(strategy, supports, task, backend, seed)
    probe = QualityProbe(task.class_values, quality)
    lends = variant.name == STUDENT
    with _meter(backend) as prepared:
        for support in supports:
            backend.ask(support.embeddings)
        labeller.prepare(queries)
    cases, seen, probe_cost = {}, {}, {}
    for truth, query in zip(task.queries, queries, strict=True):
        with _meter(backend) as cost:
            backend.ask(query.embeddings)
            pseudo = labeller.label(query, labelled=False)
        if lends:
            students.keep(task, query.case_id, pseudo.prob_czyx)
        with _meter(backend) as looked:
            seen[query.case_id] = probe.measure(query, pseudo, of_other_patients(query, supports) or supports)
        probe_cost = added(probe_cost, looked)
        cases[query.case_id] = {**scored(truth, pseudo.label_zyx, task), "cost": cost}
        cases[query.case_id]["truth"] = dice_by_class(pseudo.label_zyx, truth.label_zyx, task.class_values)
    pairs = []
    with _meter(backend) as calibrating:
        for support in supports if calibrate and several_patients(supports) else ():
            pseudo = labeller.label(support.as_query(), labelled=True)
            if lends:
                students.keep(task, support.case_id, pseudo.prob_czyx)
            pairs.append(
                Pair(
                    case_id=support.case_id,
                    features=probe.measure(support.as_query(), pseudo, of_other_patients(support, supports)),
                    dice=dice_by_class(pseudo.label_zyx, support.label_zyx, task.class_values),
                    patient=support.patient,
                )
            )
    calibration = Calibration(class_values=task.class_values, pairs=tuple(pairs), options=quality)
    only = len(task.class_values) == 1
    for case_id, features in seen.items():
        estimates, truths = calibration.estimate(features), cases[case_id].pop("truth")
        cases[case_id]["quality"] = {
            # A task of one class carries its name: several of them may make up a cell.
            (task.name if only else str(value)): {
                "dice": rounded(truths[value]),
                "estimate": rounded(estimates[value].dice),
                "lower": rounded(estimates[value].lower),
                "coverage": rounded(estimates[value].coverage),
            }
            for value in task.class_values
        }
    return {
        "cases": cases,
        "prepare": prepared,
        "quality_cost": probe_cost,
        "calibration": _calibration_record(calibration, task, calibrating) if pairs else None,
    }


def _calibration_record(calibration: Calibration, task: Task, cost: Cost) -> dict[str, Any]:
    only = len(task.class_values) == 1
    counts = {}
    for value in task.class_values:
        rows = [p for p in calibration.pairs if p.features[value].voxels and p.dice.get(value) is not None]
        counts[task.name if only else str(value)] = len({pair.patient_id for pair in rows})
    return {
        "calibrated": calibration.calibrated,
        "cases": counts,
        "coverage": calibration.options.coverage,
        "cost": cost,
    }


def _sum(costs: Sequence[Mapping[str, Any]]) -> Cost:
    total: Cost = {}
    for cost in costs:
        total = added(total, cost)
    return total


@contextmanager
def _meter(backend: CountingBackend | None) -> Iterator[Cost]:
    """Fill in what the block costs, without the time that encoding takes."""
    cost: Cost = {}
    before = backend.counter.reading() if backend else {}
    wall, cpu = time.monotonic(), time.process_time()
    yield cost
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    counted = spent(before, backend.counter.reading()) if backend else {}
    cost["wall"] = rounded(wall - counted.get("embed_wall", 0.0))
    cost["cpu"] = rounded(cpu - counted.get("embed_cpu", 0.0))
    for name in ("slices_to_encode", "training_slices", "memory_reads"):
        cost[name] = counted.get(name, 0)
