"""nnU-Net's final validation in one process: the same files, without workers that each import torch anew."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

SUMMARY = "summary.json"


def validate_sequentially(trainer: Any, *, save_probabilities: bool, mirroring: bool) -> dict[str, Any]:
    """Predict a trainer's validation cases one after the other and write ``validation/`` as nnU-Net does.

    Returns what ``summary.json`` holds. Twin of ``nnUNetTrainer.perform_actual_validation``.
    """
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=mirroring,
        perform_everything_on_device=True,
        device=trainer.device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    folder = Path(trainer.output_folder) / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    _, cases = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for case in dataset.identifiers:
        trainer.print_to_log_file(f"predicting {case}")
        data, _, _, properties = dataset.load_case(case)
        # torch warns of read-only arrays, and this one is only read
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = torch.from_numpy(data[:])
        logits = predictor.predict_sliding_window_return_logits(image).cpu()
        export_prediction_from_logits(
            logits,
            properties,
            trainer.configuration_manager,
            trainer.plans_manager,
            trainer.dataset_json,
            str(folder / case),
            save_probabilities,
            num_threads_torch=torch.get_num_threads(),
        )
    labels = trainer.label_manager
    summary = summarise(
        reference=Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations",
        prediction=folder,
        file_names=[case + trainer.dataset_json["file_ending"] for case in dataset.identifiers],
        reader=trainer.plans_manager.image_reader_writer_class(),
        regions_or_labels=labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        ignore_label=labels.ignore_label,
    )
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    compute_gaussian.cache_clear()
    return summary


def summarise(
    *,
    reference: Path,
    prediction: Path,
    file_names: Sequence[str],
    reader: Any,
    regions_or_labels: Sequence[Any],
    ignore_label: int | None,
) -> dict[str, Any]:
    """Compare predictions with references and write nnU-Net's ``summary.json`` into the predictions' folder.

    Twin of ``nnunetv2.evaluation.evaluate_predictions.compute_metrics_on_folder``, without its pool of processes.
    """
    cases = [
        compute_metrics(str(reference / name), str(prediction / name), reader, list(regions_or_labels), ignore_label)
        for name in sorted(file_names)
    ]
    names = list(cases[0]["metrics"][regions_or_labels[0]])
    # a class that no case has gives a mean of nothing, which is nan, as in stock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)
        means = {
            one: {name: np.nanmean([case["metrics"][one][name] for case in cases]) for name in names}
            for one in regions_or_labels
        }
    foreground = {name: np.mean([means[one][name] for one in means if one != 0]) for name in names}
    for value in (*cases, means, foreground):
        recursive_fix_for_json_export(value)
    summary = {"metric_per_case": cases, "mean": means, "foreground_mean": foreground}
    save_summary_json(summary, str(prediction / SUMMARY))
    return summary
