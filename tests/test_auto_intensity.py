"""Strategy auto: queries of another contrast than the supports'."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.explain.members import explain_member
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.strategies.auto.intensity import contrast_like, landmarks
from nnunet_sam2.labelling.strategies.auto.strategy import Auto, AutoOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import Volume

SIZE = 128
SHAPE = (3, 96, 96)


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("embedded", device="cpu", image_size=SIZE, threads=1)


def _case(backend: MetaSam2Backend, case_id: str, seed: int, contrast: str = "plain") -> Support:
    """A round body with a bright and two dark organs, of which the bright one is labelled."""
    rng = np.random.default_rng(seed)
    _, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    dy, dx = rng.integers(-4, 5, 2)

    def disc(row: int, column: int, radius: int) -> np.ndarray:
        return np.asarray((y - row - dy) ** 2 + (x - column - dx) ** 2 < radius**2)

    body, organ = disc(48, 48, 40), disc(36, 36, 11)
    image = 0.45 + 0.3 * organ - 0.25 * disc(60, 60, 10) - 0.15 * disc(34, 62, 8)
    image += rng.normal(0, 0.02, SHAPE)
    image = {"plain": image, "inverted": 1 - image, "dark": image.clip(0, 1) ** 4}[contrast]
    image = np.where(body, image.clip(0.01, 1), 0)
    geometry = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.0, 1.0, 6.0))
    frames = Frames.from_volume(Volume(array_czyx=image[None].astype(np.float32), geometry=geometry), size=SIZE)
    return Support(
        case_id=case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=(organ & body).astype(np.uint8),
        geometry=geometry,
    )


@pytest.fixture(scope="module")
def supports(backend: MetaSam2Backend) -> list[Support]:
    return [_case(backend, f"case_{n}", n) for n in range(2)]


def test_remapping_keeps_the_background_and_follows_the_curve(supports: list[Support]) -> None:
    frames = supports[0].frames
    inverted = frames.remapped({0: (np.array([0.0, 1.0]), np.array([1.0, 0.0]))})
    before, after = frames.image(1)[0], inverted.image(1)[0]
    assert (after[before == 0] == 0).all()
    inside = (before > 0.05) & (after > 0.05)
    middle = inside[32:96, 32:96]
    np.testing.assert_allclose((before + after)[32:96, 32:96][middle].mean(), 1.0, atol=0.02)
    assert inverted.key != frames.key
    assert (np.diff(landmarks(frames)) > 0).all()


@pytest.mark.parametrize(("contrast", "taken"), [("plain", "as it is"), ("inverted", "inverted"), ("dark", "matched")])
def test_foreign_contrasts_are_told_from_the_supports_own(
    supports: list[Support], backend: MetaSam2Backend, contrast: str, taken: str
) -> None:
    query = _case(backend, "query", 7, contrast)
    seen, record = contrast_like(query.as_query(), supports, (1,), backend)
    assert record["taken"] == taken
    # Slices in another contrast are only encoded where the landmarks let it be taken.
    assert bool(record["distance"]) == (contrast != "plain")
    if taken == "as it is":
        assert seen.embeddings is query.embeddings
    else:
        own, theirs = landmarks(query.frames), landmarks(supports[0].frames)
        assert np.abs(landmarks(seen.frames) - theirs).mean() < 0.5 * np.abs(own - theirs).mean() + 0.05


def test_a_query_of_inverted_contrast_is_labelled_better_when_it_is_matched(
    supports: list[Support], backend: MetaSam2Backend
) -> None:
    query, dice = _case(backend, "query", 7, "inverted"), {}
    for intensities in ("checked", "as they are"):
        strategy = Auto(AutoOptions(check_slices=0, intensities=intensities))
        rng = np.random.default_rng(0)
        members = list(strategy.members(query.as_query(), supports, (1,), backend, rng))
        label_zyx = fuse(members, (1,)).label_zyx
        dice[intensities] = dice_by_class(label_zyx, query.label_zyx, (1,))[1] or 0.0
        said = " ".join(explain_member("auto", {"name": members[0].name, **members[0].record}, "1").made)
        assert ("were inverted before" in said) == (intensities == "checked")
    assert dice["checked"] > 0.8
    assert dice["checked"] > dice["as they are"] + 0.1


def test_images_of_several_channels_are_left_as_they_are(supports: list[Support], backend: MetaSam2Backend) -> None:
    colour = Frames.from_images(np.random.default_rng(0).random((2, 3, SIZE, SIZE), np.float32))
    query = dataclasses.replace(
        supports[0].as_query(), frames=colour, embeddings=backend.embed(colour), geometry=colour.geometry
    )
    seen, record = contrast_like(query, supports, (1,), backend)
    assert seen is query
    assert record == {"taken": "as it is"}
