"""Images made ready for a chain: threshold, subject, point, side, artefacts; and their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.strategies.chain.images import cleaned, ready_image
from nnunet_sam2.labelling.strategies.chain.video import order_by_appearance, spread_best
from nnunet_sam2.planes import resize

SIZE = 64


def mammogram(seed: int, *, right: bool = False, mark: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return an image like a mammogram (96 x 48, 0 to 4000) and the breast's mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :48]
    height, width = rng.uniform(30, 40), rng.uniform(20, 30)
    breast = ((y - rng.uniform(44, 52)) / height) ** 2 + (x / width) ** 2 <= 1
    image = 150 + rng.normal(0, 15, breast.shape)
    image[breast] += 700 + 900 * np.exp(-(((y - 50) / 15) ** 2 + ((x - 8) / 10) ** 2))[breast]
    if mark:
        image[4:12, 38:46] = 3900
    if right:
        image, breast = image[:, ::-1], breast[:, ::-1]
    return image.clip(0, 4000).astype(np.float32), breast


def frames_of(image: np.ndarray, size: int = SIZE) -> Frames:
    """Return one image as the frames of a volume of one slice."""
    return Frames(
        array_czyx=image[None, None],
        geometry=Geometry(shape_zyx=(1, *image.shape)),
        size=size,
        slice_axis=0,
        channels=(0, 0, 0),
        windows=[(0.0, 4000.0)],
    )


def test_the_point_lies_in_the_subject_and_the_record_says_how_it_came_about() -> None:
    image, breast = mammogram(0)
    ready = ready_image(frames_of(image), 0)
    x, y = ready.record["point"]
    assert breast[int(y), int(x)]
    cut = ready.record["threshold"]
    assert cut["method"] == "triangle"
    assert cut["intensity"] == pytest.approx(4000 * cut["value"], abs=0.5)
    assert 150 < cut["intensity"] < 850
    assert ready.record["component"]["of"] >= 2
    assert ready.record["component"]["share_of_image"] == pytest.approx(breast.mean(), rel=0.1)
    x0, y0, x1, y1 = ready.record["component"]["box"]
    rows, columns = np.nonzero(breast)
    np.testing.assert_allclose([x0, y0, x1, y1], [0, rows.min(), columns.max() + 1, rows.max() + 1], atol=2)


def test_marks_beside_the_subject_are_painted_over_and_the_subject_is_not_touched() -> None:
    image, breast = mammogram(1)
    clean, _ = mammogram(1, mark=False)
    ready = ready_image(frames_of(image), 0)
    before = frames_of(image).image(0)
    without = frames_of(clean).image(0)
    inside = resize(breast[None].astype(np.float32), (SIZE, SIZE))[0] == 1
    assert np.array_equal(ready.image_3ss[:, inside], before[:, inside])
    assert before.max() > 0.9 > ready.image_3ss.max()
    np.testing.assert_allclose(ready.image_3ss, without, atol=0.05)
    assert ready.record["removed_share_of_image"] > 0
    kept = ready_image(frames_of(image), 0, artefacts=False)
    assert np.array_equal(kept.image_3ss, before)


def test_both_sides_look_the_same_to_the_chain_and_the_point_is_told_where_it_is() -> None:
    (left, _), (right, breast) = mammogram(2), mammogram(2, right=True)
    a, b = (ready_image(frames_of(image), 0) for image in (left, right))
    assert (a.flipped, b.flipped) == (False, True)
    np.testing.assert_allclose(a.image_3ss, b.image_3ss, atol=1e-6)
    assert np.array_equal(a.subject_ss, b.subject_ss)
    np.testing.assert_allclose(a.point_xy, b.point_xy)
    assert b.record["point"][0] == pytest.approx(48 - a.record["point"][0])
    assert breast[int(b.record["point"][1]), int(b.record["point"][0])]
    assert not ready_image(frames_of(right), 0, laterality=False).flipped


@pytest.mark.parametrize("value", [0.0, 700.0])
def test_an_image_without_contrast_is_its_own_subject(value: float) -> None:
    ready = ready_image(frames_of(np.full((20, 30), value, np.float32)), 0)
    assert ready.subject_ss.all()
    np.testing.assert_allclose(ready.record["point"], [15, 10], atol=1)


@pytest.mark.parametrize("method", ["triangle", "otsu", "li"])
def test_every_threshold_finds_the_breast(method: str) -> None:
    image, breast = mammogram(3)
    x, y = ready_image(frames_of(image), 0, threshold=method).record["point"]
    assert breast[int(y), int(x)]


def test_an_unknown_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="no threshold yen"):
        ready_image(frames_of(mammogram(0)[0]), 0, threshold="yen")


def test_cleaning_keeps_the_largest_piece_and_fills_its_holes() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:10, 2:10] = True
    mask[5, 5] = False
    mask[15, 15] = True
    expected = np.zeros_like(mask)
    expected[2:10, 2:10] = True
    assert np.array_equal(cleaned(mask), expected)
    assert not cleaned(np.zeros((4, 4), bool)).any()


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_in_the_chain_look_alike(seed: int) -> None:
    angles = np.linspace(0, 1.4, 9)
    shuffled = np.random.default_rng(seed).permutation(9)
    vectors: Any = np.stack([np.cos(angles), np.sin(angles)], axis=1)[shuffled]
    order = shuffled[order_by_appearance(vectors)]
    assert order.tolist() in (list(range(9)), list(range(8, -1, -1)))


def test_an_odd_image_ends_up_at_an_end_of_the_chain() -> None:
    vectors = np.eye(5) + 1
    vectors[2] = [-1, 0, -3, 0, 1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert order_by_appearance(vectors).index(2) in (0, 4)
    assert order_by_appearance(np.ones((1, 3))) == [0]
    assert order_by_appearance(np.ones((0, 3))) == []


def test_anchors_are_the_best_of_equal_stretches() -> None:
    assert spread_best([0.1, 0.9, 0.3, 0.2, 0.5, 0.6], 3) == [1, 2, 5]
    assert spread_best([0.1, 0.9], 3) == [0, 1]
