"""The synthetic subjects that the embedded SAM 2 is trained on."""

from __future__ import annotations

import numpy as np
import torch
from embedded_sam2.anatomy import draw_anatomy, draw_subject, render_labels
from embedded_sam2.painting import draw_acquisition, draw_contrast, paint
from embedded_sam2.transfer_score import transfer_dice
from embedded_sam2.volumes import Case, draw_family

SIZE = 64


def _family(seed: int, **changes: float) -> list[Case]:
    return draw_family(np.random.default_rng(seed), subjects=2, slices=4, size=SIZE, **changes)


def test_the_same_seed_gives_the_same_subjects_and_another_seed_others():
    first, again, other = _family(1), _family(1), _family(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.image_nss, b.image_nss)
        np.testing.assert_array_equal(a.labels_nss, b.labels_nss)
    assert not np.array_equal(first[0].labels_nss, other[0].labels_nss)


def test_images_are_finite_in_zero_to_one_and_fit_their_labels():
    for seed in range(6):
        for case in _family(seed):
            assert case.image_nss.shape == case.labels_nss.shape == (4, SIZE, SIZE)
            assert np.isfinite(case.image_nss).all()
            assert 0 <= case.image_nss.min() <= case.image_nss.max() <= 1
            assert case.image_nss.std() > 0.01


def test_subjects_of_one_anatomy_are_more_alike_than_those_of_two():
    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        return float((a == b)[(a > 0) | (b > 0)].mean())

    same, apart = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        anatomy, stranger = draw_anatomy(rng), draw_anatomy(rng)
        labels = [render_labels(draw_subject(a, rng), (3, 48, 48)) for a in (anatomy, anatomy, stranger)]
        assert not np.array_equal(labels[0], labels[1])
        same.append(overlap(labels[0], labels[1]))
        apart.append(overlap(labels[0], labels[2]))
    assert np.mean(same) > np.mean(apart) + 0.2


def test_there_are_slices_without_a_structure_and_structures_that_touch_the_border():
    absent = touching = 0
    for seed in range(10):
        for case in _family(seed):
            for value in np.unique(case.labels_nss)[1:]:
                shown = (case.labels_nss == value).any(axis=(1, 2))
                absent += not shown.all()
                edge = case.labels_nss[:, [0, -1]] == value
                touching += bool(edge.any())
    assert absent > 10
    assert touching > 10


def test_painting_is_decided_by_its_arguments_alone():
    rng = np.random.default_rng(3)
    labels = render_labels(draw_subject(draw_anatomy(rng), rng), (3, 48, 48))
    contrast, acquisition = draw_contrast(int(labels.max()) + 1, rng), draw_acquisition(rng)
    np.testing.assert_array_equal(paint(labels, contrast, acquisition), paint(labels, contrast, acquisition))


def test_features_that_name_the_tissue_carry_every_label_and_constant_ones_do_not():
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(2):
        labels = np.zeros((2, SIZE, SIZE), np.uint8)
        # Wherever the block lies, its features tell it.
        y, x = rng.integers(0, 3, 2) * 16
        labels[:, y : y + 16, x : x + 16] = 1
        grid = labels[:, 8::16, 8::16].astype(np.float32)
        cases.append((torch.from_numpy(np.stack([grid, 1 - grid], axis=1)) * 3, labels))
    assert not np.array_equal(cases[0][1], cases[1][1])
    telling = transfer_dice(cases[0][0], cases[0][1], [cases[1][0]], [cases[1][1]], neighbours=1)
    silent = transfer_dice(
        torch.ones_like(cases[0][0]), cases[0][1], [torch.ones_like(cases[1][0])], [cases[1][1]], neighbours=1
    )
    assert telling[0] > 0.7 > 0.2 > silent[0]
