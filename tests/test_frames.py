"""Frames: window, size, masks, soft cells, and the way back to the volume's grid."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry, choose_slice_axis
from nnunet_sam2.planes import intensity_window, overlap_matrix


def make_frames(array_czyx, *, size=64, spacing_xyz_mm=(1.0, 1.0, 1.0), **options):
    geometry = Geometry(shape_zyx=array_czyx.shape[1:], spacing_xyz_mm=spacing_xyz_mm)
    return Frames.from_volume(SimpleNamespace(array_czyx=array_czyx, geometry=geometry), size=size, **options)


@pytest.fixture
def array_czyx():
    return np.random.default_rng(0).normal(100, 20, (1, 5, 30, 40)).astype(np.float32)


def test_the_slice_axis_is_the_one_with_clearly_the_largest_spacing():
    def axis(*spacing_xyz_mm, shape_zyx=(20, 20, 20)):
        return choose_slice_axis(Geometry(shape_zyx=shape_zyx, spacing_xyz_mm=spacing_xyz_mm))

    assert axis(1.0, 1.0, 7.0) == 0
    assert axis(1.0, 4.0, 1.0) == 1
    assert axis(4.0, 1.0, 1.0) == 2
    assert axis(1.4, 1.0, 1.0) == 0
    assert axis(4.0, 1.0, 1.0, shape_zyx=(1, 20, 20)) == 0


def test_percentiles_are_those_of_the_voxels_above_the_minimum(array_czyx):
    padded = np.zeros((1, 10, 60, 80), np.float32)
    padded[:, :5, :30, :40] = array_czyx
    low, high = intensity_window(padded[0], 0.5, 99.5)
    assert (low, high) == pytest.approx(tuple(np.percentile(array_czyx, (0.5, 99.5))))


def test_a_constant_volume_gives_black_frames():
    frames = make_frames(np.full((1, 3, 20, 20), 7.0, np.float32))
    assert not frames.image(1).any()


def test_a_volume_with_nan_is_refused(array_czyx):
    array_czyx[0, 2, 3, 4] = np.nan
    with pytest.raises(InputError, match="NaN"):
        make_frames(array_czyx)


def test_images_are_windowed_to_zero_and_one_in_three_equal_channels(array_czyx):
    frames = make_frames(array_czyx)
    image = frames.image(2)
    assert len(frames) == 5
    assert image.shape == (3, 64, 64)
    assert image.dtype == np.float32
    assert 0 <= image.min() < 0.3 < 0.7 < image.max() <= 1
    assert (image[0] == image[1]).all()
    assert (image[0] == image[2]).all()


def test_three_channels_become_colours_and_one_channel_may_be_named(array_czyx):
    three = np.concatenate([array_czyx, array_czyx[:, ::-1], -array_czyx])
    image = make_frames(three).image(0)
    assert not np.allclose(image[0], image[1])
    only = make_frames(three, channels=(1, 1, 1)).image(0)
    assert np.array_equal(only[0], image[1])
    assert np.array_equal(only[2], image[1])
    with pytest.raises(InputError, match="channels"):
        make_frames(three, channels=(0, 1, 3))


def test_a_slice_of_model_size_is_rendered_voxel_by_voxel():
    array = np.random.default_rng(1).uniform(0, 1, (1, 2, 64, 64)).astype(np.float32)
    frames = make_frames(array, lower_percentile=0, upper_percentile=100)
    low, high = frames.windows[0]
    assert frames.image(1)[0] == pytest.approx(np.clip((array[0, 1] - low) / (high - low), 0, 1), abs=1e-6)


@pytest.mark.parametrize("change", ["voxel", "size", "axis", "window", "channels"])
def test_the_key_changes_with_whatever_changes_a_pixel(array_czyx, change):
    two = np.concatenate([array_czyx, array_czyx + 5])
    key = make_frames(two).key
    assert make_frames(two.copy()).key == key
    if change == "voxel":
        two[0, 1, 2, 3] += 30
        assert make_frames(two).key != key
    else:
        options = {
            "size": {"size": 96},
            "axis": {"slice_axis": 1},
            "window": {"upper_percentile": 98.0},
            "channels": {"channels": (1, 1, 1)},
        }[change]
        assert make_frames(two, **options).key != key


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_a_mask_comes_back_from_model_size_where_it_was(slice_axis):
    mask = np.zeros((12, 30, 40), bool)
    mask[3:9, 8:21, 10:33] = True
    frames = make_frames(np.zeros((1, *mask.shape), np.float32), slice_axis=slice_axis, size=128)
    model = frames.masks_to_model(mask)
    assert model.shape == (mask.shape[slice_axis], 128, 128)
    back = frames.to_volume(model[None].astype(np.float32))
    assert back.shape == (1, *mask.shape)
    assert np.array_equal(back[0] > 0.5, mask)


def test_maps_come_back_the_same_from_an_array_and_from_a_generator():
    torch = pytest.importorskip("torch")
    frames = make_frames(np.zeros((1, 4, 20, 30), np.float32))
    maps = np.random.default_rng(2).uniform(size=(2, 4, 16, 16)).astype(np.float32)
    whole = frames.to_volume(maps)
    assert np.array_equal(whole, frames.to_volume(torch.from_numpy(maps[:, n]) for n in range(4)))
    assert whole.dtype == np.float32
    with pytest.raises(ValueError, match="4 frames"):
        frames.to_volume(maps[:, n] for n in range(3))
    with pytest.raises(ValueError, match="4"):
        frames.to_volume(maps[:, :3])


def test_a_mask_that_vanishes_at_model_size_is_reported_slice_by_slice():
    mask = np.zeros((3, 400, 400), bool)
    mask[0, 100:200, 100:200] = True
    mask[2, 50, 50] = True
    frames = make_frames(np.zeros((1, *mask.shape), np.float32), size=64)
    assert frames.vanished_slices(mask) == (2,)
    assert frames.vanished_slices(mask, frames.masks_to_model(mask)) == (2,)


@pytest.mark.parametrize("shape_hw", [(64, 64), (30, 50), (130, 70), (37, 128)])
def test_soft_cells_are_the_area_fractions_of_a_fine_count(shape_hw):
    label = np.random.default_rng(3).integers(0, 3, (2, *shape_hw)).astype(np.uint8)
    frames = make_frames(np.zeros((1, *label.shape), np.float32), size=64)
    cells = frames.soft_cells(label, (1, 2), 16)
    grid = 4
    # The slow twin: repeat every voxel `grid` times along both axes, then count in exact blocks.
    fine = label.repeat(grid, 1).repeat(grid, 2).reshape(2, grid, shape_hw[0], grid, shape_hw[1])
    for k, value in enumerate((1, 2)):
        assert cells[:, k] == pytest.approx((fine == value).mean(axis=(2, 4)), abs=1e-6)


def test_soft_cells_of_all_values_sum_to_one(array_czyx):
    label = np.random.default_rng(4).integers(0, 4, array_czyx.shape[1:])
    cells = make_frames(array_czyx).soft_cells(label, (0, 1, 2, 3), 16)
    assert cells.shape == (5, 4, 4, 4)
    assert cells.sum(axis=1) == pytest.approx(1.0, abs=1e-6)
    assert overlap_matrix(7, 3).sum(axis=1) == pytest.approx(1.0)


def test_ready_made_images_are_frames_as_they_are():
    images = np.random.default_rng(5).uniform(size=(3, 3, 32, 32)).astype(np.float32)
    frames = Frames.from_images(images)
    assert len(frames) == 3
    assert frames.size == 32
    assert np.array_equal(frames.image(2), images[2])


def test_a_size_that_no_patch_fits_is_refused(array_czyx):
    with pytest.raises(InputError, match="16"):
        make_frames(array_czyx, size=100)
