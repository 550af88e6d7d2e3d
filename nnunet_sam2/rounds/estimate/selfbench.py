"""The self-benchmark: a few steps of the real thing on this machine, kept until what it depends on changes."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.folders import VARIABLES, DatasetFolders
from nnunet_sam2.machine import usable_cores
from nnunet_sam2.progress import say
from nnunet_sam2.provenance import provenance
from nnunet_sam2.rounds.estimate.sizes import voxels
from nnunet_sam2.rounds.nnunet.base import (
    PLANNERS,
    plans_path,
    read_plans,
    require_trainable,
    resolved_configuration,
)
from nnunet_sam2.rounds.nnunet.light import MOST_VOXELS_3D
from nnunet_sam2.rounds.nnunet.process import child_environment, run_logged
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.sam2.weights.cache import weights_identity
from nnunet_sam2.storage import read_json, value_hash, write_json

CACHE_VARIABLE = "NNUNET_SAM2_CACHE"

FORMAT = 2
"""Raised when the probes measure something else than before."""

PROBED_SUPPORTS = 3
PROBED_SLICES = 16
"""Slices along each axis that a probed case is cut to: with fewer, `auto` would take the volume for a slab."""

_MOST_PROBED_VOXELS = 2 * MOST_VOXELS_3D
_MOST_GPU_PATCH = 2**30
_MOST_WRITTEN_VOXELS = 2**22


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Hold what the probes found."""

    labelling: dict[str, Any]
    nnunet: dict[str, Any]
    kept: bool
    """True where both were measured before."""
    busy: float
    """Processes that wanted a core, for each core, while the slower of them was measured; above 1 times are longer."""
    seconds: float
    """What measuring took."""


def measure(
    folders: DatasetFolders,
    cohort: Cohort,
    options: RunOptions,
    *,
    support_ids: tuple[str, ...],
    several_views: bool,
    again: bool = False,
    cache: Path | None = None,
) -> Measured:
    """Measure what a run's estimate needs, or find it in the cache.

    Nothing is written but in the cache (`cache_folder` by default) and in a temporary folder. ``again`` measures anew.
    Raises `StageError` with a probe's last lines and log where one fails: the run would fail where it did.
    """
    cache = cache_folder() if cache is None else cache
    requests = {
        "labelling": labelling_request(cohort, options, support_ids=support_ids, several_views=several_views),
        "nnunet": nnunet_request(folders, cohort, options),
    }
    common = _identity(options)
    found: dict[str, dict[str, Any]] = {}
    measured_now = False
    for kind, request in requests.items():
        identity = {**common, "kind": kind, "request": _identifying(request, cohort, options)}
        path = cache / f"{kind}-{value_hash(identity)[:20]}.json"
        kept = None if again else _kept(path, identity)
        if kept is None:
            if not measured_now:
                _refuse_unfit_weights(options)
                say("measuring this machine, for about a minute; the result is kept")
            measured_now = True
            log = cache / f"{kind}.log"
            kept = {"identity": identity, "busy": _busy(), **_run_probe(kind, request, folders, options, log)}
            log.unlink()
            write_json(path, kept)
        found[kind] = kept
    return Measured(
        labelling=found["labelling"]["answer"],
        nnunet=found["nnunet"]["answer"],
        kept=not measured_now,
        busy=max(entry["busy"] for entry in found.values()),
        seconds=sum(entry["seconds"] for entry in found.values()),
    )


def _refuse_unfit_weights(options: RunOptions) -> None:
    """Load SAM 2 here once: where it cannot serve the strategy, that is refused as by the run itself."""
    from nnunet_sam2.rounds.context import load_labeller

    load_labeller(options, cache_dir=None)


def cache_folder() -> Path:
    """Return the user's folder for measurements: ``$NNUNET_SAM2_CACHE``, else the system's for caches."""
    own = os.environ.get(CACHE_VARIABLE, "")
    if own:
        return Path(own).expanduser() / "estimates"
    from platformdirs import user_cache_path

    return user_cache_path("nnunet_sam2") / "estimates"


def labelling_request(
    cohort: Cohort, options: RunOptions, *, support_ids: tuple[str, ...], several_views: bool
) -> dict[str, Any]:
    """Say what the labelling probe shall do: a few supports and the unlabelled case of middle size."""
    query = middle_case(cohort.unlabelled)
    return {
        "raw": str(cohort.root),
        "options": options.to_json(),
        "supports": list(support_ids[:PROBED_SUPPORTS]),
        "queries": [query.case_id],
        "written_shape_zyx": list(_cut(query.geometry.shape_zyx, _MOST_WRITTEN_VOXELS)),
        "several_views": several_views,
        "most_slices": PROBED_SLICES,
    }


def nnunet_request(folders: DatasetFolders, cohort: Cohort, options: RunOptions) -> dict[str, Any]:
    """Say what nnU-Net's probe shall do: by the dataset's plans, or by plans made from the cohort's shapes."""
    path = plans_path(folders, options.plans)
    plans = read_plans(folders, options.plans) if path.is_file() else None
    if plans is not None:
        require_trainable(plans, options.configuration)
    case = middle_case((*cohort.labelled, *cohort.unlabelled))
    shape = _cut(case.geometry.shape_zyx, _MOST_PROBED_VOXELS) if options.device == "cpu" else case.geometry.shape_zyx
    return {
        "dataset": cohort.root.name,
        "plans": None if plans is None else str(path),
        "planner": PLANNERS.get(options.plans),
        "planned": None if plans is None else resolved_configuration(plans, options.configuration),
        "fingerprint": _fingerprint(cohort),
        "configuration": options.configuration,
        "profile": options.profile,
        "device": options.device,
        "threads": options.threads,
        "channels": len(cohort.channels),
        "class_values": list(cohort.class_values),
        "shape_zyx": list(shape),
        "spacing_zyx_mm": list(case.geometry.spacing_zyx_mm),
        "most_patch_voxels": MOST_VOXELS_3D if options.device == "cpu" else _MOST_GPU_PATCH,
    }


def middle_case(cases: tuple[Case, ...]) -> Case:
    """Return the case of median size."""
    return sorted(cases, key=lambda case: (voxels(case), case.case_id))[len(cases) // 2]


def _fingerprint(cohort: Cohort) -> dict[str, Any]:
    """Return what nnU-Net's planner reads, from the labelled cases' headers; intensities do not change its plans."""
    none = {"mean": 0.0, "median": 0.0, "std": 1.0, "min": 0.0, "max": 1.0, "percentile_00_5": 0, "percentile_99_5": 1}
    return {
        "spacings": [list(case.geometry.spacing_zyx_mm) for case in cohort.labelled],
        "shapes_after_crop": [list(case.geometry.shape_zyx) for case in cohort.labelled],
        "foreground_intensity_properties_per_channel": {str(i): none for i in range(len(cohort.channels))},
        "median_relative_size_after_cropping": 1.0,
    }


def _cut(shape_zyx: tuple[int, int, int], most: int) -> tuple[int, ...]:
    """Shorten the longest axis until no more than ``most`` voxels are left."""
    shape = list(shape_zyx)
    while shape[0] * shape[1] * shape[2] > most:
        longest = max(range(3), key=lambda axis: shape[axis])
        shape[longest] = max(1, shape[longest] * 3 // 4)
    return tuple(shape)


def _identity(options: RunOptions) -> dict[str, Any]:
    """Return what else the measurements depend on: machine, versions, device, threads."""
    machine = provenance(gpu=options.device == "cuda")
    return {
        "format": FORMAT,
        "machine": platform.node(),
        **machine,
        "usable_cores": usable_cores(),
        "device": options.device,
        "threads": options.threads,
    }


def _identifying(request: Mapping[str, Any], cohort: Cohort, options: RunOptions) -> dict[str, Any]:
    """Return the part of a request that the measurement depends on: the schedule, for one, is no part of it."""
    kept = {
        key: value
        for key, value in request.items()
        if key not in ("options", "plans", "raw", "dataset", "supports", "queries")
    }
    if "options" in request:
        cases = [cohort.case(case_id) for case_id in (*request["supports"], *request["queries"])]
        kept |= {"voxels": [case.voxel_hash for case in cases], "classes": list(cohort.class_values)}
        kept["sam2"] = weights_identity(options.sam2)
        kept |= {name: getattr(options, name) for name in ("image_size", "strategy", "strategy_options", "seed")}
    return kept


def _kept(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        entry: dict[str, Any] = read_json(path)
    except ValueError:
        return None
    same = value_hash(entry.get("identity")) == value_hash(identity)
    return entry if same and {"answer", "busy", "seconds"} <= set(entry) else None


def _busy() -> float:
    if not hasattr(os, "getloadavg"):
        return 0.0
    return round(os.getloadavg()[0] / usable_cores(), 2)


def _run_probe(
    kind: str, request: Mapping[str, Any], folders: DatasetFolders, options: RunOptions, log: Path
) -> dict[str, Any]:
    """Run a probe in a process and a temporary folder of its own."""
    with tempfile.TemporaryDirectory(prefix="nnunet_sam2_probe_") as name:
        folder = Path(name)
        environment = child_environment(
            threads=options.threads,
            augmentation_workers=1 if options.device == "cpu" else None,
            gpu=options.device != "cpu",
        )
        roots = {VARIABLES[0]: str(folders.raw.parent), VARIABLES[1]: str(folder / "pre"), VARIABLES[2]: str(folder)}
        environment |= roots
        preprocessed = folder / "pre" / folders.name
        preprocessed.mkdir(parents=True)
        shutil.copyfile(folders.raw / "dataset.json", preprocessed / "dataset.json")
        asked, answer = folder / "request.json", folder / "answer.json"
        started = time.time()
        write_json(asked, {**request, "spawned": started})
        module = f"nnunet_sam2.rounds.estimate.{kind}_probe"
        argv = [sys.executable, "-m", module, str(asked), str(answer)]
        run_logged(argv, log=log, environment=environment, what=f"the self-benchmark of {kind}")
        return {"answer": read_json(answer), "seconds": round(time.time() - started, 1)}
