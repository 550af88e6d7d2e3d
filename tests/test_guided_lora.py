"""LoRA of strategy guided: where it sits, what it learns from, and that no case is labelled by what it taught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.labelling.prompting.adapt import TrainingOptions, mask_loss, train
from nnunet_sam2.labelling.prompting.support_slices import SupportSlices
from nnunet_sam2.labelling.strategies.guided import strategy as guided
from nnunet_sam2.labelling.strategies.guided.lora import draw_partner, lora_losses, train_lora
from nnunet_sam2.labelling.strategies.guided.strategy import Guided, GuidedOptions
from nnunet_sam2.sam2 import lora
from nnunet_sam2.sam2.adaptation import TrainableSam2
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.lora import add_lora, merged_weights
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.library import load_support

pytest.importorskip("peft", reason="LoRA needs peft")

SIZE = 64
PASSES = GuidedOptions().passes()


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


@pytest.fixture(scope="module")
def supports(cohort: Cohort, backend: MetaSam2Backend) -> list[Support]:
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled]


def test_lora_starts_as_the_unadapted_encoder(backend: MetaSam2Backend, supports: list[Support]) -> None:
    sam = TrainableSam2(backend)
    image = supports[0].frames.image(5)[None]
    with torch.no_grad():
        before = sam.encode(image).top(0)
        add_lora(sam.model, rank=4, seed=0)
        after = sam.encode(image).top(0)
    torch.testing.assert_close(after, before)


def test_lora_reaches_all_of_q_and_v_and_nothing_of_k_in_every_block(backend: MetaSam2Backend) -> None:
    sam = TrainableSam2(backend)
    parameters = add_lora(sam.model, rank=4, seed=0)
    assert all(p.requires_grad for p in parameters)
    assert sum(p.numel() for p in sam.model.parameters() if p.requires_grad) == sum(p.numel() for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    original = backend.model_copy().state_dict()
    changed = merged_weights(sam.model)
    widths = set()
    for name, weight in changed.items():
        q, k, v = (weight - original[name]).abs().amax(dim=1).chunk(3)
        assert bool((q > 0).all())
        assert bool((v > 0).all())
        assert not bool(k.any())
        widths.add(weight.shape[0] // 3 / weight.shape[1])
    assert len(changed) == len(sam.model.image_encoder.trunk.blocks)
    assert widths == {1.0, 2.0}, "no block doubles its channels"


def test_the_merged_weights_answer_as_the_trained_model(backend: MetaSam2Backend, supports: list[Support]) -> None:
    sam = TrainableSam2(backend)
    parameters = add_lora(sam.model, rank=4, seed=0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        live = sam.encode(supports[0].frames.image(5)[None]).top(0)
    merged = backend.adapted(merged_weights(sam.model), name="lora")
    assert merged.spec.checkpoint_hash != backend.spec.checkpoint_hash
    stored = merged.embed(supports[0].frames).top(5)
    torch.testing.assert_close(stored, live, atol=0.05, rtol=0.05)
    assert not torch.allclose(stored, supports[0].embeddings.top(5), atol=0.2, rtol=0.2)


def test_the_first_masks_loss_reaches_the_encoder(
    backend: MetaSam2Backend, supports: list[Support], cohort: Cohort
) -> None:
    sam = TrainableSam2(backend)
    parameters = add_lora(sam.model, rank=4, seed=0)
    library = SupportSlices(supports, cohort.class_values)
    query = library.showing(0)[0]
    rng = np.random.default_rng(0)
    first, _ = lora_losses(sam, library, query, draw_partner(library, *query, 0, rng), 0, PASSES, rng)
    first.backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert gradients
    assert any(bool(g.abs().max() > 0) for g in gradients)
    others = [p for name, p in sam.model.named_parameters() if "lora" not in name]
    assert all(p.grad is None for p in others)


def test_a_partner_is_of_another_case_while_there_is_one(supports: list[Support], cohort: Cohort) -> None:
    library = SupportSlices(supports, cohort.class_values)
    s, n = library.showing(0)[0]
    rng = np.random.default_rng(0)
    partners = {draw_partner(library, s, n, 0, rng) for _ in range(20)}
    assert all(other != s for other, _ in partners)
    assert len(partners) > 1
    alone = SupportSlices(supports[:1], cohort.class_values)
    assert all(draw_partner(alone, *slice_, 0, rng) != slice_ for slice_ in alone.showing(0))


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_weights(
    backend: MetaSam2Backend, supports: list[Support], cohort: Cohort
) -> None:
    def run(seed: int) -> tuple[str, dict[str, Any]]:
        options = TrainingOptions(steps=12, learning_rate=5e-3, seed=seed)
        adapted, record = train_lora(backend, supports, cohort.class_values, PASSES, options, rank=4)
        return adapted.spec.checkpoint_hash, record

    one, record = run(0)
    assert record["loss_at_last"] < record["loss_at_first"]
    assert record["cases"] == [s.case_id for s in supports]
    assert run(0) == (one, record)
    assert run(1)[0] != one


def test_no_case_is_labelled_by_what_it_taught(
    backend: MetaSam2Backend, supports: list[Support], cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[list[str]] = []
    real = guided.train_lora

    def watch(backend: Any, chosen: Any, *rest: Any, **options: Any) -> Any:
        taught.append([s.case_id for s in chosen])
        return real(backend, chosen, *rest, **options)

    monkeypatch.setattr(guided, "train_lora", watch)
    strategy = Guided(GuidedOptions(lora_rank=2, lora_steps=1, supports_per_slice=1, previous_slices=0, check_slices=1))
    strategy.prepare(supports, cohort.class_values, backend)
    assert not taught
    for case in (supports[0], supports[0], supports[1]):
        others = [s for s in supports if s.case_id != case.case_id]
        (member,) = strategy.members(case.as_query(), others, cohort.class_values, backend, np.random.default_rng(0))
        assert member.record["adaptation"]["cases"] == [s.case_id for s in others]
        assert case.case_id not in taught[-1]
    assert len(taught) == 2, "the same supports are trained on once"


def test_without_peft_lora_says_what_to_install(backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'nnunet_sam2\[lora\]'"):
        add_lora(backend.model_copy(), rank=4, seed=0)
    with pytest.raises(InputError, match="LoRA needs the peft package"):
        Guided(GuidedOptions(lora_rank=4)).check("any", 12)
    Guided().check("any", 12)


def test_a_loss_that_is_lost_ends_the_training(backend: MetaSam2Backend) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(StageError, match="lower the learning rate"):
        train(
            backend,
            [parameter],
            lambda _: (parameter * float("nan")).sum(),
            TrainingOptions(steps=2, learning_rate=1.0, seed=0),
            what="training",
        )


def test_the_mask_loss_is_small_for_the_right_mask_and_grows_with_the_error() -> None:
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    right, shifted = (mask_loss(20 * t - 10, target) for t in (target, target.roll(1, 2)))
    assert float(right) < 0.01 < float(shifted)
    missed = torch.where(target > 0, -1.0, -10.0)
    assert mask_loss(missed, target, positive_weight=2.0) > mask_loss(missed, target)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"learning_rate": 0.0}])
def test_trainings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainingOptions(**{"steps": 1, "learning_rate": 1e-3, "seed": 0, **settings})
