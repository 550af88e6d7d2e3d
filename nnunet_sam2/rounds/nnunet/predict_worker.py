"""The process that predicts: ``python -m nnunet_sam2.rounds.nnunet.predict_worker REQUEST``.

It is a process of its own because nnU-Net's predictor keeps what it once took of memory and threads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.files.checks import PICTURE_ENDINGS, check_content, file_ending
from nnunet_sam2.rounds.nnunet.postprocessing import keep_largest_pieces, without_removed
from nnunet_sam2.rounds.nnunet.predict import CASE_DONE
from nnunet_sam2.storage import atomic_path, file_hash, read_json, write_json
from nnunet_sam2.support.library import write_probabilities


def main(argv: Sequence[str]) -> int:
    """Predict every case of the request file ``argv[0]``, each written whole before the next begins."""
    import torch

    request = read_json(Path(argv[0]))
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    predictor = _predictor(request)
    for job in request["cases"]:
        _predict(predictor, job, request["postprocessing"])
        print(f"{CASE_DONE}{job['id']}", flush=True)
    return 0


def class_probabilities(
    prob_czyx: np.ndarray,
    regions: Sequence[int | tuple[int, ...]] | None,
    regions_class_order: Sequence[int] | None,
) -> np.ndarray:
    """Turn nnU-Net's outputs into probabilities of the background and of each class value, ascending.

    Without regions these are the outputs themselves. With regions, output i is the probability that region i (a set of
    label values) holds, and nnU-Net paints the values of ``regions_class_order`` over one another, the last on top. A
    value's probability is so that of its region without what regions painted later take of it: a tumour's core lies
    within the tumour, disjoint organs take nothing of each other. The result sums to one; its largest channel is the
    painted label wherever the regions are certain, but need not be where several lie near one half.
    """
    if regions is None or regions_class_order is None:
        return prob_czyx
    values = sorted(set(regions_class_order))
    sets = [set(region) if isinstance(region, (tuple, list)) else {region} for region in regions]
    result_czyx = np.zeros((len(values) + 1, *prob_czyx.shape[1:]), np.float32)
    remaining_zyx = np.ones(prob_czyx.shape[1:], np.float32)
    shares: dict[int, np.ndarray] = {}
    for i in reversed(range(len(sets))):
        taken_zyx = sum(share for j, share in shares.items() if sets[i] & sets[j])
        shares[i] = np.clip(prob_czyx[i] - taken_zyx, 0, remaining_zyx)
        remaining_zyx = remaining_zyx - shares[i]
        result_czyx[1 + values.index(regions_class_order[i])] += shares[i]
    result_czyx[0] = remaining_zyx
    return result_czyx


def require_whole(written: Path, label_zyx: np.ndarray, reader: Any, *, path: Path) -> None:
    """Raise `StageError` where the file does not hold the label: SimpleITK says nothing when the disk is full."""
    try:
        if file_ending(path) not in PICTURE_ENDINGS:
            check_content(written)
        back = np.asarray(reader.read_seg(str(written))[0])
        whole = back.size == label_zyx.size and np.array_equal(back.reshape(label_zyx.shape), label_zyx)
    except (InputError, OSError, RuntimeError):
        whole = False
    if not whole:
        raise StageError(f"{path} could not be written whole: No space left on device, or the disk is damaged")


def _predictor(request: dict[str, Any]) -> Any:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_sam2.trainers.checkpoints import read_checkpoint

    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=request["mirroring"],
        perform_everything_on_device=request["device"] == "cuda" and not request["offload"],
        device=torch.device(request["device"]),
        allow_tqdm=False,
    )
    for fold in request["folds"]:
        # Our reader refuses what nnU-Net's, which comes next, would execute.
        read_checkpoint(Path(request["model"]) / f"fold_{fold}" / "checkpoint_final.pth")
    predictor.initialize_from_trained_model_folder(request["model"], tuple(request["folds"]), "checkpoint_final.pth")
    return predictor


def _predict(predictor: Any, job: dict[str, Any], postprocessing: Sequence[Sequence[int]]) -> None:
    reader = predictor.plans_manager.image_reader_writer_class()
    image_czyx, properties = reader.read_images(job["images"])
    with_probabilities = job["probabilities"] is not None
    answer = predictor.predict_single_npy_array(image_czyx, properties, None, None, with_probabilities)
    given_zyx, prob_czyx = answer if with_probabilities else (answer, None)
    label_zyx = keep_largest_pieces(given_zyx, postprocessing)
    hashes = {}
    with atomic_path(Path(job["label"])) as temporary:
        reader.write_seg(label_zyx, str(temporary), properties)
        require_whole(temporary, label_zyx, reader, path=Path(job["label"]))
    hashes["label"] = file_hash(Path(job["label"]))
    if prob_czyx is not None:
        labels = predictor.label_manager
        regions = labels.foreground_regions if labels.has_regions else None
        prob_czyx = class_probabilities(prob_czyx, regions, labels.regions_class_order)
        write_probabilities(Path(job["probabilities"]), without_removed(prob_czyx, given_zyx, label_zyx))
        hashes["probabilities"] = file_hash(Path(job["probabilities"]))
    write_json(Path(job["record"]), {"key": job["key"], "hashes": hashes})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
