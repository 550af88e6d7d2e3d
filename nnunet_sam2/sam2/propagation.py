"""The walk through a pseudo-video with SAM 2's memory, on embeddings that were computed before.

Follows SAM2VideoPredictor (sam2 1.1) frame for frame, with what the same answer does not need left out: images are not
encoded again, objects that are prompted on the same frames share one track step, memories that no later frame can
attend to are dropped, and the memory of a prompted frame is kept for other videos, since it does not depend on them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.sam2.protocol import Embeddings, Propagated

Video = Sequence[tuple[Embeddings, int]]
Memory = dict[str, Any]
"""One frame's entry of the memory bank, as sam2 reads it: spatial features, their positions, the object pointer."""


class PromptMemories:
    """Keep the memories of prompted frames by frame and mask, the latest ``limit_mb`` of them."""

    def __init__(self, limit_mb: int = 512) -> None:
        self._limit_bytes = limit_mb * 2**20
        self._kept: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return spatial features (1, M, H, W) and object pointer (1, C) of one object, or None."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: str, memory: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep one object's memory of one prompted frame."""
        self._kept[key] = memory
        self._bytes += _size(memory)
        while self._bytes > self._limit_bytes and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


class VideoWalker:
    """Carry masks through pseudo-videos with one SAM 2."""

    def __init__(self, model: Any, device: torch.device, *, memories: PromptMemories | None = None) -> None:
        self._model = model
        self._device = device
        self._memories = memories or PromptMemories()
        grid = model.image_size // 16
        self._feature_sizes = [(4 * grid, 4 * grid), (2 * grid, 2 * grid), (grid, grid)]
        # Both encodings depend on the grid alone.
        with torch.no_grad():
            blank = torch.zeros(1, model.hidden_dim, grid, grid, device=device)
            self._position_hwc = model.image_encoder.neck.position_encoding(blank).flatten(2).permute(2, 0, 1)
            self._memory_position = model.memory_encoder.position_encoding(blank)

    def walk(self, video: Video, masks_kss: Mapping[int, np.ndarray], *, reverse: bool = False) -> Iterator[Propagated]:
        """Yield K objects' masks on every frame without any prompt, from the first prompted frame on.

        See `Sam2Backend.propagate` for the arguments. An object without a prompt anywhere is answered with
        ``NO_OBJ_SCORE`` everywhere.
        """
        prompts, count = _check(video, masks_kss, self._model.image_size)
        groups = _groups(prompts, count)
        if not groups:
            return
        banks = [
            _Bank(objects, {t: self._prompted(video[t], masks_kss[t][objects]) for t in frames}, self._model)
            for frames, objects in groups
        ]
        prompted = sorted({t for frames, _ in groups for t in frames})
        order = range(prompted[-1], -1, -1) if reverse else range(prompted[0], len(video))
        for t in order:
            answers = [
                (bank, self._step(video, t, bank, reverse=reverse)) for bank in banks if t not in bank.conditioning
            ]
            if t not in masks_kss or not np.any(masks_kss[t]):
                yield self._gather(t, answers, count)

    def recall(self, frame: tuple[Embeddings, int], memories: Video, masks_mkss: np.ndarray) -> torch.Tensor:
        """Return a frame's features after attention to prompted frames, (K, C, H, W): a walk's step up to the decoder.

        See `Sam2Backend.recall` for the arguments.
        """
        prompts = dict(enumerate(masks_mkss))
        shown, count = _check(memories, prompts, self._model.image_size)
        if not prompts or len(prompts) != len(memories) or not all(objects.all() for objects in shown.values()):
            raise ValueError("every object needs a mask on every remembered frame, and there must be one")
        features, positions = self._features(frame, count)
        recalled: torch.Tensor = self._model._prepare_memory_conditioned_features(
            frame_idx=len(memories),
            is_init_cond_frame=False,
            current_vision_feats=features[-1:],
            current_vision_pos_embeds=positions[-1:],
            feat_sizes=self._feature_sizes[-1:],
            output_dict={
                "cond_frame_outputs": {t: self._prompted(memories[t], mask) for t, mask in prompts.items()},
                "non_cond_frame_outputs": {},
            },
            num_frames=len(memories) + 1,
        )
        return recalled

    def _features(self, frame: tuple[Embeddings, int], objects: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        embeddings, index = frame
        maps = [*embeddings.high(index), embeddings.top(index)]
        features = [m.to(self._device).flatten(1).T[:, None].expand(-1, objects, -1) for m in maps]
        # Only the coarsest position encoding is read.
        return features, [self._position_hwc.expand(-1, objects, -1)] * 3

    def _prompted(self, frame: tuple[Embeddings, int], masks_kss: np.ndarray) -> Memory:
        """Make the memory of a prompted frame: the mask is taken for the answer, as sam2 does with mask prompts."""
        embeddings, index = frame
        keys = [
            hashlib.sha256(f"{embeddings.key} {index} ".encode() + np.packbits(mask).tobytes()).hexdigest()
            for mask in masks_kss
        ]
        kept = [self._memories.get(key) for key in keys]
        absent = [k for k, memory in enumerate(kept) if memory is None]
        if absent:
            model = self._model
            masks = torch.from_numpy(masks_kss[absent]).to(self._device)[:, None].float()
            features, positions = self._features(frame, len(absent))
            _, outputs, _, _ = model._track_step(
                frame_idx=0,
                is_init_cond_frame=True,
                current_vision_feats=features,
                current_vision_pos_embeds=positions,
                feat_sizes=self._feature_sizes,
                point_inputs=None,
                mask_inputs=masks,
                output_dict={},
                num_frames=1,
                track_in_reverse=False,
                prev_sam_mask_logits=None,
            )
            low_res, pointer, score = outputs[3], outputs[5], outputs[6]
            # sam2 encodes the prompt after it went through the low resolution of its own answers.
            size = (model.image_size, model.image_size)
            high_res = interpolate(low_res, size=size, mode="bilinear", align_corners=False)
            spatial, _ = model._encode_new_memory(
                current_vision_feats=features,
                feat_sizes=self._feature_sizes,
                pred_masks_high_res=high_res,
                object_score_logits=score,
                is_mask_from_pts=True,
            )
            for row, k in enumerate(absent):
                memory = (_rounded(spatial[row : row + 1]), pointer[row : row + 1].clone())
                kept[k] = memory
                self._memories.put(keys[k], memory)
        found = [memory for memory in kept if memory is not None]
        return self._entry(torch.cat([m[0] for m in found]), torch.cat([m[1] for m in found]))

    def _step(self, video: Video, t: int, bank: _Bank, *, reverse: bool) -> tuple[torch.Tensor, ...]:
        model = self._model
        features, positions = self._features(video[t], len(bank.objects))
        current: dict[str, Any] = {}
        _, outputs, _, _ = model._track_step(
            frame_idx=t,
            is_init_cond_frame=False,
            current_vision_feats=features,
            current_vision_pos_embeds=positions,
            feat_sizes=self._feature_sizes,
            point_inputs=None,
            mask_inputs=None,
            output_dict={"cond_frame_outputs": bank.conditioning, "non_cond_frame_outputs": bank.recent},
            num_frames=len(video),
            track_in_reverse=reverse,
            prev_sam_mask_logits=None,
        )
        _, _, ious, _, high_res, pointer, score = outputs
        model._encode_memory_in_output(features, self._feature_sizes, None, True, high_res, score, current)
        bank.remember(t, self._entry(_rounded(current["maskmem_features"]), pointer))
        best_iou = ious.float().amax(dim=-1) if ious.ndim == 2 else ious.float()
        return high_res[:, 0].float(), score.float().reshape(-1), best_iou

    def _entry(self, spatial: torch.Tensor, pointer: torch.Tensor) -> Memory:
        position = self._memory_position.expand(spatial.shape[0], -1, -1, -1)
        return {"maskmem_features": spatial, "maskmem_pos_enc": [position], "obj_ptr": pointer}

    def _gather(self, t: int, answers: list[tuple[_Bank, tuple[torch.Tensor, ...]]], count: int) -> Propagated:
        from sam2.modeling.sam2_base import NO_OBJ_SCORE

        size = self._model.image_size
        logits = torch.full((count, size, size), NO_OBJ_SCORE, device=self._device)
        score = torch.full((count,), NO_OBJ_SCORE, device=self._device)
        iou = torch.zeros(count, device=self._device)
        for bank, (bank_logits, bank_score, bank_iou) in answers:
            logits[bank.objects], score[bank.objects], iou[bank.objects] = bank_logits, bank_score, bank_iou
        return Propagated(frame=t, logits_kss=logits, object_score_k=score, iou_k=iou)


class _Bank:
    """Hold the memories of objects that were prompted on the same frames."""

    def __init__(self, objects: list[int], conditioning: dict[int, Memory], model: Any) -> None:
        self.objects = objects
        self.conditioning = conditioning
        self.recent: dict[int, Memory] = {}
        stride = int(model.memory_temporal_stride_for_eval)
        self._reach = max(model.num_maskmem * stride, model.max_obj_ptrs_in_encoder)
        self._spatial_reach = model.num_maskmem * stride

    def remember(self, t: int, memory: Memory) -> None:
        self.recent[t] = memory
        for old in [key for key in self.recent if abs(key - t) > self._reach]:
            del self.recent[old]
        for old, kept in self.recent.items():
            if abs(old - t) > self._spatial_reach:
                kept["maskmem_features"] = None


def _check(video: Video, masks_kss: Mapping[int, np.ndarray], size: int) -> tuple[dict[int, np.ndarray], int]:
    """Return which objects each frame prompts, (K,) bool, and how many objects there are."""
    counts = {int(mask.shape[0]) for mask in masks_kss.values()}
    if len(counts) > 1:
        raise ValueError(f"prompted frames disagree on the number of objects: {sorted(counts)}")
    for t, mask in masks_kss.items():
        if not 0 <= t < len(video):
            raise ValueError(f"prompt on frame {t} of a video of {len(video)}")
        if mask.dtype != bool or mask.shape[1:] != (size, size):
            raise ValueError(f"masks must be bool (K, {size}, {size}), got {mask.dtype} {mask.shape}")
    return {t: np.asarray(mask.any(axis=(1, 2))) for t, mask in masks_kss.items()}, counts.pop() if counts else 0


def _groups(prompts: Mapping[int, np.ndarray], count: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Group objects by the frames that prompt them; objects without any prompt are left out."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for k in range(count):
        frames = tuple(t for t in sorted(prompts) if prompts[t][k])
        if frames:
            groups.setdefault(frames, []).append(k)
    return list(groups.items())


def _rounded(spatial: torch.Tensor) -> torch.Tensor:
    """Round spatial memories as sam2's predictor does, but keep the format that attention computes in."""
    return spatial.to(torch.bfloat16).to(spatial.dtype)


def _size(memory: tuple[torch.Tensor, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in memory)
