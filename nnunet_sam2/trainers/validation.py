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
    summary = summarise(trainer, dataset.identifiers)
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    compute_gaussian.cache_clear()
    return summary


def summarise(trainer: Any, case_ids: Sequence[str]) -> dict[str, Any]:
    """Compare the cases in ``validation/`` with their references and write nnU-Net's ``summary.json`` beside them.

    Twin of ``nnunetv2.evaluation.evaluate_predictions.compute_metrics_on_folder``, without its pool of processes. What
    was not annotated in a case has no metric there.
    """
    reference = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    prediction = Path(trainer.output_folder) / "validation"
    reader, ending = trainer.plans_manager.image_reader_writer_class(), trainer.dataset_json["file_ending"]
    labels = trainer.label_manager
    compared = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    counts = trainer.annotated.counts
    cases = []
    for case_id in sorted(case_ids, key=lambda one: one + ending):
        files = str(reference / (case_id + ending)), str(prediction / (case_id + ending))
        case = compute_metrics(*files, reader, list(compared), labels.ignore_label)
        for one in compared:
            if not counts(case_id, one):
                case["metrics"][one] = dict.fromkeys(case["metrics"][one], np.nan)
        cases.append(case)
    names = list(cases[0]["metrics"][compared[0]])
    # a class that no case has gives a mean of nothing, which is nan, as in stock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)
        means = {
            one: {name: np.nanmean([case["metrics"][one][name] for case in cases]) for name in names}
            for one in compared
        }
    asked = [one for one in compared if one != 0 and any(counts(case_id, one) for case_id in case_ids)]
    foreground = {name: np.mean([means[one][name] for one in asked]) for name in names}
    for value in (*cases, means, foreground):
        recursive_fix_for_json_export(value)
    summary = {"metric_per_case": cases, "mean": means, "foreground_mean": foreground}
    save_summary_json(summary, str(prediction / SUMMARY))
    return summary
