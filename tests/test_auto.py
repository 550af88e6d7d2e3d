"""Strategy auto: views along all axes that show the volume well."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry, view_axes
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.auto.strategy import Auto, AutoOptions
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import Volume

SIZE = 64
SHAPE = (18, 20, 22)


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


def _case(backend: MetaSam2Backend, case_id: str, seed: int, spacing: tuple[float, float, float]) -> Support:
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    centre = np.array([9, 10, 11]) + rng.integers(-1, 2, 3)
    ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 36
    image = ball * 1.0 + rng.normal(0, 0.05, SHAPE)
    geometry = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=spacing[::-1])
    frames = Frames.from_volume(Volume(array_czyx=image[None].astype(np.float32), geometry=geometry), size=SIZE)
    return Support(
        case_id=case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=ball.astype(np.uint8),
        geometry=geometry,
    )


@pytest.fixture(scope="module")
def cases(backend: MetaSam2Backend) -> list[Support]:
    return [_case(backend, f"case_{n}", n, (1.0, 1.0, 1.0)) for n in range(3)]


def test_a_volume_sliced_along_another_axis_comes_back_on_its_own_grid(cases: list[Support]) -> None:
    frames = cases[0].frames
    for axis in range(3):
        other = frames.along(axis)
        assert len(other) == SHAPE[axis]
        planes = np.moveaxis(cases[0].label_zyx, axis, 0)
        assert np.array_equal(other.slices_first(cases[0].label_zyx), planes)
        assert np.array_equal(other.slices_back(planes[None])[0], cases[0].label_zyx)
    assert frames.along(frames.slice_axis).key == frames.key


@pytest.mark.parametrize(
    ("shape", "spacing", "axes"),
    [
        ((20, 20, 20), (1.0, 1.0, 1.2), (0, 1, 2)),
        ((20, 20, 20), (5.0, 1.0, 1.0), (0,)),
        ((8, 200, 200), (1.0, 1.0, 1.0), (0,)),
        ((1, 64, 64), (1.0, 1.0, 1.0), (0,)),
    ],
)
def test_only_isotropic_volumes_are_seen_from_all_sides(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], axes: tuple[int, ...]
) -> None:
    assert view_axes(Geometry(shape_zyx=shape, spacing_xyz_mm=spacing[::-1]), 0) == axes


def test_an_isotropic_query_gets_one_member_a_view_and_their_mean_is_no_worse_than_the_worst(
    cases: list[Support], backend: MetaSam2Backend
) -> None:
    strategy = Auto(AutoOptions(check_slices=0))
    members = list(strategy.members(cases[0].as_query(), cases[1:], (1,), backend, np.random.default_rng(0)))
    assert [member.record["view"] for member in members] == [0, 1, 2]
    truth = cases[0].label_zyx == 1

    def dice(found: np.ndarray) -> float:
        return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))

    single = [dice(member.prob_kzyx[0] > 0.5) for member in members]
    assert dice(fuse(members, (1,)).label_zyx == 1) > max(0.7, min(single))


def test_an_anisotropic_query_on_whole_slices_is_labelled_as_transfer_labels_it(backend: MetaSam2Backend) -> None:
    cases = [_case(backend, f"case_{n}", n, (4.0, 1.0, 1.0)) for n in range(3)]
    auto, transfer = Auto(AutoOptions(decoder="off", zoom="off")), Transfer(TransferOptions(decoder="off"))
    found = []
    for strategy in (auto, transfer):
        strategy.prepare(cases[1:], (1,), backend)
        (member,) = strategy.members(cases[0].as_query(), cases[1:], (1,), backend, np.random.default_rng(0))
        found.append(member.prob_kzyx)
    assert np.array_equal(*found)


def test_views_and_close_ups_can_be_turned_off_by_name(cases: list[Support], backend: MetaSam2Backend) -> None:
    strategy = make_strategy("auto", {"views": "one", "zoom": "off", "check_slices": "0"})
    members = list(strategy.members(cases[0].as_query(), cases[1:], (1,), backend, np.random.default_rng(0)))
    assert len(members) == 1
    with pytest.raises(ValueError, match="views"):
        dataclasses.replace(AutoOptions(), views="two")
    with pytest.raises(ValueError, match="zoom"):
        AutoOptions(zoom="near")
