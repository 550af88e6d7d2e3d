from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cohort.generated import (
    LARGE_ORGAN,
    SMALL_ORGAN,
    draw_subject,
    render,
    write_generated_cohort,
)
from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import read_label, read_volume

SHAPE = (12, 40, 40)


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        _hashes(
            write_generated_cohort(tmp_path / name, seed=seed, n_labelled=1, n_unlabelled=1, n_test=1, shape_zyx=SHAPE)
        )
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith(".nii.gz"))


def test_a_subject_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = write_generated_cohort(tmp_path / "few", n_labelled=1, n_unlabelled=1, n_test=0, shape_zyx=SHAPE)
    more = write_generated_cohort(tmp_path / "more", n_labelled=2, n_unlabelled=2, n_test=1, shape_zyx=SHAPE)
    name = "images/subject_001.nii.gz"
    assert file_hash(few / name) == file_hash(more / name)


def test_unlabelled_subjects_have_their_truth_apart_from_the_labels(generated_folder: Path) -> None:
    names = {
        folder: sorted(p.name for p in (generated_folder / folder).iterdir())
        for folder in ("images", "labels", "labelsHidden", "test/images", "test/labels")
    }
    assert len(names["images"]) == 5
    assert (len(names["labels"]), len(names["labelsHidden"])) == (3, 2)
    assert sorted(names["labels"] + names["labelsHidden"]) == names["images"]
    assert names["test/images"] == names["test/labels"]


def test_every_subject_has_both_organs_and_thick_slices(generated_folder: Path) -> None:
    for path in sorted(generated_folder.rglob("labels*/*.nii.gz")):
        label, geometry = read_label(path)
        shares = [float((label == value).mean()) for value in (LARGE_ORGAN, SMALL_ORGAN)]
        assert shares[0] > 0.02
        assert shares[1] > 0.003
        assert shares[0] > shares[1]
        z, y, _ = geometry.spacing_zyx_mm
        assert z > 1.5 * y


def test_subjects_differ_in_anatomy_and_contrast_and_thresholds_do_not_solve_them() -> None:
    dices, volumes, means = [], [], []
    for i in range(6):
        image, label = render(draw_subject(np.random.default_rng([0, i])))
        large = label == LARGE_ORGAN
        volumes.append(int(large.sum()))
        means.append(float(image[large].mean()))
        best = 0.0
        for low in np.percentile(image[large], (2, 5, 10, 20)):
            for high in np.percentile(image[large], (80, 90, 95, 98)):
                guess = (image >= low) & (image <= high)
                best = max(best, 2 * (guess & large).sum() / (guess.sum() + large.sum()))
        dices.append(best)
    assert max(volumes) > 1.3 * min(volumes)
    assert max(means) > 1.5 * min(means)
    assert np.mean(dices) < 0.7  # even with the best window of each subject, chosen by its own truth


def test_a_folder_in_use_and_impossible_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_generated_cohort(tmp_path)
    with pytest.raises(InputError, match="at least 8 voxels"):
        write_generated_cohort(tmp_path / "b", shape_zyx=(4, 40, 40))
    with pytest.raises(InputError, match="at least 1 labelled"):
        write_generated_cohort(tmp_path / "b", n_labelled=0)


def test_images_are_finite_and_not_constant(generated_folder: Path) -> None:
    for path in sorted((generated_folder / "images").iterdir()):
        image = read_volume([path]).array_czyx
        assert image.std() > 20
        assert image.min() >= 0
