"""A run's estimate: the cohort's sizes, this machine's measurements, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.machine import Memory, file_system, read_memory
from nnunet_sam2.rounds.decisions.waiting import waiting_cases
from nnunet_sam2.rounds.disk import LOOKS, RESERVE, embedding_bytes, folder_bytes, free_bytes, readable, run_size
from nnunet_sam2.rounds.estimate.costs import Cost, StageEstimate
from nnunet_sam2.rounds.estimate.labelling_costs import LabellingCosts
from nnunet_sam2.rounds.estimate.nnunet_costs import NnunetCosts
from nnunet_sam2.rounds.estimate.selfbench import Measured, measure
from nnunet_sam2.rounds.estimate.sizes import cells
from nnunet_sam2.rounds.estimate.stages import RunEstimator
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.rounds.nnunet import light_configuration, plans_path, read_plans
from nnunet_sam2.rounds.nnunet.cases import unlabelled_folder
from nnunet_sam2.rounds.nnunet.plan import MARKER_FILE, SPLITS_FILE
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import EMBEDDINGS, RUNS_FOLDER, run_folder
from nnunet_sam2.storage import read_json

BUSY = 1.25
"""Processes for each core from which on the machine is called busy."""


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Hold the stages of a run with what each takes, and what it was estimated from."""

    folder: Path
    stages: tuple[StageEstimate, ...]
    assumptions: tuple[str, ...]
    obstacles: tuple[str, ...]
    """Why the run cannot fit on this machine, each with its numbers and a way out."""
    warnings: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """Return the seconds of all stages."""
        return Cost.total(stage.cost for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Return the most memory of any stage."""
        return max((stage.memory_bytes for stage in self.stages), default=0)

    @property
    def gpu_bytes(self) -> int:
        """Return the most accelerator memory of any stage."""
        return max((stage.gpu_bytes for stage in self.stages), default=0)

    @property
    def disk_bytes(self) -> int:
        """Return what all stages leave on the disk."""
        return sum(stage.disk_bytes for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as a JSON value."""
        return {
            "run": str(self.folder),
            "stages": [stage.to_json() for stage in self.stages],
            "sum": {
                "seconds": round(self.cost.seconds, 1),
                "cpu_seconds": round(self.cost.cpu_seconds, 1),
                "memory_bytes": self.memory_bytes,
                "gpu_bytes": self.gpu_bytes,
                "disk_bytes": self.disk_bytes,
            },
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "obstacles": list(self.obstacles),
            "fits": not self.obstacles,
        }


def estimate_run(folders: DatasetFolders, options: RunOptions, *, again: bool = False) -> RunEstimate:
    """Estimate a run without beginning it: nothing is written but the measurements in the user's cache.

    Raises InputError where the cohort or the options cannot give a run, as `run_loop` does.
    """
    from nnunet_sam2.rounds.orchestrator import refuse_other_options, refuse_unusable

    known = Cohort.load(folders.raw)
    cohort = known.as_planned()
    refuse_unusable(folders, cohort, options)
    folder = run_folder(folders, options.run_name)
    events = read_events(folder / LEDGER_FILE)
    refuse_other_options(folder, events, options)
    validation = _validation(folders, cohort, options)
    held_out, patients = {case.case_id for case in validation}, {case.patient for case in validation}
    supports = tuple(c for c in cohort.labelled if options.supports == "all" or c.case_id not in held_out)
    # Labels that people drew since prompt SAM 2 as well.
    supports += tuple(c for c in known.labelled if c not in cohort.labelled and c.patient not in patients)
    if not supports:
        raise InputError(f"{cohort.name}: the fold validates on every labelled case; use --supports all or -f all")
    several = _several_views(options)
    measured = measure(
        folders,
        cohort,
        options,
        support_ids=tuple(case.case_id for case in supports),
        several_views=several,
        again=again,
    )
    features, without_features = features_to_keep(folders, cohort, options, measured.labelling["image_size"])
    estimator = _estimator(folders, cohort, options, validation, supports, measured, several, features)
    stages = estimator.stages()
    obstacles, warnings = _fit(folders, stages, measured, read_memory())
    if waiting := waiting_cases(known, folder, events, fold=options.fold):
        warnings = (
            f"people's word on {len(waiting)} of the cases waits: a round more than these stages follows, in which "
            "SAM 2 labels all cases anew where whole labels were drawn",
            *warnings,
        )
    return RunEstimate(
        folder=folder,
        stages=stages,
        assumptions=_assumptions(options, measured),
        obstacles=obstacles,
        warnings=(*without_features, *warnings),
    )


def _estimator(
    folders: DatasetFolders,
    cohort: Cohort,
    options: RunOptions,
    validation: tuple[Case, ...],
    supports: tuple[Case, ...],
    measured: Measured,
    several: bool,
    features_bytes: int,
) -> RunEstimator:
    from nnunet_sam2.support.showing import cohort_direction, cohort_slice_axis

    plans = read_plans(folders, options.plans) if plans_path(folders, options.plans).is_file() else None
    planned = plans is not None and _is_planned(folders, options)
    light = options.profile == "cpu"
    overrides = light_configuration(plans, options.configuration) if light and plans is not None else None
    return RunEstimator(
        cohort=cohort,
        options=options,
        validation=validation,
        supports=supports,
        labelling=LabellingCosts(
            answer=measured.labelling,
            slice_axis=cohort_slice_axis(cohort),
            direction=cohort_direction(cohort),
            several_views=several,
            supports=supports,
            classes=len(cohort.class_values),
            memory_entries=memory_entries(options, measured.labelling["image_size"]),
        ),
        nnunet=NnunetCosts(answer=measured.nnunet, heads=len(cohort.class_values) + 1),
        size=run_size(
            cohort,
            validation_ids=tuple(case.case_id for case in validation),
            plans=plans,
            configuration=options.configuration,
            overrides=overrides,
            light=light,
            averaged=options.ema_decay is not None,
            soft_targets=options.soft_targets,
        ),
        planned=planned,
        unprepared=_unprepared(folders, cohort, options) if planned else cohort.unlabelled,
        done=_done(folders, options),
        features_bytes=features_bytes,
    )


def features_to_keep(
    folders: DatasetFolders, cohort: Cohort, options: RunOptions, image_size: int
) -> tuple[int, tuple[str, ...]]:
    """Return what a run will keep of SAM 2's features beside those that lie there, in bytes, and what it warns of.

    As `RunContext` does: where there is no room for all of them, none are kept, and the run goes on without.
    """
    folder = folders.results / RUNS_FOLDER / EMBEDDINGS
    needed = embedding_bytes(run_size(cohort), image_size, looks=LOOKS.get(options.strategy, 1))
    there, free = folder_bytes(folder), free_bytes(folder)
    if free + there >= needed + RESERVE:
        return max(0, needed - there), ()
    return 0, (
        f"disk: SAM 2's features may take {readable(needed)}, and {readable(free + there)} are free: they are not "
        "kept, and slices are encoded again where they are needed again, which takes longer than is told here",
    )


def _validation(folders: DatasetFolders, cohort: Cohort, options: RunOptions) -> tuple[Case, ...]:
    if options.fold == "all":
        return ()
    path = folders.preprocessed / SPLITS_FILE
    splits = read_json(path) if path.is_file() else make_splits(cohort)
    return tuple(cohort.case(case_id) for case_id in splits[int(options.fold)]["val"])


def _several_views(options: RunOptions) -> bool:
    chosen = make_strategy(options.strategy, options.strategy_options).options
    return bool(getattr(chosen, "views", "one") != "one")


def memory_entries(options: RunOptions, image_size: int) -> int | None:
    """Return how many support locations the strategy compares a slice with at most; None where it knows no limit."""
    from nnunet_sam2.labelling.strategies.auto.options import AutoOptions
    from nnunet_sam2.labelling.strategies.auto.views import entries_at_most
    from nnunet_sam2.labelling.strategies.transfer.strategy import TransferOptions

    chosen = make_strategy(options.strategy, options.strategy_options).options
    if isinstance(chosen, AutoOptions):
        return entries_at_most(chosen.transfer_options(), cells(image_size))
    return chosen.memory_entries if isinstance(chosen, TransferOptions) else None


def _is_planned(folders: DatasetFolders, options: RunOptions) -> bool:
    path = folders.preprocessed / MARKER_FILE
    marker = read_json(path) if path.is_file() else {}
    return options.configuration in marker.get(options.plans, {}).get("done", [])


def _unprepared(folders: DatasetFolders, cohort: Cohort, options: RunOptions) -> tuple[Case, ...]:
    folder = unlabelled_folder(folders, options.configuration, plans=options.plans)
    return tuple(case for case in cohort.unlabelled if not (folder / case.case_id).is_dir())


def _done(folders: DatasetFolders, options: RunOptions) -> frozenset[str]:
    events = read_events(run_folder(folders, options.run_name) / LEDGER_FILE)
    return frozenset(event["stage"] for event in events if event["event"] == "done")


def _fit(
    folders: DatasetFolders, stages: tuple[StageEstimate, ...], measured: Measured, memory: Memory
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hold the stages against memory, accelerator and disks; return obstacles and warnings."""
    obstacles, warnings = [], []
    most = max(stages, key=lambda stage: stage.memory_bytes)
    if most.memory_bytes > memory.usable:
        where = "this machine has" if memory.limit is None else "a container or job may take here"
        obstacles.append(
            f"memory: {most.stage} needs about {readable(most.memory_bytes)}, more than the {readable(memory.usable)} "
            f"that {where}; {_memory_way_out(most.stage)}"
        )
    elif most.memory_bytes > memory.available:
        warnings.append(
            f"memory: {most.stage} needs about {readable(most.memory_bytes)}, and {readable(memory.available)} are "
            "free now; end other programs before"
        )
    total = int(measured.nnunet.get("gpu_total_bytes", 0))
    on_gpu = max(stages, key=lambda stage: stage.gpu_bytes)
    if total and on_gpu.gpu_bytes > total:
        obstacles.append(
            f"accelerator: {on_gpu.stage} needs about {readable(on_gpu.gpu_bytes)}, more than its {readable(total)}; "
            "take --profile cpu (a smaller network) or -c 3d_lowres or 2d"
        )
    disks: dict[int, tuple[Path, int]] = {}
    for stage in stages:
        path = folders.preprocessed if stage.preprocessed else folders.results
        disk = file_system(path)
        first, needed = disks.get(disk, (path, 0))
        disks[disk] = (first, needed + stage.disk_bytes)
    for path, needed in disks.values():
        free = free_bytes(path)
        if needed and needed + RESERVE > free:
            obstacles.append(
                f"disk: the run writes about {readable(needed)} where {path} lies, and {readable(free)} are free; make "
                "room, set nnUNet_results and nnUNet_preprocessed to a larger disk, or take fewer --rounds"
            )
    return tuple(obstacles), tuple(warnings)


def _memory_way_out(stage: str) -> str:
    if stage.startswith("setup/sam2") or stage.endswith(("/refine", "/quality", "/fuse", "/labels")):
        return "take a smaller --image-size, or a machine with more memory"
    return "take -c 3d_lowres or 2d, or --profile cpu, or a machine with more memory"


def _assumptions(options: RunOptions, measured: Measured) -> tuple[str, ...]:
    rounds = "1 round" if options.round_limit == 1 else f"{options.round_limit} rounds"
    found = [f"{rounds}, the limit: fewer where the labels stop changing before"]
    when = "measured before on this machine and kept (--again measures anew)" if measured.kept else "measured just now"
    found.append(f"seconds from a self-benchmark of {measured.seconds:.0f} s, {when}; cases scaled by their size")
    if measured.busy > BUSY:
        found.append(
            f"the machine was busy then ({measured.busy:.1f} processes a core): with the machine to itself the run is "
            "faster, down to the processor seconds over the threads"
        )
    shrunk = measured.nnunet["configuration"]
    if shrunk["patch_size"] != shrunk["probed_patch_size"]:
        found.append("a training step was measured on a smaller patch and scaled by its voxels")
    found.append("bytes are upper bounds; the report after each round takes some seconds more")
    return tuple(found)
