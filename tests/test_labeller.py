"""Labelling whole cases: files, records, leave-one-out, resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.job import label_files
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import estimated_quality
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.storage import file_hash
from nnunet_sam2.support.library import write_probabilities
from nnunet_sam2.volumes import read_label, read_map

OPTIONS = {"decoder": "off"}


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=128, threads=1)


def _label(cohort: Cohort, backend: MetaSam2Backend, out: Path, **changes: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {
        "case_ids": [cohort.unlabelled[0].case_id],
        "support_ids": [case.case_id for case in cohort.labelled],
        "strategy": make_strategy("transfer", OPTIONS),
        "seed": 1,
        "save_probabilities": True,
    }
    arguments.update(changes)
    return label_cases(cohort=cohort, backend=backend, out=out, **arguments)


@pytest.fixture(scope="module")
def labelled(cohort: Cohort, backend: MetaSam2Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unlabelled and one labelled case, labelled. Read only."""
    out = tmp_path_factory.mktemp("labels")
    _label(cohort, backend, out, case_ids=[cohort.unlabelled[0].case_id, cohort.labelled[0].case_id])
    return out


def _hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_case_gets_label_confidence_probabilities_and_record_on_its_own_grid(cohort: Cohort, labelled: Path) -> None:
    case = cohort.unlabelled[0]
    label, confidence, record, probabilities = label_files(
        labelled, case.case_id, cohort.file_ending, probabilities=True
    )
    label_zyx, geometry = read_label(label, allowed=cohort.class_values)
    assert geometry.mismatch(case.geometry) is None
    assert {0} < set(np.unique(label_zyx)) <= {0, *cohort.class_values}
    confidence_zyx, _ = read_map(confidence)
    assert confidence_zyx.shape == label_zyx.shape
    assert 0 <= confidence_zyx.min() < confidence_zyx.max() <= 1
    prob_czyx = np.load(probabilities)["prob_czyx"]
    assert prob_czyx.dtype == np.uint8
    assert prob_czyx.shape == (len(cohort.class_values) + 1, *label_zyx.shape)
    assert abs(prob_czyx.astype(int).sum(axis=0) - 255).max() <= 2
    written = json.loads(record.read_text())
    assert written["supports"] == [c.case_id for c in cohort.labelled]
    assert written["members"][0]["name"] == "transfer"
    assert written["dice_with_human_label"] is None


def test_a_labelled_case_is_labelled_from_the_others_and_scored(cohort: Cohort, labelled: Path) -> None:
    case = cohort.labelled[0]
    record = json.loads((labelled / "members" / f"{case.case_id}.json").read_text())
    assert record["supports"] == [c.case_id for c in cohort.labelled[1:]]
    quality = estimated_quality([record], cohort.class_values)
    assert set(quality) == set(cohort.class_values)
    assert 0 < max(q or 0 for q in quality.values()) <= 1


def test_the_same_inputs_give_the_same_bytes(cohort: Cohort, backend: Any, labelled: Path, tmp_path: Path) -> None:
    _label(cohort, backend, tmp_path, case_ids=[cohort.labelled[0].case_id, cohort.unlabelled[0].case_id])
    assert _hashes(tmp_path) == _hashes(labelled)


def test_a_finished_case_is_not_done_again(
    cohort: Cohort, backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _label(cohort, backend, tmp_path)
    monkeypatch.setattr(backend, "embed", lambda frames: pytest.fail("a finished case was read again"))
    assert _label(cohort, backend, tmp_path) == first


@pytest.mark.parametrize("damage", ["label", "confidence", "record", "half record"])
def test_a_damaged_or_half_written_case_is_done_again(
    cohort: Cohort, backend: Any, labelled: Path, tmp_path: Path, damage: str
) -> None:
    _label(cohort, backend, tmp_path)
    before = _hashes(tmp_path)
    label, confidence, record = label_files(tmp_path, cohort.unlabelled[0].case_id, cohort.file_ending)
    if damage == "half record":
        record.write_text(record.read_text()[:100])
    else:
        {"label": label, "confidence": confidence, "record": record}[damage].unlink()
    _label(cohort, backend, tmp_path)
    assert _hashes(tmp_path) == before


def test_another_option_or_seed_labels_anew(cohort: Cohort, backend: Any, tmp_path: Path) -> None:
    first = _label(cohort, backend, tmp_path)[0]
    second = _label(cohort, backend, tmp_path, strategy=make_strategy("transfer", {**OPTIONS, "neighbours": "5"}))[0]
    assert first["input_key"] != second["input_key"]
    assert first["files"] != second["files"]
    assert _label(cohort, backend, tmp_path, seed=2)[0]["input_key"] != first["input_key"]


def test_a_case_cannot_be_its_only_support(cohort: Cohort, backend: Any, tmp_path: Path) -> None:
    only = cohort.labelled[0].case_id
    with pytest.raises(InputError, match="cannot support itself"):
        _label(cohort, backend, tmp_path, case_ids=[only], support_ids=[only])
    assert not list(tmp_path.iterdir())


def test_an_unlabelled_case_is_refused_as_support(cohort: Cohort, backend: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no human label"):
        _label(cohort, backend, tmp_path, support_ids=[cohort.unlabelled[0].case_id])


def test_a_strategy_with_memory_is_refused_on_an_image_checkpoint(
    cohort: Cohort, backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_spec", dataclasses.replace(backend.spec, has_memory=False))
    with pytest.raises(InputError, match="video memory"):
        _label(cohort, backend, tmp_path, strategy=make_strategy("insert"))


def test_prompting_without_the_students_probabilities_is_refused_by_name(
    cohort: Cohort, backend: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="needs the student"):
        _label(cohort, backend, tmp_path, strategy=make_strategy("prompted"))
    with pytest.raises(InputError, match=rf"{cohort.unlabelled[0].case_id}\.npz is missing"):
        _label(cohort, backend, tmp_path, strategy=make_strategy("prompted"), student_probabilities=tmp_path / "none")


def test_probabilities_are_written_the_same_each_time(tmp_path: Path) -> None:
    prob_czyx = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    write_probabilities(tmp_path / "a.npz", prob_czyx)
    write_probabilities(tmp_path / "b.npz", prob_czyx)
    assert file_hash(tmp_path / "a.npz") == file_hash(tmp_path / "b.npz")
