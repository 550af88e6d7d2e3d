"""Stage one: the small encoder learns the teacher's features on synthetic images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from embedded_sam2.run_state import RunState, learning_rate
from embedded_sam2.shards import Shards
from embedded_sam2.student import copy_trunk, feature_basis, fit_neck
from embedded_sam2.teacher import model_input
from embedded_sam2.transfer_score import transfer_dice
from embedded_sam2.volumes import draw_family

_FROZEN_BLOCKS = 3
"""Blocks of the teacher's first two stages: kept as they are, the features that come out of them are the teacher's."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Say how the features are distilled."""

    seed: int = 0
    shards: int = 60
    steps: int = 1600
    batch: int = 16
    peak_rate: float = 2e-4
    weight_decay: float = 0.01
    start: str = "copy"
    """``copy``: the teacher's blocks and a fitted neck; ``random``: sam2's own initial values."""
    last_block: int = 7
    """Teacher's block that becomes the student's last."""
    freeze: bool = True
    """Keep the copied stem and first two stages; False trains all."""
    save_every_s: float = 60.0
    log_every: int = 20
    validate_every: int = 200


def train_features(model: Any, shards: Shards, settings: FeatureSettings, folder: Path, device: torch.device) -> None:
    """Train ``model.image_encoder`` until ``settings.steps``; continue where an earlier start got to."""
    plain = {k: v for k, v in asdict(settings).items() if k not in ("save_every_s", "log_every", "validate_every")}
    state = RunState(folder, "features", {**plain, "shards_of": shards.folder.name})
    data = [shards.get(index) for index in range(settings.shards)]
    step = 0
    if not state.checkpoint.is_file():
        state.extra["basis"] = feature_basis(torch.cat([f.float() for _, f in data[:8]]), model.hidden_dim)
        if settings.start == "copy":
            _start_from_teacher(model, shards, data, state, settings)
        else:
            # sam2 leaves them at zero, and an encoder without them does not know where it is.
            generator = torch.Generator().manual_seed(settings.seed)
            for parameter in (model.image_encoder.trunk.pos_embed, model.image_encoder.trunk.pos_embed_window):
                torch.nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
    model.to(device)
    encoder = model.image_encoder
    frozen = settings.start == "copy" and settings.freeze
    trained = _trained_parameters(encoder, frozen=frozen)
    optimizer = torch.optim.AdamW(trained, lr=settings.peak_rate, weight_decay=settings.weight_decay)
    step = state.load(model, optimizer)
    images = torch.cat([i for i, _ in data])
    basis = state.extra["basis"]
    targets = torch.einsum("nchw,cd->ndhw", torch.cat([f for _, f in data]).float(), basis).half()
    variance = float(targets.float().var(dim=(0, 2, 3)).sum())
    validation = Validation(shards, count=8, held_out=settings.shards, basis=basis)
    if step == 0:
        state.log(0, **validation.score(encoder, device))
    last_save = state.seconds
    sums: dict[str, float] = {}
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, peak=settings.peak_rate, warmup=50)
        rng = np.random.default_rng([settings.seed, 2, step])
        chosen = torch.from_numpy(rng.integers(0, len(images), settings.batch))
        target = targets[chosen].float().to(device)
        x = model_input(images[chosen].to(device).float() / 255)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            answer = _coarse(encoder, x, frozen=frozen)
        error, angle = _distance(answer.float(), target, variance)
        optimizer.zero_grad(set_to_none=True)
        (error + angle).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        for key, value in (("error", error), ("angle", angle)):
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if step % settings.log_every == 0:
            state.log(step, **{k: v / settings.log_every for k, v in sums.items()})
            sums = {}
        if step % settings.validate_every == 0 or step == settings.steps:
            state.log(step, **validation.score(encoder, device))
        # Not between two lines of the log, whose sums a restart would not have.
        if step % settings.log_every == 0 and (
            state.seconds - last_save > settings.save_every_s or step >= settings.steps
        ):
            state.save(step, model, optimizer)
            last_save = state.seconds


class Validation:
    """Score features on what training never sees.

    Label transfer between subjects of families drawn apart is what the features are for; the distance from the
    teacher's on a shard held out tells learning from memorising.
    """

    def __init__(self, shards: Shards, *, count: int, held_out: int, basis: torch.Tensor) -> None:
        size = shards.settings.size
        self._families = [
            draw_family(np.random.default_rng([9999, index]), subjects=3, slices=5, size=size, new_contrast=0.0)
            for index in range(count)
        ]
        self._images, features = shards.get(held_out)
        self._targets = torch.einsum("nchw,cd->ndhw", features.float(), basis)
        self._variance = float(self._targets.var(dim=(0, 2, 3)).sum())

    @torch.no_grad()
    def score(self, encoder: Any, device: torch.device) -> dict[str, float]:
        """Return the mean Dice over families and labels, two supports each, and the held-out distances."""

        def encode(images_nss: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                coarse: torch.Tensor = encoder(model_input(images_nss.to(device)))["backbone_fpn"][2]
            return coarse.float().cpu()

        dice: list[float] = []
        for family in self._families:
            features = [encode(torch.from_numpy(case.image_nss)) for case in family]
            labels = [case.labels_nss for case in family]
            dice += transfer_dice(features[0], labels[0], features[1:], labels[1:], least_pixels=1000)
        answers = [encode(images.float() / 255) for images in self._images.split(16)]
        error, angle = _distance(torch.cat(answers), self._targets, self._variance)
        return {"transfer_dice": float(np.mean(dice)), "val_error": float(error), "val_angle": float(angle)}


def _distance(
    answer_nchw: torch.Tensor, target_nchw: torch.Tensor, variance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of the targets' variance that is missed, and one minus the mean cosine."""
    error = ((answer_nchw - target_nchw) ** 2).sum(dim=1).mean() / variance
    return error, 1 - cosine_similarity(answer_nchw, target_nchw, dim=1).mean()


def _start_from_teacher(
    model: Any,
    shards: Shards,
    data: list[tuple[torch.Tensor, torch.Tensor]],
    state: RunState,
    settings: FeatureSettings,
) -> None:
    teacher = shards.teacher.state
    copy_trunk(model, teacher, {0: 0, 1: 1, 2: 2, 3: 3, 4: settings.last_block})
    left = fit_neck(model, iter(data[:4]), state.extra["basis"])
    print(f"teacher's blocks with a fitted neck leave {left:.3f} of the variance", flush=True)


def _trained_parameters(encoder: Any, *, frozen: bool) -> list[torch.nn.Parameter]:
    trained = []
    for name, parameter in encoder.named_parameters():
        late = name.startswith("neck.convs.0.") or any(
            name.startswith(f"trunk.blocks.{i}.") for i in range(_FROZEN_BLOCKS, len(encoder.trunk.blocks))
        )
        # The neck's fine levels have no target here: the decoder's training uses them as they are.
        keep = late or (not frozen and name.startswith("trunk."))
        parameter.requires_grad_(keep)
        if keep:
            trained.append(parameter)
    return trained


def _coarse(encoder: Any, x: torch.Tensor, *, frozen: bool) -> torch.Tensor:
    """Compute the coarsest output alone; nothing of the frozen part is kept for the backward pass."""
    trunk = encoder.trunk
    with torch.set_grad_enabled(not frozen):
        x = trunk.patch_embed(x)
        x = x + trunk._get_pos_embed(x.shape[1:3])
        for block in trunk.blocks[:_FROZEN_BLOCKS]:
            x = block(x)
    for block in trunk.blocks[_FROZEN_BLOCKS:]:
        x = block(x)
    coarse: torch.Tensor = encoder.neck.convs[0](x.permute(0, 3, 1, 2))
    return coarse
