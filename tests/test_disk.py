"""What a run needs of the disk, estimated, refused, and run out of."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import StageError
from nnunet_sam2.rounds import disk
from nnunet_sam2.rounds.disk import RunSize, count_parameters, embedding_bytes, require_room, run_size, stage_bytes


def _size(**changed: object) -> RunSize:
    base = {
        "labelled_voxels": 1000,
        "unlabelled_voxels": 10_000,
        "held_out_voxels": 500,
        "labelled_cases": 2,
        "unlabelled_cases": 20,
        "slices": 100,
        "channels": 1,
        "classes": 3,
    }
    return RunSize(**{**base, **changed})  # type: ignore[arg-type]


def test_a_cohorts_size_counts_its_cases_voxels_and_slices(cohort: Cohort) -> None:
    held_out = cohort.labelled[0].case_id
    size = run_size(cohort, validation_ids=(held_out,), light=True)
    assert size.labelled_voxels == 3 * 12 * 40 * 40
    assert size.unlabelled_voxels == 2 * 12 * 40 * 40
    assert size.held_out_voxels == 12 * 40 * 40
    assert (size.labelled_cases, size.unlabelled_cases, size.classes) == (3, 2, len(cohort.class_values))
    assert size.growth == 1.0
    assert size.slices == 5 * 12


@pytest.mark.parametrize("kind", ["plan", "sam2", "data", "predict", "fuse", "refine"])
def test_twice_the_unlabelled_voxels_need_more_room_in_every_stage_that_writes_them(kind: str) -> None:
    assert stage_bytes(f"r01/{kind}", _size(unlabelled_voxels=20_000)) > stage_bytes(f"r01/{kind}", _size())


def test_a_training_needs_room_for_three_checkpoints_whatever_the_cohort() -> None:
    size = _size(parameters=1_000_000, copies=2)
    assert 3 * 8_000_000 <= stage_bytes("r01/train", size) < 3 * 8_000_000 + 2 * disk.TRAINING_EXTRAS
    assert stage_bytes("r01/train", _size(parameters=1_000_000, copies=2, unlabelled_voxels=10**9)) == stage_bytes(
        "r01/train", size
    )


@pytest.mark.parametrize("kind", ["data", "fuse", "labels"])
def test_soft_targets_need_room_for_every_class(kind: str) -> None:
    more = stage_bytes(f"r01/{kind}", _size(soft_targets=True)) - stage_bytes(f"r01/{kind}", _size())
    assert more >= 3 * 10_000 * disk.DISTRUST


def test_averaged_weights_are_one_copy_more_in_a_checkpoint(cohort: Cohort) -> None:
    plain, averaged = run_size(cohort), run_size(cohort, averaged=True)
    assert disk.checkpoint_bytes(averaged) - disk.checkpoint_bytes(plain) == 4 * plain.parameters


def test_a_stage_without_files_of_its_own_needs_no_room() -> None:
    assert stage_bytes("r01/signs", _size()) == 0


def test_embeddings_take_eight_bytes_a_pixel_up_to_the_caches_limit() -> None:
    assert embedding_bytes(_size(), 256) == 100 * 8 * 256 * 256
    assert embedding_bytes(_size(), 256, looks=3) == 300 * 8 * 256 * 256
    assert embedding_bytes(_size(slices=10**6), 1024) == disk.EMBEDDINGS_AT_MOST


def test_weights_are_counted_as_torch_counts_them() -> None:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    kwargs = {
        "n_stages": 4,
        "features_per_stage": [8, 16, 32, 32],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2, 2],
    }
    network = PlainConvUNet(input_channels=1, num_classes=3, conv_op=nn.Conv3d, conv_bias=True, **kwargs)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert count_parameters(kwargs) == pytest.approx(counted, rel=0.03)
    assert count_parameters({"unknown": 1}) == 0


def test_too_little_room_is_refused_with_what_is_needed_what_is_free_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 3_000_000_000)
    require_room(tmp_path, 2_000_000_000, what="r01/train")
    with pytest.raises(StageError) as caught:
        require_room(tmp_path / "not" / "there", 5_000_000_000, what="r01/train")
    message = str(caught.value)
    assert "5.0 GB" in message
    assert "3.0 GB" in message
    assert str(tmp_path) in message
    assert not (tmp_path / "not").exists()
