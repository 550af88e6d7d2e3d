"""A round's configuration: what nnU-Net would have made of these labels, immutable, whole or made again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from anisotropic_data import Dataset, small_round

from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.nnunet import configuration as round_configuration
from nnunet_sam2.rounds.nnunet import read_plans
from nnunet_sam2.rounds.nnunet.cases import load_preprocessing
from nnunet_sam2.storage import file_hash
from nnunet_sam2.support.library import write_probabilities
from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings
from nnunet_sam2.volumes import read_label, write_label


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in sorted(folder.iterdir())}


def test_stock_nnunet_reads_a_round_as_if_it_had_preprocessed_it(planned: Dataset) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    made = small_round(planned, "3d_fullres_r01")
    opened = infer_dataset_class(str(made.data_folder))(str(made.data_folder))
    labelled = [case.case_id for case in planned.cohort.labelled]
    assert opened.identifiers == sorted(labelled + planned.unlabelled)
    loaded = load_preprocessing(planned.folders, "3d_fullres")
    for case_id in opened.identifiers:
        case = planned.cohort.case(case_id)
        label = planned.folders.raw / str(case.label or case.hidden_label)
        data, seg, _, properties = opened.load_case(case_id)
        stock_data, stock_seg, stock_properties = DefaultPreprocessor(verbose=False).run_case(
            [str(p) for p in planned.cohort.image_paths(case)],
            str(label),
            loaded.plans,
            loaded.configuration,
            loaded.dataset,
        )
        np.testing.assert_array_equal(data[:], stock_data)
        np.testing.assert_array_equal(seg[:], stock_seg)
        assert set(properties) == set(stock_properties)
        for value, locations in stock_properties["class_locations"].items():
            np.testing.assert_array_equal(properties["class_locations"][value], locations)


def test_images_and_human_labels_are_links_and_nothing_of_the_base_changes(planned: Dataset) -> None:
    base = planned.folders.preprocessed / "nnUNetPlans_3d_fullres"
    references = planned.folders.preprocessed / "gt_segmentations"
    before = contents(base), contents(references)
    made = small_round(planned, "3d_fullres_r01")
    assert (contents(base), contents(references)) == before
    for name in ("case_00.b2nd", "case_00_seg.b2nd", "case_00.pkl"):
        assert os.path.samefile(base / name, made.data_folder / name)
    image = planned.folders.preprocessed / "nnUNetPlans_3d_fullres_un" / planned.unlabelled[0] / "image.b2nd"
    assert os.path.samefile(image, made.data_folder / f"{planned.unlabelled[0]}.b2nd")


def test_where_links_are_impossible_files_are_copied(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(round_configuration.os, "link", refuse)
    made = small_round(planned, "3d_fullres_r01")
    base = planned.folders.preprocessed / "nnUNetPlans_3d_fullres"
    assert not os.path.samefile(base / "case_00.b2nd", made.data_folder / "case_00.b2nd")
    assert file_hash(base / "case_00.b2nd") == file_hash(made.data_folder / "case_00.b2nd")


def test_distrust_is_what_confidence_lacks_on_the_preprocessed_grid(planned: Dataset) -> None:
    import blosc2

    made = small_round(planned, "3d_fullres_r01")
    assert sorted(p.name for p in made.confidence_folder.iterdir()) == [f"{c}.b2nd" for c in planned.unlabelled]
    case_id = planned.unlabelled[0]
    distrust = blosc2.open(str(made.confidence_folder / f"{case_id}.b2nd"), mode="r")[:]
    image = blosc2.open(str(made.data_folder / f"{case_id}.b2nd"), mode="r")
    assert distrust.dtype == np.uint8
    assert distrust.shape == (1, *image.shape[1:])
    # confidence was a ramp from 0 to 0.75 along x
    along_x = distrust[0].mean(axis=(0, 1))
    assert (np.diff(along_x) < 0).all()
    assert along_x[0] > 240
    assert abs(along_x[-1] - 255 * 0.25) < 15


def test_probabilities_lie_behind_the_distrust_of_machine_labels_on_the_preprocessed_grid(planned: Dataset) -> None:
    import blosc2

    later, machine = planned.unlabelled
    values = planned.cohort.class_values
    folder = planned.root / "probabilities"
    for case in planned.cohort.unlabelled:
        label, _ = read_label(planned.folders.raw / str(case.hidden_label))
        one_hot = np.stack([label == value for value in (0, *values)]).astype(np.float32)
        write_probabilities(folder / f"{case.case_id}.npz", 0.1 + 0.7 * one_hot)
    made = small_round(planned, "3d_fullres_r01", human_cases=(later,), probabilities=folder)
    opened = {c: blosc2.open(str(made.confidence_folder / f"{c}.b2nd"), mode="r")[:] for c in planned.unlabelled}
    assert (len(opened[later]), len(opened[machine])) == (1, 1 + len(values))
    seg = blosc2.open(str(made.data_folder / f"{machine}_seg.b2nd"), mode="r")[:][0]
    prob = opened[machine][1:] / 255
    assert prob.min() == pytest.approx(0.1, abs=0.01)
    assert prob.max() == pytest.approx(0.8, abs=0.01)
    for n, value in enumerate(values):
        drawn = prob[n] > 0.45
        assert 2 * (drawn & (seg == value)).sum() / (drawn.sum() + (seg == value).sum()) > 0.95
    (folder / f"{machine}.npz").unlink()
    with pytest.raises(InputError, match=rf"{machine}\.npz is missing"):
        small_round(planned, "3d_fullres_r02", probabilities=folder)


def test_the_plans_carry_the_rounds_settings_and_keep_the_others(planned: Dataset) -> None:
    before = read_plans(planned.folders)
    small_round(planned, "3d_fullres_r01")
    after = read_plans(planned.folders)
    entry = after["configurations"].pop("3d_fullres_r01")
    assert after == before
    assert entry["inherits_from"] == "3d_fullres"
    settings = RoundSettings.from_json(entry[SETTINGS_KEY])
    assert settings.pseudo_cases == tuple(planned.unlabelled)
    assert settings.confidence_folder == "nnUNetPlans_3d_fullres_r01_conf"
    assert settings.num_iterations_per_epoch == 3
    assert set(entry["architecture"]["arch_kwargs"]["features_per_stage"]) == {8}


def test_a_case_that_a_person_labelled_later_is_in_the_round_and_no_pseudo_case(planned: Dataset) -> None:
    later, machine = planned.unlabelled
    made = small_round(planned, "3d_fullres_r01", human_cases=(later,))
    assert (made.data_folder / f"{later}_seg.b2nd").is_file()
    settings = RoundSettings.from_json(read_plans(planned.folders)["configurations"]["3d_fullres_r01"][SETTINGS_KEY])
    assert (settings.human_cases, settings.pseudo_cases) == ((later,), (machine,))


def test_a_round_on_human_labels_alone_has_no_pseudo_cases(planned: Dataset) -> None:
    made = small_round(planned, "3d_fullres_r00", pseudo_cases=(), labels=None, confidence=None)
    names = {name.split(".")[0].removesuffix("_seg") for name in os.listdir(made.data_folder)}
    assert names == {case.case_id for case in planned.cohort.labelled}
    settings = RoundSettings.from_json(read_plans(planned.folders)["configurations"]["3d_fullres_r00"][SETTINGS_KEY])
    assert settings.pseudo_cases == ()


def test_the_same_round_again_is_the_one_that_is_there(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_round(planned, "3d_fullres_r01")
    before = contents(made.data_folder), contents(made.confidence_folder)
    monkeypatch.setattr(round_configuration, "_write_data", None)
    assert small_round(planned, "3d_fullres_r01") == made
    assert (contents(made.data_folder), contents(made.confidence_folder)) == before


def test_a_round_that_a_killed_process_left_half_is_made_again_the_same(planned: Dataset) -> None:
    made = small_round(planned, "3d_fullres_r01")
    before = contents(made.data_folder), contents(made.confidence_folder)
    record = planned.folders.preprocessed / "nnUNetPlans_3d_fullres_r01_round.json"
    record.unlink()
    (made.data_folder / f"{planned.unlabelled[0]}_seg.b2nd").unlink()
    remains = planned.folders.preprocessed / ".nnunet_sam2_tmp_0123456789ab_nnUNetPlans_3d_fullres_r01"
    remains.mkdir()
    assert small_round(planned, "3d_fullres_r01") == made
    assert (contents(made.data_folder), contents(made.confidence_folder)) == before
    assert not remains.exists()


def test_a_rounds_label_or_distrust_that_was_changed_is_made_again_the_same(planned: Dataset) -> None:
    made = small_round(planned, "3d_fullres_r01")
    own = [path for path in made.hashed_files if path.name.split(".")[0].removesuffix("_seg") in made.pseudo_cases]
    assert {path.name for path in own} == {
        f"{case}{end}" for case in made.pseudo_cases for end in ("_seg.b2nd", ".pkl", ".b2nd")
    }
    before = contents(made.data_folder), contents(made.confidence_folder)
    for path in (own[0], own[-1]):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert small_round(planned, "3d_fullres_r01") == made
        assert (contents(made.data_folder), contents(made.confidence_folder)) == before


def test_a_labelled_case_that_was_changed_after_preprocessing_is_refused_by_the_next_round(planned: Dataset) -> None:
    small_round(planned, "3d_fullres_r01")
    path = planned.folders.preprocessed / "nnUNetPlans_3d_fullres" / "case_00.pkl"
    path.unlink()  # the round before keeps its link to what was there
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match=r"case_00.pkl was changed after preprocessing; remove .* and run again"):
        small_round(planned, "3d_fullres_r02")
    small_round(planned, "3d_fullres_r01")


def test_a_round_is_never_changed(planned: Dataset) -> None:
    made = small_round(planned, "3d_fullres_r01")
    before = contents(made.data_folder)
    path = planned.root / "labels" / f"{planned.unlabelled[0]}.nii.gz"
    label, geometry = read_label(path)
    write_label(path, np.zeros_like(label), geometry)
    with pytest.raises(InputError, match=r"3d_fullres_r01 of .* exists with other labels or settings"):
        small_round(planned, "3d_fullres_r01")
    assert contents(made.data_folder) == before
    assert small_round(planned, "3d_fullres_r02").key != made.key


def test_a_missing_machine_label_is_refused_by_its_file(planned: Dataset) -> None:
    planned.hidden_labels(planned.root / "labels")
    path = planned.root / "labels" / "confidence" / f"{planned.unlabelled[1]}.nii.gz"
    path.unlink()
    with pytest.raises(InputError, match=str(path)):
        small_round(planned, "3d_fullres_r01")
    assert "3d_fullres_r01" not in read_plans(planned.folders)["configurations"]


def test_an_undeclared_value_in_a_machine_label_is_refused(planned: Dataset) -> None:
    planned.hidden_labels(planned.root / "labels")
    path = planned.root / "labels" / f"{planned.unlabelled[1]}.nii.gz"
    label, geometry = read_label(path)
    write_label(path, label + 1, geometry)
    with pytest.raises(InputError, match="holds label 3"):
        small_round(planned, "3d_fullres_r01")
    assert not (planned.folders.preprocessed / "nnUNetPlans_3d_fullres_r01").exists()


def test_a_machine_label_never_takes_a_human_labels_place(planned: Dataset) -> None:
    with pytest.raises(InputError, match="case_00 has a human label"):
        small_round(planned, "3d_fullres_r01", pseudo_cases=["case_00"])
