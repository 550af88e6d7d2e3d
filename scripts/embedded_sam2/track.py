"""A clip through SAM 2 with gradients: the steps of sam2's tracker, with the presence gate left out of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from embedded_sam2.clips import ClipBatch
from embedded_sam2.losses import LEAST_TARGET, frame_loss, low_target

_ABSENT = -1024.0
"""sam2's NO_OBJ_SCORE."""


class Tracker:
    """Run clips and single-frame prompts through a ``SAM2Base`` in evaluation mode, as its predictors would."""

    def __init__(self, model: Any) -> None:
        self._model = model
        grid = model.image_size // 16
        self._sizes = [(4 * grid, 4 * grid), (2 * grid, 2 * grid), (grid, grid)]
        self._low = 4 * grid
        device = next(model.parameters()).device
        blank = torch.zeros(1, model.hidden_dim, grid, grid, device=device)
        with torch.no_grad():
            self._position = model.image_encoder.neck.position_encoding(blank).flatten(2).permute(2, 0, 1)

    def clip(self, batch: ClipBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss and Dice of every asked frame and whether the object is there, each (asked, B)."""
        losses, dices, there = [], [], []
        for t, masks, iou, score in self.walk(batch):
            target = low_target(batch.masks_tbss[t], self._low)
            loss, dice = frame_loss(masks, iou, score, target, single=False)
            losses.append(loss)
            dices.append(dice)
            there.append(target.sum(dim=(1, 2)) > LEAST_TARGET)
        return torch.stack(losses), torch.stack(dices), torch.stack(there)

    def walk(self, batch: ClipBatch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield each asked frame with its four candidate masks before the gate, their IoU and the presence score."""
        memories: dict[int, dict[str, Any]] = {}
        recent: dict[int, dict[str, Any]] = {}
        for t in range(batch.length):
            features = [m.flatten(2).permute(2, 0, 1) for m in batch.maps_tb[t]]
            if t < batch.prompted:
                memories[t] = self._prompted(batch.maps_tb[t], features, batch.masks_tbss[t])
                continue
            mixed = self._model._prepare_memory_conditioned_features(
                frame_idx=t,
                is_init_cond_frame=False,
                current_vision_feats=features[-1:],
                current_vision_pos_embeds=[self._position.expand(-1, features[-1].shape[1], -1)],
                feat_sizes=self._sizes[-1:],
                output_dict={"cond_frame_outputs": memories, "non_cond_frame_outputs": recent},
                num_frames=batch.length,
            )
            masks, iou, tokens, score = self._decode(mixed, batch.maps_tb[t], None, None)
            yield t, masks, iou, score
            if t + 1 < batch.length:
                recent[t] = self._answered(features, masks, iou, tokens, score)

    def prompts(self, batch: ClipBatch, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt every frame that shows its object, each by itself; return loss and Dice, (frames,).

        With points, a box, a coarse mask or the last two together, as the strategies prompt.
        """
        masks = batch.masks_tbss.flatten(0, 1)
        shown = torch.nonzero(low_target(masks, self._low).sum(dim=(1, 2)) > LEAST_TARGET)[:, 0]
        masks_bss = masks[shown]
        maps = [torch.cat([frame[level] for frame in batch.maps_tb])[shown] for level in range(3)]
        kind = str(rng.choice(["points", "box", "mask", "box and mask"], p=[0.35, 0.25, 0.15, 0.25]))
        target = low_target(masks_bss, self._low)
        points, dense = None, None
        if "mask" in kind:
            dense = _coarse_logits(target, rng)
        if kind != "mask":
            points = draw_points(masks_bss.cpu().numpy(), rng, box=kind != "points")
            points = tuple(p.to(masks_bss.device) for p in points)
        top = maps[2] + self._model.no_mem_embed.reshape(1, -1, 1, 1)
        masks, iou, _, score = self._decode(top, maps, points, dense)
        return frame_loss(masks, iou, score, target, single=True)

    def _decode(
        self,
        top: torch.Tensor,
        maps: list[torch.Tensor],
        points: tuple[torch.Tensor, ...] | None,
        dense: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        model, count = self._model, top.shape[0]
        if points is None:
            points = (
                torch.zeros(count, 1, 2, device=top.device),
                -torch.ones(count, 1, dtype=torch.int32, device=top.device),
            )
        sparse, prompt = model.sam_prompt_encoder(points=points, boxes=None, masks=dense)
        masks, iou, tokens, score = model.sam_mask_decoder.predict_masks(
            image_embeddings=top,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=prompt,
            repeat_image=False,
            high_res_features=maps[:2],
        )
        return masks.float(), iou.float(), tokens, score.float()[:, 0]

    def _prompted(
        self, maps: list[torch.Tensor], features: list[torch.Tensor], masks_bss: torch.Tensor
    ) -> dict[str, Any]:
        model = self._model
        masks = masks_bss[:, None].float()
        # sam2 encodes a prompt after it went through the low resolution of its own answers.
        low = interpolate(masks * 20 - 10, size=(self._low, self._low), mode="bilinear", antialias=True)
        high = interpolate(low, size=masks.shape[2:], mode="bilinear")
        _, _, tokens, _ = self._decode(maps[2], maps, None, model.mask_downsample(masks))
        score = torch.full((len(masks), 1), 10.0, device=masks.device)
        return self._memory(features, high, score, model.obj_ptr_proj(tokens[:, 0]), from_prompt=True)

    def _answered(
        self,
        features: list[torch.Tensor],
        masks: torch.Tensor,
        iou: torch.Tensor,
        tokens: torch.Tensor,
        score: torch.Tensor,
    ) -> dict[str, Any]:
        model = self._model
        rows = torch.arange(len(iou), device=iou.device)
        best = 1 + iou[:, 1:].argmax(dim=1)
        appears = (score > 0)[:, None]
        low = torch.where(appears[..., None], masks[rows, best], _ABSENT)
        size = (model.image_size, model.image_size)
        high = interpolate(low[:, None], size=size, mode="bilinear")
        pointer = model.obj_ptr_proj(tokens[rows, best]) * appears + (~appears) * model.no_obj_ptr
        return self._memory(features, high, score[:, None], pointer, from_prompt=False)

    def _memory(
        self,
        features: list[torch.Tensor],
        high: torch.Tensor,
        score: torch.Tensor,
        pointer: torch.Tensor,
        *,
        from_prompt: bool,
    ) -> dict[str, Any]:
        def encode(coarse: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
            spatial, _ = self._model._encode_new_memory(
                current_vision_feats=[coarse],
                feat_sizes=self._sizes[-1:],
                pred_masks_high_res=masks,
                object_score_logits=score,
                is_mask_from_pts=from_prompt,
            )
            encoded: torch.Tensor = spatial
            return encoded

        # The masks are at full size here; what they leave behind for the backward pass is computed again instead.
        spatial = checkpoint(encode, features[-1], high, use_reentrant=False)
        position = self._model.memory_encoder.position_encoding(spatial).to(spatial.dtype)
        return {"maskmem_features": spatial, "maskmem_pos_enc": [position], "obj_ptr": pointer}


def draw_points(masks_bss: np.ndarray, rng: np.random.Generator, *, box: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a box with loose corners, or one to three points inside and up to two outside, for each mask.

    Returns coordinates (B, P, 2) as (x, y) in pixels and SAM's labels (B, P): 1 inside, 0 outside, 2 and 3 corners.
    """
    inside, outside = (0, 0) if box else (int(rng.integers(1, 4)), int(rng.integers(0, 3)))
    coordinates, labels = [], []
    for mask in masks_bss:
        ys, xs = np.nonzero(mask)
        if box:
            spread = 0.08 * np.array([np.ptp(xs), np.ptp(ys)] * 2) + 1
            corners = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) + rng.normal(0, spread / 2)
            coordinates.append(corners.reshape(2, 2))
            labels.append([2, 3])
            continue
        picked = rng.integers(0, len(xs), inside)
        out_ys, out_xs = np.nonzero(~mask)
        apart = rng.integers(0, max(1, len(out_xs)), outside) if len(out_xs) else np.zeros(0, int)
        points = np.concatenate(
            [np.stack([xs[picked], ys[picked]], axis=1), np.stack([out_xs[apart], out_ys[apart]], axis=1)]
        )
        coordinates.append(points + 0.5)
        labels.append([1] * inside + [0] * len(apart) + [-1] * (outside - len(apart)))
        coordinates[-1] = np.concatenate([coordinates[-1], np.zeros((outside - len(apart), 2))])
    return (
        torch.from_numpy(np.stack(coordinates).astype(np.float32)),
        torch.from_numpy(np.asarray(labels, dtype=np.int32)),
    )


def _coarse_logits(target_bhw: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return a mask prompt such as an earlier answer or a student would give: smoothed, shifted, unsure."""
    shift = [int(s) for s in rng.integers(-2, 3, 2)]
    moved = torch.roll(target_bhw[:, None], shift, dims=(2, 3))
    kernel = int(rng.choice([1, 3, 5]))
    smooth = torch.nn.functional.avg_pool2d(moved, kernel, stride=1, padding=kernel // 2)
    return (smooth * 2 - 1) * float(rng.uniform(3, 15))
