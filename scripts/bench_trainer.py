"""Measure what a training step costs beside stock nnU-Net's: same data, same random numbers, turn by turn.

``python scripts/bench_trainer.py [--steps 20] [--features 16]`` writes docs/benchmarks/trainer.json and its table in
docs/performance.md; with ``--output FILE`` it writes that JSON alone. A step is a
batch from the loader, augmentation included, and ``train_step``; its cost is CPU-seconds of this process, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PROJECT
from marked_table import replace_marked
from scipy import ndimage

from nnunet_sam2.cohort.generated import LABELS, write_generated_cohort
from nnunet_sam2.storage import read_json, write_json

DATASET = "Dataset701_Bench"
STOCK, PLAIN, WEIGHTED = "stock", "plain", "weighted"
INGREDIENTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    WEIGHTED: {},
    "averaged": {"ema_decay": 0.99},
    "pasted": {"copy_paste": 1.0},
    "soft": {"soft_targets": True},
    "everything": {"ema_decay": 0.99, "copy_paste": 1.0, "soft_targets": True},
}
"""Settings of what is timed beside stock; all but the first have maps."""

PSEUDO = ("subject_003", "subject_004", "subject_005")


def main() -> None:
    """Make the data, time every configuration, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", default=["2d", "3d_fullres"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--features", type=int, default=16, help="features of the first stage; doubled up to 8 times")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 96, 96), metavar=("Z", "Y", "X"))
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        preprocessed = prepare(Path(folder), tuple(args.shape), args.features)
        rows = [time_configuration(preprocessed, name, args.steps) for name in args.configurations]
    result = {"machine": machine(), "steps": args.steps, "first_features": args.features, "rows": rows}
    print(json.dumps(result, indent=1))
    if args.output is not None:
        write_json(args.output, result)
        return
    write_json(PROJECT / "docs" / "benchmarks" / "trainer.json", result)
    replace_marked(PROJECT / "docs" / "performance.md", "trainer", table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the figures as a Markdown table."""
    lines = [
        "| configuration | patch | batch | stock s a step | ours, no maps / stock | with maps | maps, averaged weights "
        "| maps, copy-paste | maps, soft targets | all of it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        patch = " x ".join(str(n) for n in row["patch_size"])
        ratios = " | ".join(f"{row['over_stock'][kind]:.3f}" for kind in INGREDIENTS)
        stock = row["seconds_per_step"][STOCK]
        lines.append(f"| {row['configuration']} | {patch} | {row['batch_size']} | {stock:.3f} | {ratios} |")
    return "\n".join(lines)


def prepare(root: Path, shape_zyx: tuple[int, int, int], features: int) -> Path:
    """Write, plan and preprocess six labelled cases, with a distrust map for each; return the preprocessed folder."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(root / name)
    os.environ.update({"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"})
    raw = root / "raw" / DATASET
    source = write_generated_cohort(
        root / "source", seed=1, n_labelled=6, n_unlabelled=0, n_test=0, shape_zyx=shape_zyx
    )
    for folder, kind, suffix in (("imagesTr", "images", "_0000"), ("labelsTr", "labels", "")):
        (raw / folder).mkdir(parents=True)
        for path in sorted((source / kind).iterdir()):
            shutil.copy(path, raw / folder / path.name.replace(".nii.gz", f"{suffix}.nii.gz"))
    description = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": 6, "file_ending": ".nii.gz"}
    write_json(raw / "dataset.json", description)
    tool = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    command = [str(tool), "-d", "701", "-c", "2d", "3d_fullres", "-npfp", "1", "-np", "1", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    os.environ.update({"nnUNet_n_proc_DA": "0"})  # planning fails with 0, timing wants no workers
    preprocessed = root / "preprocessed" / DATASET
    plans = read_json(preprocessed / "nnUNetPlans.json")
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            network = configuration["architecture"]["arch_kwargs"]
            network["features_per_stage"] = [features * 2 ** min(stage, 3) for stage in range(network["n_stages"])]
    write_json(preprocessed / "nnUNetPlans.json", plans)
    return preprocessed


def time_configuration(preprocessed: Path, name: str, steps: int) -> dict[str, Any]:
    """Time stock and ours with each ingredient in turns, and compare the medians."""
    import torch

    torch.set_num_threads(1)
    configuration = read_json(preprocessed / "nnUNetPlans.json")["configurations"][name]
    write_maps(preprocessed, configuration)
    trainers = {kind: make_trainer(preprocessed, name, kind) for kind in (STOCK, *INGREDIENTS)}
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    for step in range(-3, steps):
        turn = step % len(trainers)
        for kind in (*list(trainers)[turn:], *list(trainers)[:turn]):
            np.random.seed(step + 3)
            torch.manual_seed(step + 3)
            started = time.process_time()
            trainers[kind].train_step(next(trainers[kind].dataloader_train))
            if step >= 0:
                seconds[kind].append(time.process_time() - started)
    stock = seconds[STOCK]
    return {
        "configuration": name,
        "patch_size": configuration["patch_size"],
        "batch_size": configuration["batch_size"],
        "seconds_per_step": {kind: statistics.median(values) for kind, values in seconds.items()},
        "over_stock": {
            kind: statistics.median(own / other for own, other in zip(seconds[kind], stock, strict=True))
            for kind in INGREDIENTS
        },
    }


def make_trainer(preprocessed: Path, configuration: str, kind: str) -> Any:
    """Build a trainer of one kind, ready to step, without its chatter."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_sam2.trainers.nnUNetTrainerSAM2 import nnUNetTrainerSAM2
    from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings

    plans = copy.deepcopy(read_json(preprocessed / "nnUNetPlans.json"))
    asked = INGREDIENTS.get(kind, {})
    maps = f"{configuration}_{'soft_maps' if 'soft_targets' in asked else 'maps'}"
    folder = None if kind in (STOCK, PLAIN) else maps
    settings = RoundSettings(confidence_folder=folder, pseudo_cases=PSEUDO if asked else (), **asked)
    plans["configurations"][configuration][SETTINGS_KEY] = settings.to_json()
    plans["continue_training"] = False
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = (nnUNetTrainer if kind == STOCK else nnUNetTrainerSAM2)(
            plans, configuration, "all", read_json(preprocessed / "dataset.json"), torch.device("cpu")
        )
        torch.manual_seed(0)
        trainer.initialize()
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    return trainer


def write_maps(preprocessed: Path, configuration: dict[str, Any]) -> None:
    """Write a smooth distrust map for every preprocessed case, and a folder of such with probabilities behind."""
    import blosc2

    from nnunet_sam2.trainers.dataset import distrust_from_confidence, write_distrust

    rng = np.random.default_rng(0)
    folder = preprocessed / configuration["data_identifier"]
    maps = preprocessed / f"{configuration['data_identifier'].removeprefix('nnUNetPlans_')}_maps"
    for path in sorted(folder.glob("*_seg.b2nd")):
        seg_zyx = blosc2.open(str(path), mode="r")[:][0]
        field = ndimage.gaussian_filter(rng.standard_normal(seg_zyx.shape), 3)
        confidence = (field - field.min()) / np.ptp(field)
        case = path.name.removesuffix("_seg.b2nd")
        distrust, patch_size = distrust_from_confidence(confidence), configuration["patch_size"]
        soft = [ndimage.gaussian_filter((seg_zyx == value).astype(np.float32), 1) for value in LABELS.values() if value]
        write_distrust(maps, case, distrust, patch_size)
        write_distrust(
            maps.with_name(maps.name.replace("_maps", "_soft_maps")),
            case,
            distrust,
            patch_size,
            soft_czyx=np.stack(soft),
        )


def machine() -> dict[str, Any]:
    """Describe where the figures come from."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
