"""The process that times nnU-Net: ``python -m nnunet_sam2.rounds.estimate.nnunet_probe REQUEST ANSWER``.

It is a process of its own because its start is one of the things to be timed, and because its highest memory is that of
a training and of a prediction.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.folders import VARIABLES
from nnunet_sam2.rounds.estimate.clock import Clock, StopWatch, peak_gpu_memory, peak_memory
from nnunet_sam2.storage import read_json, write_json

PROBE = "probe"
"""Name of the configuration that is timed."""

_STEPS, _ENOUGH_SECONDS = 4, 12.0
_WORKERS = "nnUNet_n_proc_DA"


def main(argv: Sequence[str]) -> int:
    """Time what ``argv[0]`` asks for, in the temporary folders that the environment names, and write ``argv[1]``."""
    request = read_json(Path(argv[0]))
    begun = StopWatch(since=request["spawned"], cpu_since=0.0)
    with contextlib.redirect_stdout(sys.stderr):
        write_json(Path(argv[1]), _measure(request, begun))
    return 0


def _measure(request: dict[str, Any], begun: StopWatch) -> dict[str, Any]:
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    answer: dict[str, Any] = {}
    preprocessed = Path(os.environ[VARIABLES[1]]) / request["dataset"]
    # The planner reads it, and training copies it beside its checkpoints.
    write_json(preprocessed / "dataset_fingerprint.json", request["fingerprint"])
    with Clock(answer, "planning"):
        plans = read_json(Path(request["plans"])) if request["plans"] else _plan(request, preprocessed)
    configuration = _probe_configuration(plans, request)
    answer["configuration"] = configuration
    answer["transpose_forward"] = plans["transpose_forward"]
    write_json(preprocessed / "plans.json", plans)
    if request["device"] == "cpu":
        os.environ[_WORKERS] = "0"  # as in a run; nnU-Net's planner does not take it
    # what nnU-Net's command does before it trains: import everything, look for the trainer, read the plans
    trainer = get_trainer_from_args(
        request["dataset"], PROBE, "all", "nnUNetTrainerSAM2", "plans", device=torch.device(request["device"])
    )
    started = begun.read()
    answer["start"] = {key: started[key] - answer["planning"][key] for key in started}
    answer["start_memory_bytes"] = peak_memory()
    raw_czyx = _write_cases(request, plans, preprocessed, answer)
    _train(trainer, answer)
    answer["training_memory_bytes"] = peak_memory()
    answer["training_gpu_bytes"] = peak_gpu_memory(request["device"])
    _predict(trainer, request, raw_czyx, answer)
    answer["gpu_total_bytes"] = torch.cuda.mem_get_info()[1] if request["device"] == "cuda" else 0
    return answer


def _plan(request: dict[str, Any], preprocessed: Path) -> dict[str, Any]:
    """Let nnU-Net's planner plan from the cohort's shapes and spacings, as it would after its fingerprint."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners

    preset = request["planner"]
    planner = (getattr(residual_encoder_unet_planners, preset) if preset else ExperimentPlanner)(request["dataset"])
    planner.plan_experiment()
    plans: dict[str, Any] = read_json(preprocessed / f"{planner.plans_identifier}.json")
    return plans


def _probe_configuration(plans: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Add the configuration that a round would train with to the plans, its patch made smaller where that is asked."""
    from nnunet_sam2.rounds.nnunet.base import resolved_configuration
    from nnunet_sam2.rounds.nnunet.light import light_configuration, light_settings
    from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings

    base = request["configuration"]
    light = request["profile"] == "cpu"
    overrides = light_configuration(plans, base) if light else {}
    entry = {**resolved_configuration(plans, base), **overrides, "next_stage": None, "data_identifier": PROBE}
    planned_patch = [int(n) for n in entry["patch_size"]]
    entry["patch_size"] = smaller_patch(planned_patch, entry["architecture"], request["most_patch_voxels"])
    settings = light_settings(plans, base) if light else RoundSettings()
    entry[SETTINGS_KEY] = {**settings.to_json(), "seed": 1, "threads": request["threads"]}
    plans["configurations"][PROBE] = entry
    plans["plans_name"] = "plans"
    return {
        "patch_size": planned_patch,
        "probed_patch_size": entry["patch_size"],
        "spacing": [float(s) for s in entry["spacing"]],
    }


def smaller_patch(patch: Sequence[int], architecture: dict[str, Any], most_voxels: int) -> list[int]:
    """Halve the longest axis that can be halved until a patch holds no more than ``most_voxels``; the network stays."""
    strides = np.prod(np.array(architecture["arch_kwargs"]["strides"]).reshape(-1, len(patch)), axis=0)
    small = [int(n) for n in patch]
    while int(np.prod(small)) > most_voxels:
        axes = [i for i in range(len(small)) if small[i] % (2 * int(strides[i])) == 0 and small[i] // strides[i] > 2]
        if not axes:
            break
        longest = max(axes, key=lambda i: small[i])
        small[longest] //= 2
    return small


def _write_cases(
    request: dict[str, Any], plans: dict[str, Any], preprocessed: Path, answer: dict[str, Any]
) -> np.ndarray:
    """Preprocess a generated case of the cohort's size, twice under two names, and return its raw image."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_sam2.rounds.nnunet.cases import save_array

    manager = PlansManager(plans)
    configuration = manager.get_configuration(PROBE)
    rng = np.random.default_rng(0)
    shape = tuple(request["shape_zyx"])
    raw_czyx = rng.uniform(1, 100, (request["channels"], *shape)).astype(np.float32)
    label_zyx = np.zeros(shape, np.float32)
    for number, value in enumerate(request["class_values"]):
        middle = [slice(n // 4, max(n // 4 + 1, 3 * n // 4)) for n in shape]
        width = max(1, shape[-1] // (2 * len(request["class_values"])))
        start = shape[-1] // 4 + number * width
        label_zyx[middle[0], middle[1], start : start + width] = value
    properties = {"spacing": list(request["spacing_zyx_mm"])}
    folder = preprocessed / PROBE
    folder.mkdir(parents=True, exist_ok=True)
    dataset = read_json(preprocessed / "dataset.json")
    with Clock(answer, "preprocessing"):
        data, seg, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
            raw_czyx, label_zyx[None], properties, manager, configuration, dataset
        )
        save_array(folder / "case_0.b2nd", data.astype(np.float32, copy=False), configuration.patch_size)
    with Clock(answer, "segmentation"):
        save_array(folder / "case_0_seg.b2nd", seg, configuration.patch_size)
        (folder / "case_0.pkl").write_bytes(pickle.dumps(properties))
    for end in (".b2nd", "_seg.b2nd", ".pkl"):
        os.link(folder / f"case_0{end}", folder / f"case_1{end}")
    answer["probed_voxels"] = int(np.prod(shape))
    answer["preprocessed_shape"] = [int(n) for n in data.shape[1:]]
    return raw_czyx


def _train(trainer: Any, answer: dict[str, Any]) -> None:
    with Clock(answer, "training_start"):
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    answer["training_step"] = _repeat(lambda: trainer.train_step(next(trainer.dataloader_train)))
    import torch

    with torch.no_grad():
        trainer.on_validation_epoch_start()
        answer["validation_step"] = _repeat(lambda: trainer.validation_step(next(trainer.dataloader_val)))
    with Clock(answer, "checkpoint"):
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "probe.pth"))


def _predict(trainer: Any, request: dict[str, Any], raw_czyx: np.ndarray, answer: dict[str, Any]) -> None:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        finish = getattr(loader, "_finish", None)
        if finish is not None:
            finish()
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    on_gpu = request["device"] == "cuda"
    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=on_gpu,
        device=torch.device(request["device"]),
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        None,
    )
    patch = torch.zeros(
        (1, trainer.num_input_channels, *trainer.configuration_manager.patch_size), device=trainer.device
    )

    def look() -> None:
        context = torch.autocast("cuda", enabled=True) if on_gpu else contextlib.nullcontext()
        with torch.inference_mode(), context:
            trainer.network(patch)
            if on_gpu:
                torch.cuda.synchronize()

    answer["tile"] = _repeat(look)
    with Clock(answer, "prediction"):
        predictor.predict_single_npy_array(raw_czyx, {"spacing": list(request["spacing_zyx_mm"])}, None, None, True)


def _repeat(work: Any) -> dict[str, float]:
    """Return the median of a few repetitions after a first one, or the first where it took long."""
    times: list[dict[str, float]] = []
    begun = time.monotonic()
    while len(times) <= _STEPS and (not times or time.monotonic() - begun < _ENOUGH_SECONDS):
        watch = StopWatch()
        work()
        times.append(watch.read())
    times = times[1:] or times
    return {key: float(np.median([t[key] for t in times])) for key in times[0]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
