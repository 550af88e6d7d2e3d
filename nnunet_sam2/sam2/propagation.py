"""Walks through pseudo-videos with SAM 2's memory, on embeddings that were computed before.

Follows SAM2VideoPredictor (sam2 1.1) frame for frame, with what the same answers do not need left out: images are not
encoded again; walks advance together and share the steps that they have in common; memories that no later frame can
attend to are dropped; the memory of a prompted frame and its projections are kept, for they do not depend on the walk;
a frame that none follows leaves no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.sam2.memory_reading import MemoryReader, Readers, SharedMemory
from nnunet_sam2.sam2.prompt_memories import Latest, Memory, memory_bytes
from nnunet_sam2.sam2.protocol import Embeddings, Propagated, VideoWalk
from nnunet_sam2.sam2.reduced import with_reduced_memory_encoder
from nnunet_sam2.sam2.tracks import Answer, Root, Step, plan_steps, rounds
from nnunet_sam2.sam2.walk_pasts import Pasts, Recent

Video = Sequence[tuple[Embeddings, int]]

_MEMORIES_MB = 512
_CPU_BYTES, _ACCELERATOR_BYTES = 2**28, 2**32
"""Memory for what a round of steps computes; more steps are taken one after the other."""


class VideoWalker:
    """Carry masks through pseudo-videos with one SAM 2."""

    def __init__(self, model: Any, device: torch.device, *, dtype: torch.dtype = torch.float32) -> None:
        """Walk with ``model``; ``dtype`` is the format of the factors in products of memory attention."""
        if model.memory_temporal_stride_for_eval != 1 or model.max_cond_frames_in_attn != -1:
            raise ValueError("this SAM 2 does not read its memory as the released ones do")
        self._model = model
        self._device = device
        self._dtype = dtype
        self._reader: MemoryReader | None = None
        self._writer = with_reduced_memory_encoder(model) if dtype == torch.bfloat16 else model
        self._memories: Latest[Memory] = Latest(_MEMORIES_MB, memory_bytes)
        self._shared: Latest[SharedMemory] = Latest(_MEMORIES_MB, lambda shared: shared.bytes)
        self._grid = grid = model.image_size // 16
        self._feature_sizes = [(4 * grid, 4 * grid), (2 * grid, 2 * grid), (grid, grid)]
        # Both encodings depend on the grid alone.
        with torch.no_grad():
            blank = torch.zeros(1, model.hidden_dim, grid, grid, device=device)
            self._position_hwc = model.image_encoder.neck.position_encoding(blank).flatten(2).permute(2, 0, 1)
            self._memory_position = model.memory_encoder.position_encoding(blank)
        self._pasts = Pasts(model, device, self._memory_position)
        budget = _CPU_BYTES if device.type == "cpu" else _ACCELERATOR_BYTES
        self.batch = max(1, budget // _step_bytes(model))
        """Objects that take a step at once."""

    def walk(self, video: Video, masks_kss: Mapping[int, np.ndarray], *, reverse: bool = False) -> Iterator[Propagated]:
        """Yield K objects' masks on every frame without any prompt, from the first prompted frame on.

        See `Sam2Backend.propagate` for the arguments. An object without a prompt anywhere is answered with
        ``NO_OBJ_SCORE`` everywhere.
        """
        for _, answer in self.walk_many([VideoWalk(video=video, masks_kss=masks_kss, reverse=reverse)]):
            yield answer

    def walk_many(self, walks: Sequence[VideoWalk]) -> Iterator[tuple[int, Propagated]]:
        """Yield (number of the walk, answer); see `Sam2Backend.walk_many`."""
        prompts, memories = self._remember_prompts(walks)
        plan = plan_steps(walks, prompts, self._model.max_obj_ptrs_in_encoder)
        gathered: dict[tuple[int, int], list[tuple[int, tuple[torch.Tensor, ...]]]] = {}
        for together in rounds(plan.first):
            # Steps that read the same prompted frames go into one batch.
            together.sort(key=lambda step: step.root.memories)
            for start in range(0, len(together), self.batch):
                for answer, found in self._take(together[start : start + self.batch], memories):
                    key = (answer.walk, answer.frame)
                    parts = gathered.setdefault(key, [])
                    parts.append((answer.object, found))
                    if len(parts) == plan.waited_for[key]:
                        yield answer.walk, self._gather(answer.frame, gathered.pop(key), plan.objects[answer.walk])

    def recall(self, frame: tuple[Embeddings, int], memories: Video, masks_mkss: np.ndarray) -> torch.Tensor:
        """Return a frame's features after attention to prompted frames, (K, C, H, W): a walk's step up to the decoder.

        By sam2's own code, through which gradients flow. See `Sam2Backend.recall` for the arguments.
        """
        prompts = dict(enumerate(masks_mkss))
        shown, count = _check(memories, prompts, self._model.image_size)
        if not prompts or len(prompts) != len(memories) or not all(objects.all() for objects in shown.values()):
            raise ValueError("every object needs a mask on every remembered frame, and there must be one")
        features = self._features([frame] * count)
        recalled: torch.Tensor = self._model._prepare_memory_conditioned_features(
            frame_idx=len(memories),
            is_init_cond_frame=False,
            current_vision_feats=features[-1:],
            current_vision_pos_embeds=[self._position_hwc.expand(-1, count, -1)],
            feat_sizes=self._feature_sizes[-1:],
            output_dict={
                "cond_frame_outputs": {t: self._entry(memories[t], mask) for t, mask in prompts.items()},
                "non_cond_frame_outputs": {},
            },
            num_frames=len(memories) + 1,
        )
        return recalled

    def _entry(self, frame: tuple[Embeddings, int], masks_kss: np.ndarray) -> dict[str, Any]:
        """Return a prompted frame's entry of the memory bank, as sam2 reads it."""
        wanted = {_key(frame, mask): (frame, mask) for mask in masks_kss}
        kept = self._prompted(wanted)
        found = [kept[_key(frame, mask)] for mask in masks_kss]
        position = self._memory_position.expand(len(found), -1, -1, -1)
        return {
            "maskmem_features": torch.cat([spatial for spatial, _ in found]),
            "maskmem_pos_enc": [position],
            "obj_ptr": torch.cat([pointer for _, pointer in found]),
        }

    def _remember_prompts(
        self, walks: Sequence[VideoWalk]
    ) -> tuple[list[dict[int, dict[int, str]]], dict[str, Memory]]:
        """Return the keys of each walk's prompts by position and object, and their memories."""
        prompts: list[dict[int, dict[int, str]]] = []
        wanted: dict[str, tuple[tuple[Embeddings, int], np.ndarray]] = {}
        known: dict[tuple[str, int, int, int], str] = {}
        alive: list[np.ndarray] = []
        for walk in walks:
            shown, _ = _check(walk.video, walk.masks_kss, self._model.image_size)
            keys: dict[int, dict[int, str]] = {}
            for t, present in shown.items():
                embeddings, index = walk.video[t]
                masks_kss = walk.masks_kss[t]
                alive.append(masks_kss)  # so that no other gets its id
                for k in np.flatnonzero(present).tolist():
                    mask = masks_kss[k]
                    seen = (embeddings.key, index, id(masks_kss), k)
                    key = known.get(seen) or known.setdefault(seen, _key(walk.video[t], mask))
                    wanted.setdefault(key, (walk.video[t], mask))
                    keys.setdefault(t, {})[k] = key
            prompts.append(keys)
        return prompts, self._prompted(wanted)

    def _prompted(self, wanted: Mapping[str, tuple[tuple[Embeddings, int], np.ndarray]]) -> dict[str, Memory]:
        """Make the memories of prompted frames: the mask is taken for the answer, as sam2 does with mask prompts."""
        kept = {key: self._memories.get(key) for key in wanted}
        absent = [key for key, memory in kept.items() if memory is None]
        model = self._model
        for start in range(0, len(absent), self.batch):
            keys = absent[start : start + self.batch]
            masks = torch.from_numpy(np.stack([wanted[key][1] for key in keys])).to(self._device)[:, None].float()
            features = self._features([wanted[key][0] for key in keys])
            _, outputs, _, _ = model._track_step(
                frame_idx=0,
                is_init_cond_frame=True,
                current_vision_feats=features,
                current_vision_pos_embeds=None,
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
            spatial = self._encoded(features, high_res, score, prompted=True)
            for row, key in enumerate(keys):
                memory = (spatial[row : row + 1].clone(), pointer[row : row + 1].clone())
                kept[key] = memory
                self._memories.put(key, memory)
        return {key: memory for key, memory in kept.items() if memory is not None}

    def _take(
        self, steps: Sequence[Step], memories: Mapping[str, Memory]
    ) -> list[tuple[Answer, tuple[torch.Tensor, ...]]]:
        """Take steps at once: their answers, and what they leave to those that follow."""
        model = self._model
        features = self._features([step.frame for step in steps])
        read = self._read(steps, features[-1], memories)
        high = [
            x.permute(1, 2, 0).unflatten(2, size) for x, size in zip(features[:-1], self._feature_sizes, strict=False)
        ]
        _, _, ious, _, high_res, pointer, score = model._forward_sam_heads(
            backbone_features=read, high_res_features=high, multimask_output=model._use_multimask(False, None)
        )
        followed = [row for row, step in enumerate(steps) if step.next]
        spatial = None
        if followed:
            rows = torch.tensor(followed, device=self._device)
            spatial = self._encoded([features[-1][:, rows]], high_res[rows], score[rows], prompted=False)
        found: list[tuple[Answer, tuple[torch.Tensor, ...]]] = []
        for row, step in enumerate(steps):
            answer = (high_res[row, 0].float(), score[row].float().reshape(()), ious[row].float().amax())
            found += [(asked, answer) for asked in step.answers]
            if step.next and spatial is not None:
                left = Recent(step.offset, spatial[followed.index(row)].flatten(1).T, pointer[row])
                state = self._pasts.after(step, left)
                for following in step.next:
                    following.state = state
            step.state = None
        return found

    def _read(self, steps: Sequence[Step], top_pbc: torch.Tensor, memories: Mapping[str, Memory]) -> torch.Tensor:
        """Return the steps' features after attention to memory, (B, C, H, W)."""
        if self._reader is None:
            with torch.autocast(self._device.type, enabled=False):
                self._reader = MemoryReader(self._model, self._device, self._dtype)
        place: dict[tuple[str, int], int] = {}
        for step in steps:
            place.setdefault((step.frame[0].key, step.frame[1]), len(place))
        frame_b = [place[step.frame[0].key, step.frame[1]] for step in steps]
        first_row = [frame_b.index(u) for u in range(len(place))]
        with torch.autocast(self._device.type, enabled=False):
            readers = self._readers(steps, memories)
            read_bpc = self._reader.read(top_pbc[:, first_row].transpose(0, 1), frame_b, readers)
        return read_bpc.transpose(1, 2).unflatten(2, self._feature_sizes[-1])

    def _readers(self, steps: Sequence[Step], memories: Mapping[str, Memory]) -> list[Readers]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        pasts = [self._pasts.read_by(step, memories) for step in steps]
        for row, (step, past) in enumerate(zip(steps, pasts, strict=True)):
            groups.setdefault((step.root.memories, len(past.recent), len(past.pointers)), []).append(row)
        return [
            Readers(
                rows=rows,
                shared=self._share(steps[rows[0]].root, memories),
                own=self._pasts.stacked([pasts[row] for row in rows]),
            )
            for rows in groups.values()
        ]

    def _share(self, root: Root, memories: Mapping[str, Memory]) -> SharedMemory:
        found = self._shared.get(root.memories)
        if found is None:
            assert self._reader is not None
            tokens = torch.cat([memories[key][0].float().flatten(2)[0].T for key in root.memories])
            position = self._memory_position[0].flatten(1).T + self._model.maskmem_tpos_enc[-1, 0]
            found = self._reader.share(tokens, position.repeat(len(root.memories), 1))
            self._shared.put(root.memories, found)
        return found

    def _encoded(
        self, features: Sequence[torch.Tensor], high_res: torch.Tensor, score: torch.Tensor, *, prompted: bool
    ) -> torch.Tensor:
        spatial, _ = self._writer._encode_new_memory(
            current_vision_feats=list(features),
            feat_sizes=self._feature_sizes,
            pred_masks_high_res=high_res,
            object_score_logits=score,
            is_mask_from_pts=prompted,
        )
        # sam2's predictor rounds spatial memories; the format that attention computes in is another matter.
        return spatial.to(torch.bfloat16).to(spatial.dtype)

    def _features(self, frames: Sequence[tuple[Embeddings, int]]) -> list[torch.Tensor]:
        """Return frames' three maps as sam2 passes them on, (locations, B, channels); a frame is read once."""
        place: dict[tuple[str, int], int] = {}
        maps: list[list[torch.Tensor]] = [[], [], []]
        for embeddings, index in frames:
            if (embeddings.key, index) not in place:
                place[embeddings.key, index] = len(place)
                for kept, m in zip(maps, (*embeddings.high(index), embeddings.top(index)), strict=True):
                    kept.append(m.to(self._device).flatten(1).T)
        which = torch.tensor([place[embeddings.key, index] for embeddings, index in frames], device=self._device)
        return [torch.stack(kept, dim=1)[:, which] for kept in maps]

    def _gather(self, t: int, answers: list[tuple[int, tuple[torch.Tensor, ...]]], count: int) -> Propagated:
        from sam2.modeling.sam2_base import NO_OBJ_SCORE

        size = self._model.image_size
        logits = torch.full((count, size, size), NO_OBJ_SCORE, device=self._device)
        score = torch.full((count,), NO_OBJ_SCORE, device=self._device)
        iou = torch.zeros(count, device=self._device)
        for k, found in answers:
            logits[k], score[k], iou[k] = found
        return Propagated(frame=t, logits_kss=logits, object_score_k=score, iou_k=iou)


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


def _key(frame: tuple[Embeddings, int], mask_ss: np.ndarray) -> str:
    embeddings, index = frame
    return hashlib.sha256(f"{embeddings.key} {index} ".encode() + np.packbits(mask_ss).tobytes()).hexdigest()


def _step_bytes(model: Any) -> int:
    """Estimate what one object's step computes at a time: features, hidden features, maps of the decoder, masks."""
    locations = (model.image_size // 16) ** 2
    hidden = model.memory_attention.layers[0].linear1.out_features
    return 4 * locations * (hidden + 16 * model.hidden_dim) + 4 * 8 * model.image_size**2
