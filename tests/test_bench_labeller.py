"""The bench of the labeller's speed: its stock twin does the same work, and the page shows its figures."""

from __future__ import annotations

import bench_labeller
import numpy as np
import pytest
import torch
from labeller_bench.setting import as_support, made_up_case
from labeller_bench.stock import Insertion, StockPredictor
from lively_sam2 import CONFIG, SIZE, lively_model, make_backend

from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.model import model_arguments
from nnunet_sam2.storage import read_json


def test_the_stock_twin_labels_what_the_papers_preset_labels() -> None:
    model = lively_model()
    backend = make_backend(model)
    support = as_support(*made_up_case("s", 6, 48, backend))
    query, _ = made_up_case("query", 5, 48, backend)
    strategy = make_strategy("insert", {"preset": "paper", "insertions": 2})
    predictor = StockPredictor(model, model_arguments(CONFIG, SIZE), reduced=False)
    for member in strategy.members(query, [support], (1,), backend, np.random.default_rng(1)):
        place = member.record["classes"]["1"]["place"]["before_query_slice"]
        visited = []
        for reverse in (False, True):
            insertion = Insertion(support=support, before=place, reverse=reverse)
            for n, prob_khw in predictor.probabilities(query, insertion, (1,)):
                visited.append(n)
                # Of probabilities: our embeddings are kept in half precision.
                np.testing.assert_allclose(member.prob_kzyx[:, n], prob_khw, atol=0.02)
        assert sorted(visited) == list(range(5))


def test_the_stock_twin_leaves_the_predictor_as_a_user_finds_it() -> None:
    from sam2 import sam2_video_predictor

    before = sam2_video_predictor.load_video_frames
    predictor = StockPredictor(lively_model(), model_arguments(CONFIG, SIZE), reduced=False)
    with predictor._ready(torch.zeros(1, 3, SIZE, SIZE)):
        assert sam2_video_predictor.load_video_frames is not before
    assert sam2_video_predictor.load_video_frames is before


@pytest.mark.parametrize("part", sorted(bench_labeller.PARTS))
def test_the_page_shows_what_was_measured(part: str) -> None:
    found = read_json(bench_labeller.RESULTS)
    if part not in found:
        pytest.skip(f"{part} was not measured")
    _, table = bench_labeller.PARTS[part]
    assert table(found[part]) in bench_labeller.PAGE.read_text(encoding="utf-8")
