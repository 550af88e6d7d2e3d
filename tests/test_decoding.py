"""Prompts from soft maps, and the decoder's answers put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.prompting.decoding import PromptKinds, decode_map, make_prompts, put_in
from nnunet_sam2.sam2.backend import load_backend

ALL = PromptKinds(box=True, points=True, mask=True, padding=0.0)


def _maps() -> torch.Tensor:
    """Class 1 is a ring, class 2 a bar beside it, class 3 is nowhere; 64 x 64."""
    rows, columns = np.mgrid[:64, :64]
    distance = np.hypot(rows - 24, columns - 24)
    ring = (distance < 16) & (distance > 8)
    bar = (rows >= 48) & (rows < 56) & (columns >= 8) & (columns < 40)
    prob = torch.zeros(4, 64, 64)
    prob[1][torch.from_numpy(ring)] = 0.9
    prob[2][torch.from_numpy(bar)] = 0.8
    prob[0] = 1 - prob.sum(dim=0)
    return prob


def test_boxes_are_tight_at_model_size_and_absent_classes_are_not_prompted() -> None:
    prompts = make_prompts(_maps(), 128, ALL)
    assert prompts is not None
    assert prompts.classes == (0, 1)
    assert prompts.boxes_k4 is not None
    np.testing.assert_allclose(prompts.boxes_k4[1], [16, 96, 80, 112])


def test_padding_widens_a_box_but_not_beyond_the_frame() -> None:
    prob = torch.zeros(2, 64, 64)
    prob[1, :32, :32] = 1.0
    prob[0] = 1 - prob[1]
    prompts = make_prompts(prob, 64, PromptKinds(padding=0.25))
    assert prompts is not None
    assert prompts.boxes_k4 is not None
    np.testing.assert_allclose(prompts.boxes_k4[0], [0, 0, 40, 40])


def test_the_positive_point_lies_inside_even_a_ring_and_the_others_are_negative() -> None:
    prompts = make_prompts(_maps(), 64, ALL)
    assert prompts is not None
    assert prompts.points is not None
    for i, (xy, positive) in enumerate(prompts.points):
        assert positive.tolist() == [True, False]
        column, row = (xy[0] - 0.5).astype(int)
        assert _maps().argmax(dim=0)[row, column] == prompts.classes[i] + 1
    np.testing.assert_allclose(prompts.points[0][0][1], prompts.points[1][0][0])


def test_the_mask_prompt_has_a_quarter_of_the_model_size() -> None:
    prompts = make_prompts(_maps(), 128, ALL)
    assert prompts is not None
    assert prompts.mask_logits_khw is not None
    assert tuple(prompts.mask_logits_khw.shape) == (2, 32, 32)
    assert prompts.mask_logits_khw.min() < 0 < prompts.mask_logits_khw.max()


def test_an_empty_map_gives_no_prompt() -> None:
    prob = torch.zeros(3, 32, 32)
    prob[0] = 1.0
    assert make_prompts(prob, 64, ALL) is None


def test_the_decoder_answers_for_the_prompted_classes_on_the_maps_own_grid() -> None:
    backend = load_backend("untrained", device="cpu", image_size=64, threads=1)
    embeddings = backend.embed(Frames.from_images(np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)))
    answers = decode_map(backend, embeddings, 0, _maps(), ALL)
    assert sorted(answers) == [0, 1]
    assert all(tuple(a.shape) == (64, 64) and a.min() >= 0 and a.max() <= 1 for a in answers.values())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_putting_in_moves_one_class_and_keeps_sums_and_proportions(share: float) -> None:
    prob = torch.tensor([0.3, 0.5, 0.2])[:, None, None].repeat(1, 2, 2)
    answer = torch.full((2, 2), 0.9)
    result = put_in(prob, {0: answer}, {0: share})
    torch.testing.assert_close(result.sum(dim=0), torch.ones(2, 2))
    torch.testing.assert_close(result[1], torch.full((2, 2), 0.5 + share * 0.4))
    torch.testing.assert_close(result[0] / result[2], torch.full((2, 2), 1.5))
    assert torch.equal(prob[1], torch.full((2, 2), 0.5))


def test_what_a_certain_class_loses_goes_to_the_background() -> None:
    prob = torch.tensor([0.0, 1.0, 0.0])[:, None, None].repeat(1, 2, 2)
    result = put_in(prob, {0: torch.full((2, 2), 0.2)}, {0: 1.0})
    torch.testing.assert_close(result[0], torch.full((2, 2), 0.8))


def test_prompt_kinds_need_at_least_one_kind() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PromptKinds(box=False, points=False, mask=False)
