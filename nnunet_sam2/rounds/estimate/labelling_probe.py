"""The process that times SAM 2: ``python -m nnunet_sam2.rounds.estimate.labelling_probe REQUEST ANSWER``.

A few cases of the cohort, cut to a few slices where they are long, are labelled by the run's own strategy, from all the
given supports and from half of them: what a slice costs, and how that grows with the supports.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.rounds.disk import folder_bytes
from nnunet_sam2.rounds.estimate.clock import Clock, StopWatch, peak_gpu_memory, peak_memory
from nnunet_sam2.rounds.estimate.sizes import walked_axes
from nnunet_sam2.storage import file_hash, read_json, write_json


def main(argv: Sequence[str]) -> int:
    """Time what ``argv[0]`` asks for and write ``argv[1]``."""
    request = read_json(Path(argv[0]))
    begun = StopWatch(since=request["spawned"], cpu_since=0.0)
    with contextlib.redirect_stdout(sys.stderr):
        write_json(Path(argv[1]), _measure(request, Path(argv[1]).parent, begun))
    return 0


def _measure(request: dict[str, Any], folder: Path, begun: StopWatch) -> dict[str, Any]:
    from nnunet_sam2.cohort.cohort import Cohort
    from nnunet_sam2.rounds.context import load_labeller
    from nnunet_sam2.rounds.options import RunOptions
    from nnunet_sam2.sam2.cache import EmbeddingCache
    from nnunet_sam2.support.showing import Showing, cohort_slice_axis

    answer: dict[str, Any] = {}
    cohort = Cohort.load(Path(request["raw"]))
    options = RunOptions(**request["options"])
    backend = load_labeller(options, cache_dir=folder / "embeddings")
    answer["image_size"] = backend.spec.image_size
    answer["start"] = begun.read()
    answer["start_memory_bytes"] = peak_memory()
    slice_axis, showing = cohort_slice_axis(cohort), Showing(cohort=cohort, support_ids=tuple(request["supports"]))
    with Clock(answer, "encoding"):
        supports = [_support(showing, case_id, backend, slice_axis, request) for case_id in request["supports"]]
        queries = [_query(showing, case_id, backend, slice_axis, request) for case_id in request["queries"]]
    answer["encoded_slices"] = sum(len(case.frames) for case in (*supports, *queries))
    answer["encoded_bytes"] = folder_bytes(folder / "embeddings")
    with Clock(answer, "reading"):
        for case in supports:
            if EmbeddingCache(folder / "embeddings").get(case.embeddings.key) is None:
                raise RuntimeError("embeddings that were kept a moment ago are not there")
    _label(answer, cohort, options, backend, supports, queries, request, folder)
    _refine(answer, cohort, options, backend, supports, queries)
    answer["memory_bytes"] = peak_memory()
    answer["gpu_bytes"] = peak_gpu_memory(options.device)
    return answer


def _label(
    answer: dict[str, Any],
    cohort: Any,
    options: Any,
    backend: Any,
    supports: Sequence[Any],
    queries: Sequence[Any],
    request: dict[str, Any],
    folder: Path,
) -> None:
    """Do what a labelling job does with a case, and time the parts; the labels once more from fewer supports."""
    from nnunet_sam2.labelling.class_groups import GroupLabeller, GroupProbe
    from nnunet_sam2.labelling.components import single_component_classes
    from nnunet_sam2.labelling.fusion import FusionOptions
    from nnunet_sam2.labelling.quality.options import QualityOptions
    from nnunet_sam2.labelling.registry import make_strategy
    from nnunet_sam2.labelling.strategy import BringsFusion

    values = cohort.class_values
    strategy = make_strategy(options.strategy, options.strategy_options)
    labeller = GroupLabeller(strategy, supports, values)
    with Clock(answer, "prepare"):
        labeller.prepare(backend, [*(support.as_query() for support in supports), *queries])
    single = single_component_classes([support.label_zyx for support in supports], values)
    asked = FusionOptions()
    fusion = strategy.fusion(asked) if isinstance(strategy, BringsFusion) else asked
    fusion = replace(fusion, single_component_classes=single)

    def labels_from(given: Sequence[Any], name: str) -> list[Any]:
        with Clock(answer, name):
            rng = np.random.default_rng(options.seed)
            return [labeller.label(query, given, backend, rng, fusion) for query in queries]

    # The first time also encodes what the strategy cuts out of the query; the second finds it kept.
    labels = labels_from(supports, "labels")
    fewer = supports[: max(1, len(supports) // 2)]
    labels_from(supports, "labels_again")
    labels_from(fewer, "labels_from_fewer")
    answer["support_slices"] = sum(len(support.frames) for support in supports)
    answer["fewer_slices"] = sum(len(support.frames) for support in fewer)
    answer["query_shapes_zyx"] = [list(query.geometry.shape_zyx) for query in queries]
    probe = GroupProbe(values, QualityOptions())
    with Clock(answer, "quality"):
        for query, pseudo in zip(queries, labels, strict=True):
            probe.measure(query, pseudo, supports)
    _write(answer, cohort, labels[0], tuple(request["written_shape_zyx"]), folder)


def _write(answer: dict[str, Any], cohort: Any, pseudo: Any, shape_zyx: tuple[int, int, int], folder: Path) -> None:
    """Write what a job writes of a case, at a case's full size: the files' own cost is no small part of it."""
    from nnunet_sam2.geometry import Geometry
    from nnunet_sam2.support.library import write_probabilities
    from nnunet_sam2.volumes import write_label, write_map

    geometry = Geometry(shape_zyx=shape_zyx)
    label_zyx = np.resize(pseudo.label_zyx, shape_zyx)
    confidence_zyx = np.resize(pseudo.confidence_zyx, shape_zyx)
    prob_czyx = np.stack([np.resize(prob_zyx, shape_zyx) for prob_zyx in pseudo.prob_czyx])
    files = [folder / f"label{cohort.file_ending}", folder / f"map{cohort.file_ending}", folder / "prob.npz"]
    with Clock(answer, "writing"):
        write_label(files[0], label_zyx, geometry)
        write_map(files[1], confidence_zyx, geometry)
        write_probabilities(files[2], prob_czyx)
        for path in files:
            file_hash(path)
    answer["written_voxels"] = label_zyx.size


def _refine(
    answer: dict[str, Any],
    cohort: Any,
    options: Any,
    backend: Any,
    supports: Sequence[Any],
    queries: Sequence[Any],
) -> None:
    """Label a case as a later round does, prompted by a student: here its human label stands for the student's."""
    from nnunet_sam2.labelling.fusion import fuse
    from nnunet_sam2.labelling.registry import make_strategy

    values = cohort.class_values
    own = make_strategy(options.strategy, options.strategy_options)
    strategy = own if getattr(own, "uses_student", False) else make_strategy("prompted", {})
    known = replace(supports[0], student_prob_czyx=_as_student(supports[0].label_zyx, values))
    with Clock(answer, "refine_prepare"):
        found = _prepare(strategy, [known], queries, values, backend)
    with Clock(answer, "refine"):
        fuse(strategy.members(known.as_query(), [known], values, backend, np.random.default_rng(0)), values)
    if strategy.name == "prompted":
        # A sure student leaves nothing to gain, so that no slice is redrawn now; one kind of prompt is what it takes.
        kinds = max(1, len(next(iter(found["prompt_check"].values()))) - 1)
        answer["refine"] = {key: value / kinds for key, value in answer["refine_prepare"].items()}
    answer["refined_shape_zyx"] = list(known.geometry.shape_zyx)


def _prepare(
    strategy: Any, supports: Sequence[Any], queries: Sequence[Any], values: tuple[int, ...], backend: Any
) -> Any:
    from nnunet_sam2.labelling.strategy import Prepares, PreparesCohort

    if isinstance(strategy, PreparesCohort):
        cases = [*(support.as_query() for support in supports), *queries]
        return strategy.prepare_cohort(cases, supports, values, backend)
    if isinstance(strategy, Prepares):
        return strategy.prepare(supports, values, backend)
    return None


def _as_student(label_zyx: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """Return probabilities as a student leaves them (uint8 steps of 1/255, background first): sure of a label map."""
    return np.stack([label_zyx == value for value in (0, *values)]).astype(np.uint8) * 255


def _query(showing: Any, case_id: str, backend: Any, slice_axis: int, request: dict[str, Any]) -> Any:
    from nnunet_sam2.support.cases import Query
    from nnunet_sam2.support.library import read_turned

    case = showing.cohort.case(case_id)
    volume = read_turned(showing.cohort, case, showing.turn(case))
    frames = showing.frames(volume, size=backend.spec.image_size, slice_axis=slice_axis)
    start, stop = _part(volume, slice_axis, request, [n // 2 for n in volume.geometry.shape_zyx])
    frames = frames.cropped(start, stop)
    return Query(case_id=case_id, frames=frames, embeddings=backend.embed(frames), geometry=frames.geometry)


def _support(showing: Any, case_id: str, backend: Any, slice_axis: int, request: dict[str, Any]) -> Any:
    from nnunet_sam2.support.cases import Support
    from nnunet_sam2.support.library import read_turned
    from nnunet_sam2.volumes import read_label

    cohort = showing.cohort
    case = cohort.case(case_id)
    turn = showing.turn(case)
    volume = read_turned(cohort, case, turn)
    label_zyx = turn.apply(read_label(cohort.label_path(case))[0])
    shown = np.argwhere(np.isin(label_zyx, cohort.class_values))
    middle = shown.mean(axis=0).astype(int).tolist() if len(shown) else [n // 2 for n in label_zyx.shape]
    start, stop = _part(volume, slice_axis, request, middle)
    frames = showing.frames(volume, size=backend.spec.image_size, slice_axis=slice_axis).cropped(start, stop)
    part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return Support(
        case_id=case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=np.ascontiguousarray(label_zyx[part]),
        geometry=frames.geometry,
        ignore_value=cohort.ignore_value,
        annotated=case.known_classes,
    )


def _part(case: Any, slice_axis: int, request: dict[str, Any], middle: Sequence[int]) -> tuple[Any, Any]:
    """Cut the axes along which a volume is walked to the slices that are asked for, around ``middle``."""
    walked = walked_axes(case.geometry, slice_axis, several_views=request["several_views"])
    start, stop = [], []
    for axis, size in enumerate(case.geometry.shape_zyx):
        length = min(size, request["most_slices"]) if axis in walked else size
        first = min(max(0, middle[axis] - length // 2), size - length)
        start.append(first)
        stop.append(first + length)
    return tuple(start), tuple(stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
