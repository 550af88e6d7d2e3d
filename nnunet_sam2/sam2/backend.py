"""SAM 2 by sam2's own classes, behind the back-end protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.cache import TENSORS, EmbeddingCache
from nnunet_sam2.sam2.checkpoint import read_checkpoint, recognise
from nnunet_sam2.sam2.config import UNTRAINED, check_image_size, config_names, load_config
from nnunet_sam2.sam2.model import build_model, build_untrained, load_weights
from nnunet_sam2.sam2.propagation import VideoWalker
from nnunet_sam2.sam2.protocol import Decoded, Embeddings, Propagated, Sam2Spec
from nnunet_sam2.storage import value_hash

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_EMBEDDING_VERSION = 1
_ACCELERATOR_BATCH = 8
_PADDING, _NEGATIVE, _POSITIVE, _CORNER_FIRST, _CORNER_LAST = -1, 0, 1, 2, 3
"""Point labels of SAM's prompt encoder."""


def load_backend(
    name_or_file: str,
    *,
    device: str = "auto",
    image_size: int | None = None,
    cache_dir: Path | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> MetaSam2Backend:
    """Make a back end from a checkpoint file, or from ``untrained``, the seeded small model.

    ``device`` is auto, cpu, cuda or mps; ``image_size`` defaults to the architecture's working size (512 for Meta's);
    ``cache_dir`` keeps embeddings between runs; ``threads`` bounds torch on the CPU; ``precision`` of the image encoder
    is bfloat16 where the processor computes in it, else float32. Raises `InputError` for anything that cannot be used.
    """
    torch_device = choose_device(device)
    if image_size is not None:
        check_image_size(image_size)
    if precision not in (None, "float32", "bfloat16"):
        raise InputError(f"precision {precision!r}: take float32 or bfloat16")
    if name_or_file == UNTRAINED:
        config = load_config(UNTRAINED)
        size = image_size or config.image_size
        model = build_untrained(config, size)
        checkpoint_hash = _state_hash(model)
        has_memory, origin = True, f"untrained: weights drawn with seed {config.seed}"
    else:
        path = Path(name_or_file).expanduser()
        if not path.is_file() and name_or_file.removesuffix(".pt") in config_names():
            raise InputError(
                f"there is no file {name_or_file}, and the weights of Meta's models are not bundled. Download the "
                "checkpoint (links: https://github.com/facebookresearch/sam2) and give its path: "
                f"--sam2 /path/to/{name_or_file.removesuffix('.pt')}.pt"
            )
        checkpoint = read_checkpoint(path)
        config = recognise(checkpoint)
        size = image_size or config.image_size
        model = build_model(config, size)
        has_memory = load_weights(model, checkpoint.state, where=str(path))
        checkpoint_hash = checkpoint.sha256
        kind = "with video memory" if has_memory else "image parts only"
        origin = checkpoint.metadata.get("origin") or f"{config.title} from {path.name} ({kind})"
    return MetaSam2Backend(
        model=model.to(torch_device),
        spec=Sam2Spec(
            name=Path(name_or_file).stem if name_or_file != UNTRAINED else UNTRAINED,
            checkpoint_hash=checkpoint_hash,
            image_size=size,
            has_memory=has_memory,
            precision=precision or default_precision(torch_device),
            config=config.name,
            origin=origin,
        ),
        device=torch_device,
        cache=EmbeddingCache(cache_dir),
        threads=threads,
    )


class MetaSam2Backend:
    """Answer the back-end protocol with a ``SAM2Base``. One instance serves one thread."""

    def __init__(
        self,
        *,
        model: Any,
        spec: Sam2Spec,
        device: torch.device,
        cache: EmbeddingCache,
        threads: int | None = None,
    ) -> None:
        self._model = model
        self._spec = spec
        self._device = device
        self._cache = cache
        self._threads = threads
        self._batch = _ACCELERATOR_BATCH if device.type != "cpu" else 1
        self._walker = VideoWalker(model, device) if spec.has_memory else None
        self._mean = torch.tensor(IMAGE_MEAN, device=device)[:, None, None]
        self._std = torch.tensor(IMAGE_STD, device=device)[:, None, None]

    @property
    def spec(self) -> Sam2Spec:
        """Return what identifies the model."""
        return self._spec

    def embedding_key(self, frames: Frames) -> str:
        """Return the key under which the frames' embeddings are kept."""
        identity = {
            "version": _EMBEDDING_VERSION,
            "frames": frames.key,
            "checkpoint": self._spec.checkpoint_hash,
            "config": self._spec.config,
            "image_size": self._spec.image_size,
            "precision": self._spec.precision,
            # Devices round differently; mixing them would make a result depend on who filled the cache.
            "device": self._device.type,
        }
        return value_hash(identity)

    def embed(self, frames: Frames) -> Embeddings:
        """Encode every frame, or find the embeddings in the cache; both give the same numbers."""
        if frames.size != self._spec.image_size:
            raise ValueError(f"frames of size {frames.size} for a model of size {self._spec.image_size}")
        key = self.embedding_key(frames)
        found = self._cache.get(key)
        if found is not None and len(found) == len(frames):
            return found
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in TENSORS}
        start = 0
        while start < len(frames):
            stop = min(start + self._batch, len(frames))
            try:
                maps = self._encode(np.stack([frames.image(i) for i in range(start, stop)]))
            except torch.OutOfMemoryError:
                if self._batch == 1:
                    raise
                self._batch = max(1, self._batch // 2)
                continue
            for name, features in zip(TENSORS, maps, strict=True):
                parts[name].append(features.float().cpu())
            start = stop
        return self._cache.put(key, {name: torch.cat(features) for name, features in parts.items()})

    def decode(
        self,
        embeddings: Embeddings,
        index: int,
        *,
        boxes_k4: np.ndarray | None = None,
        points: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
        mask_logits_khw: torch.Tensor | None = None,
    ) -> Decoded:
        """Answer K prompts on one frame; see `Sam2Backend.decode`.

        As in SAM 2's training, a mask without points comes with a padding point, and a single mask is asked for, with
        the fallback to the best of three where it is unstable.
        """
        coordinates, labels, count = _point_prompts(boxes_k4, points, mask_logits_khw)
        model = self._model
        with self._computing():
            mask_prompt = None
            if mask_logits_khw is not None:
                mask_prompt = mask_logits_khw.to(self._device).float()[:, None].clamp(-32.0, 32.0)
            top = embeddings.top(index).to(self._device)[None] + model.no_mem_embed.reshape(1, -1, 1, 1)
            high = [m.to(self._device)[None].expand(count, -1, -1, -1) for m in embeddings.high(index)]
            # Without the gate by object score: who prompts a frame says that the object is there, and sam2's image
            # predictor does not ask either.
            sparse, dense = model.sam_prompt_encoder(
                points=(
                    torch.from_numpy(coordinates).to(self._device),
                    torch.from_numpy(labels).to(self._device),
                ),
                boxes=None,
                masks=mask_prompt,
            )
            low_res, iou, _, _ = model.sam_mask_decoder(
                image_embeddings=top.expand(count, -1, -1, -1),
                image_pe=model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
                repeat_image=False,
                high_res_features=high,
            )
            low_res = low_res.float()
            size = (self._spec.image_size, self._spec.image_size)
            high_res = interpolate(low_res, size=size, mode="bilinear", align_corners=False)
        return Decoded(
            logits_kss=high_res[:, 0],
            low_res_logits_khw=low_res[:, 0],
            iou_k=iou[:, 0].float().clamp(0.0, 1.0),
        )

    def propagate(
        self,
        video: Sequence[tuple[Embeddings, int]],
        masks_kss: Mapping[int, np.ndarray],
        *,
        reverse: bool = False,
    ) -> list[Propagated]:
        """Carry K objects through a pseudo-video; see `Sam2Backend.propagate`."""
        return list(self.walk(video, masks_kss, reverse=reverse))

    def walk(
        self,
        video: Sequence[tuple[Embeddings, int]],
        masks_kss: Mapping[int, np.ndarray],
        *,
        reverse: bool = False,
    ) -> Iterator[Propagated]:
        """Yield what `propagate` returns frame by frame."""
        if self._walker is None:
            raise InputError(
                f"SAM 2 checkpoint {self._spec.name} holds no video memory, so masks cannot be carried through a "
                f"volume; use a strategy that needs none (--strategy transfer) or a whole checkpoint"
            )
        steps = self._walker.walk(video, masks_kss, reverse=reverse)
        while True:
            # The context is left between frames, so that the caller never runs inside it.
            with self._computing(reduced=self._device.type == "cuda"):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _encode(self, images_n3ss: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self._computing(reduced=self._spec.precision == "bfloat16"):
            images = (torch.from_numpy(images_n3ss).to(self._device) - self._mean) / self._std
            maps = self._model.forward_image(images)["backbone_fpn"]
            return maps[0], maps[1], maps[2]

    @contextmanager
    def _computing(self, *, reduced: bool = False) -> Iterator[None]:
        """Set threads and precision for one computation and put back what the caller had.

        Gradients are off by ``no_grad``, not inference mode, whose tensors callers could not change in place.
        """
        threads = torch.get_num_threads()
        if self._threads is not None and self._threads != threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.no_grad(), torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=reduced):
                yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def record(self) -> dict[str, Any]:
        """Return the model's identity as a JSON value."""
        return {**asdict(self._spec), "device": self._device.type}


def choose_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or mps; raise `InputError` where it is not there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind = name.split(":")[0]
    if kind not in available:
        raise InputError(f"device {name!r}: take auto, cpu, cuda or mps")
    if not available[kind]:
        raise InputError(f"device {name} asked for, but torch finds none here; use --device cpu")
    return torch.device(name)


def default_precision(device: torch.device) -> str:
    """Return bfloat16 where the device computes in it natively, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
    return "float32"


def _point_prompts(
    boxes_k4: np.ndarray | None,
    points: Sequence[tuple[np.ndarray, np.ndarray]] | None,
    mask_logits_khw: torch.Tensor | None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Write boxes and points as labelled points of equal number: (K, P, 2) float32, (K, P) int32."""
    counts = {len(prompts) for prompts in (boxes_k4, points, mask_logits_khw) if prompts is not None}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"prompts must be given, the same number of each kind, got {sorted(counts)}")
    count = counts.pop()
    width = max((len(labels) for _, labels in points), default=0) if points is not None else 0
    corners = 2 if boxes_k4 is not None else 0
    total = max(1, corners + width)
    coordinates = np.zeros((count, total, 2), dtype=np.float32)
    labels_kp = np.full((count, total), _PADDING, dtype=np.int32)
    if boxes_k4 is not None:
        coordinates[:, :2] = np.asarray(boxes_k4, dtype=np.float32).reshape(count, 2, 2)
        labels_kp[:, 0], labels_kp[:, 1] = _CORNER_FIRST, _CORNER_LAST
    for k, (xy_p2, positive_p) in enumerate(points or ()):
        stop = corners + len(positive_p)
        coordinates[k, corners:stop] = xy_p2
        labels_kp[k, corners:stop] = np.where(np.asarray(positive_p, dtype=bool), _POSITIVE, _NEGATIVE)
    return coordinates, labels_kp, count


def _state_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
