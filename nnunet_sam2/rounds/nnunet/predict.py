"""Prediction by a trained student, one case at a time, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.nnunet.base import PLANS, TRAINER, Fold, final_checkpoint, model_folder
from nnunet_sam2.rounds.nnunet.process import HANG_MINUTES, child_environment, stream_logged
from nnunet_sam2.rounds.nnunet.retry import Note, Remedy, no_note, once_more, prediction_remedy
from nnunet_sam2.storage import file_hash, read_json, remove_temporary_files, value_hash, write_json
from nnunet_sam2.trainers.discovery import require_nnunet

RECORDS, PROBABILITIES = "records", "probabilities"
CASE_DONE = "nnunet_sam2: predicted "
"""Start of the line that the worker prints after each case."""


def predict_cases(
    folders: DatasetFolders,
    configuration: str,
    folds: Sequence[Fold],
    cases: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    device: str,
    log: Path,
    save_probabilities: bool = False,
    mirroring: bool = True,
    postprocessing: Sequence[Sequence[int]] = (),
    threads: int | None = None,
    plans: str = PLANS,
    trainer: str = TRAINER,
    hang_minutes: float = HANG_MINUTES,
    note: Note = no_note,
) -> list[Path]:
    """Segment ``cases`` (id -> image files) and return the label files ``OUT/CASE<file_ending>``.

    With ``save_probabilities``, ``OUT/probabilities/CASE.npz`` holds ``prob_czyx``: uint8, 0 to 255, the background as
    channel 0, then the cohort's class values in ascending order, on the raw image's grid. A case whose record
    ``OUT/records/CASE.json`` names the same inputs and whose files are whole is not computed again. Labels are those
    of ``nnUNetv2_predict``; several folds are averaged as there. ``mirroring`` acts where the model was trained so.
    ``postprocessing`` are the steps of `Postprocessing`: what they take away is certain background in both files.
    What ends for a cause that has a remedy (`prediction_remedy`) goes on once more, which ``note`` is told.
    """
    require_nnunet()
    if not folds:
        raise InputError("prediction needs at least one fold")
    model = model_folder(folders, configuration, plans=plans, trainer=trainer)
    checkpoints = [final_checkpoint(folders, configuration, fold, plans=plans, trainer=trainer) for fold in folds]
    ending = read_json(model / "dataset.json")["file_ending"]
    if out.is_dir():
        remove_temporary_files(out)
    model_key = {
        "checkpoints": [file_hash(path) for path in checkpoints],
        "plans": file_hash(model / "plans.json"),
        "mirroring": mirroring,
        "nnunetv2": require_nnunet(),
        **({"postprocessing": [list(step) for step in postprocessing]} if postprocessing else {}),
    }
    jobs = [
        _job(case_id, images, out, ending, model_key, save_probabilities) for case_id, images in sorted(cases.items())
    ]
    what = f"prediction with {configuration}"
    environment = child_environment(threads=threads, processes=threads or os.cpu_count() or 1, gpu=device != "cpu")

    def attempt(remedy: Remedy | None) -> None:
        todo = [job for job in jobs if not is_predicted(job)]
        if not todo:
            return
        request = out / RECORDS / "request"
        write_json(
            request,
            {
                "model": str(model),
                "folds": [str(fold) for fold in folds],
                "device": device,
                "threads": threads,
                "mirroring": mirroring,
                "postprocessing": [list(step) for step in postprocessing],
                "offload": bool(remedy and remedy.offload),
                "cases": todo,
            },
        )
        argv = [sys.executable, "-m", "nnunet_sam2.rounds.nnunet.predict_worker", str(request)]
        changed = {**environment, **(remedy.environment if remedy else {})}
        try:
            lines = stream_logged(argv, log=log, environment=changed, what=what, hang_minutes=hang_minutes)
            for _ in track(_done(lines), what=what, total=len(todo)):
                pass
        finally:
            request.unlink(missing_ok=True)
        for job in todo:
            if not is_predicted(job):
                raise StageError(f"{what} left no whole files for case {job['id']} in {out}; log: {log}")

    once_more(attempt, prediction_remedy, note=note)
    return [out / f"{case_id}{ending}" for case_id in sorted(cases)]


def is_predicted(job: Mapping[str, Any]) -> bool:
    """Say whether a case's record names the same inputs and its files are what the record says."""
    try:
        value = read_json(Path(job["record"]))
    except InputError:
        return False
    if not isinstance(value, dict) or value.get("key") != job["key"] or not isinstance(value.get("hashes"), dict):
        return False
    wanted = [name for name in ("label", "probabilities") if job[name] is not None]
    return all(
        name in value["hashes"] and Path(job[name]).is_file() and file_hash(Path(job[name])) == value["hashes"][name]
        for name in wanted
    )


def _job(
    case_id: str, images: Sequence[Path], out: Path, ending: str, model_key: dict[str, Any], save_probabilities: bool
) -> dict[str, Any]:
    for image in images:
        if not image.is_file():
            raise InputError(f"{image} of case {case_id} does not exist")
    return {
        "id": case_id,
        "images": [str(image) for image in images],
        "label": str(out / f"{case_id}{ending}"),
        "probabilities": str(out / PROBABILITIES / f"{case_id}.npz") if save_probabilities else None,
        "record": str(out / RECORDS / f"{case_id}.json"),
        "key": value_hash({**model_key, "images": [file_hash(image) for image in images]}),
    }


def _done(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith(CASE_DONE):
            yield line
