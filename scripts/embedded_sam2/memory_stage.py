"""Stage two: memory, prompts and decoder learn on clips, over the frozen encoder of stage one."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedded_sam2.clips import Pool, draw_clips
from embedded_sam2.run_state import RunState, learning_rate
from embedded_sam2.student import fit_fine_levels, start_memory_as_lookup
from embedded_sam2.track import Tracker
from embedded_sam2.volumes import draw_family

_FROZEN = ("image_encoder.", "sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.", "sam_prompt_encoder.pe_layer.")
_VALIDATION_FAMILIES, _VALIDATION_BATCHES = 8, 6


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Say how memory and decoder are trained."""

    seed: int = 0
    families: int = 200
    """Anatomies in the pool, three subjects of eight slices each."""
    steps: int = 4000
    batch_frames: int = 36
    peak_rate: float = 1e-3
    weight_decay: float = 0.01
    lookup: bool = True
    """Start memory attention as a lookup by likeness; False keeps sam2's own initial values."""
    prompt_part: float = 0.35
    """Part of the steps that prompt single frames with points, boxes and masks."""
    save_every_s: float = 60.0
    log_every: int = 20
    validate_every: int = 200


def train_memory(model: Any, settings: MemorySettings, folder: Path, device: torch.device, *, pools: Path) -> None:
    """Train everything but the image encoder until ``settings.steps``; continue where an earlier start got to."""
    plain = {k: v for k, v in asdict(settings).items() if k not in ("save_every_s", "log_every", "validate_every")}
    encoder_hash = _encoder_hash(model)
    state = RunState(folder, "memory", {**plain, "encoder": encoder_hash})
    size = model.image_size
    rng = np.random.default_rng([settings.seed, 4])
    first = [draw_family(rng, subjects=1, slices=4, size=size)[0].image_nss for _ in range(6)]
    fit_fine_levels(model, torch.from_numpy(np.concatenate(first)))
    # It is a random constant; training must see the value that half precision will keep.
    constant = model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    constant.copy_(constant.half().float())
    model.to(device)
    pool = Pool(pools, model, encoder_hash=encoder_hash, size=size, seed=settings.seed, count=settings.families)
    if not state.checkpoint.is_file() and settings.lookup:
        norm = float(np.mean([float(pool.get(i).maps[2].float().norm(dim=2).mean()) for i in range(4)]))
        start_memory_as_lookup(model, norm)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(_FROZEN))
        if parameter.requires_grad:
            trained.append(parameter)
    optimizer = torch.optim.AdamW(trained, lr=settings.peak_rate, weight_decay=settings.weight_decay)
    step = state.load(model, optimizer)
    tracker = Tracker(model)
    if step == 0:
        state.log(0, **validate(tracker, pool, settings, device))
    last_save = state.seconds
    sums: dict[str, list[float]] = {}
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, peak=settings.peak_rate, warmup=50)
        rng = np.random.default_rng([settings.seed, 5, step])
        batch = draw_clips(
            pool, rng, batch_frames=settings.batch_frames, device=device, families=(0, settings.families)
        )
        if rng.random() < settings.prompt_part:
            loss, dice = tracker.prompts(batch, rng)
            sums.setdefault("prompt_dice", []).append(float(dice.mean()))
        else:
            loss, dice, there = tracker.clip(batch)
            if there.any():
                sums.setdefault("clip_dice", []).append(float(dice[there].mean()))
            if not there.all():
                sums.setdefault("absent_right", []).append(float(dice[~there].mean()))
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        sums.setdefault("loss", []).append(float(loss.mean().detach()))
        if step % settings.log_every == 0:
            state.log(step, **{key: float(np.mean(values)) for key, values in sums.items()})
            sums = {}
        if step % settings.validate_every == 0 or step == settings.steps:
            state.log(step, **validate(tracker, pool, settings, device))
        if step % settings.log_every == 0 and (
            state.seconds - last_save > settings.save_every_s or step >= settings.steps
        ):
            state.save(step, model, optimizer)
            last_save = state.seconds


@torch.no_grad()
def validate(tracker: Tracker, pool: Pool, settings: MemorySettings, device: torch.device) -> dict[str, float]:
    """Score clips and prompts on families that training never sees."""
    present: list[float] = []
    absent: list[float] = []
    prompted: list[float] = []
    for number in range(_VALIDATION_BATCHES):
        rng = np.random.default_rng([8888, number])
        batch = draw_clips(
            pool, rng, batch_frames=settings.batch_frames, device=device, families=(-_VALIDATION_FAMILIES, 0)
        )
        _, dice, there = tracker.clip(batch)
        present += dice[there].tolist()
        absent += dice[~there].tolist()
        prompted += tracker.prompts(batch, rng)[1].tolist()
    scores = {"val_clip_dice": present, "val_absent_right": absent, "val_prompt_dice": prompted}
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


def _encoder_hash(model: Any) -> str:
    digest = hashlib.sha256()
    # The neck's fine levels are set from the trunk and so say nothing more.
    for name, tensor in sorted(model.image_encoder.state_dict().items()):
        if not name.startswith(("neck.convs.1.", "neck.convs.2.")):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
