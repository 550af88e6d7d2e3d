"""Segmentation-only preprocessing, held against nnU-Net's own preprocessor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anisotropic_data import LABELS, Dataset

from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.nnunet import cases as nnunet_cases
from nnunet_sam2.rounds.nnunet.cases import (
    IMAGE,
    Preprocessing,
    load_preprocessing,
    preprocess_map,
    preprocess_segmentation,
    preprocess_unlabelled,
    preprocessed_case,
    unlabelled_folder,
)
from nnunet_sam2.volumes import read_label

TABLES: dict[str, dict[str, Any]] = {
    "classes": {"labels": LABELS},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
    "ignore": {"labels": {"background": 0, "large": 1, "ignore": 2}},
}


def stock(loaded: Preprocessing, images: tuple[Path, ...], label_zyx: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Run nnU-Net's whole preprocessor on image and label."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    data, properties = loaded.plans.image_reader_writer_class().read_images([str(p) for p in images])
    return DefaultPreprocessor(verbose=False).run_case_npy(
        data, label_zyx.astype(np.float32)[None], properties, loaded.plans, loaded.configuration, loaded.dataset
    )


def hidden_label(dataset: Dataset, case_id: str) -> np.ndarray:
    return read_label(dataset.folders.raw / str(dataset.cohort.case(case_id).hidden_label))[0]


@pytest.mark.parametrize("table", list(TABLES))
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("transpose", [[0, 1, 2], [1, 2, 0]])
def test_segmentation_alone_is_bit_identical_to_the_stock_preprocessor(
    planned: Dataset, table: str, configuration: str, transpose: list[int]
) -> None:
    loaded = load_preprocessing(planned.folders, configuration)
    loaded = replace(loaded, dataset={**loaded.dataset, "regions_class_order": None, **TABLES[table]})
    loaded.plans.plans["transpose_forward"] = transpose
    for case_id in planned.unlabelled:
        case = planned.cohort.case(case_id)
        label_zyx = hidden_label(planned, case_id)
        folder = planned.root / "made" / case_id
        images = planned.cohort.image_paths(case)
        nnunet_cases._preprocess_image([str(p) for p in images], folder, "key", loaded)
        properties, nonzero_zyx = preprocessed_case(folder)
        seg_czyx, locations = preprocess_segmentation(label_zyx, properties, nonzero_zyx, loaded)
        data_czyx, stock_seg_czyx, stock_properties = stock(loaded, images, label_zyx)
        assert seg_czyx.shape != (1, *label_zyx.shape)  # cropped and resampled
        assert (seg_czyx == -1).any()
        assert seg_czyx.dtype == np.int16
        np.testing.assert_array_equal(seg_czyx, stock_seg_czyx.astype(np.int16))
        assert set(locations) == set(stock_properties["class_locations"])
        for name, stock_locations in stock_properties["class_locations"].items():
            assert len(stock_locations) > 0
            np.testing.assert_array_equal(locations[name], stock_locations)
        np.testing.assert_array_equal(read_array(folder / IMAGE), data_czyx)


def test_labels_outside_the_image_and_absent_classes_are_treated_as_stock_does(planned: Dataset) -> None:
    loaded = load_preprocessing(planned.folders, "3d_fullres")
    case_id = planned.unlabelled[0]
    label_zyx = np.zeros_like(hidden_label(planned, case_id))
    label_zyx[1:3, :3, :3] = 1  # where the image is zero
    properties, nonzero_zyx = preprocessed_case(unlabelled_folder(planned.folders, "3d_fullres") / case_id)
    seg_czyx, locations = preprocess_segmentation(label_zyx, properties, nonzero_zyx, loaded)
    _, stock_seg_czyx, stock_properties = stock(
        loaded, planned.cohort.image_paths(planned.cohort.case(case_id)), label_zyx
    )
    np.testing.assert_array_equal(seg_czyx, stock_seg_czyx)
    assert len(locations[2]) == len(stock_properties["class_locations"][2]) == 0


def test_a_map_keeps_its_range_and_lies_where_the_segmentation_lies(planned: Dataset) -> None:
    loaded = load_preprocessing(planned.folders, "3d_fullres")
    case_id = planned.unlabelled[0]
    label_zyx = hidden_label(planned, case_id)
    properties, nonzero_zyx = preprocessed_case(unlabelled_folder(planned.folders, "3d_fullres") / case_id)
    seg_czyx, _ = preprocess_segmentation(label_zyx, properties, nonzero_zyx, loaded)
    np.testing.assert_allclose(preprocess_map(np.ones(label_zyx.shape, np.float32), properties, loaded), 1, atol=1e-6)
    mapped_czyx = preprocess_map((label_zyx > 0).astype(np.float32), properties, loaded)
    assert mapped_czyx.shape == seg_czyx.shape
    assert mapped_czyx.min() >= 0
    assert mapped_czyx.max() <= 1 + 1e-6
    ours, theirs = mapped_czyx > 0.5, seg_czyx > 0
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.97


def test_a_map_of_another_grid_is_refused(planned: Dataset) -> None:
    loaded = load_preprocessing(planned.folders, "3d_fullres")
    properties, _ = preprocessed_case(unlabelled_folder(planned.folders, "3d_fullres") / planned.unlabelled[0])
    with pytest.raises(InputError, match=r"shape \(3, 4, 5\) does not lie on its image's grid"):
        preprocess_map(np.ones((3, 4, 5), np.float32), properties, loaded)


def test_images_are_preprocessed_once_and_a_half_written_one_again(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = nnunet_cases._preprocess_image

    def count(images: list[str], target: Path, key: str, loaded: Preprocessing) -> None:
        made.append(target.name)
        real(images, target, key, loaded)

    monkeypatch.setattr(nnunet_cases, "_preprocess_image", count)
    folder = preprocess_unlabelled(planned.folders, planned.cohort, "3d_fullres", planned.unlabelled)
    assert made == []
    before = (folder / planned.unlabelled[0] / IMAGE).read_bytes()
    (folder / planned.unlabelled[0] / "record.json").unlink()
    preprocess_unlabelled(planned.folders, planned.cohort, "3d_fullres", planned.unlabelled)
    assert made == [planned.unlabelled[0]]
    assert (folder / planned.unlabelled[0] / IMAGE).read_bytes() == before


def test_another_preprocessor_is_refused_by_name(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.preprocessing.preprocessors import default_preprocessor

    class Other(default_preprocessor.DefaultPreprocessor):
        def run_case_npy(self, *_: Any) -> Any:
            raise NotImplementedError

    loaded = load_preprocessing(planned.folders, "3d_fullres")
    monkeypatch.setattr(type(loaded.configuration), "preprocessor_class", Other)
    with pytest.raises(InputError, match="rounds need DefaultPreprocessor"):
        load_preprocessing(planned.folders, "3d_fullres")


def read_array(path: Path) -> np.ndarray:
    import blosc2

    return np.asarray(blosc2.open(str(path), mode="r")[:])
