"""SAM 2 by sam2's own classes, behind the back-end protocol."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.progress import say
from nnunet_sam2.sam2.cache import TENSORS, EmbeddingCache, joined_halves, to_half
from nnunet_sam2.sam2.checkpoint import read_checkpoint, recognise
from nnunet_sam2.sam2.config import check_image_size, load_config
from nnunet_sam2.sam2.decoder import decode_frame
from nnunet_sam2.sam2.model import build_model, build_untrained, load_weights
from nnunet_sam2.sam2.propagation import VideoWalker
from nnunet_sam2.sam2.protocol import Decoded, Embeddings, Propagated, Sam2Spec, VideoWalk
from nnunet_sam2.sam2.weights.cache import find_weights, require_unchanged
from nnunet_sam2.storage import value_hash

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_EMBEDDING_VERSION = 1
_ACCELERATOR_BATCH = 8
_PROCESSOR_BATCH_PIXELS = 4 * 256 * 256
"""Pixels encoded at once on the processor: small images share what a pass costs, large ones would leave its caches."""


def load_backend(
    name_or_file: str,
    *,
    device: str = "auto",
    image_size: int | None = None,
    cache_dir: Path | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> MetaSam2Backend:
    """Make a back end from named weights (``nnunet_sam2 weights list``) or from a checkpoint file.

    ``device`` is auto, cpu, cuda or mps; ``image_size`` defaults to the architecture's working size (512 for Meta's);
    ``cache_dir`` keeps embeddings between runs; ``threads`` bounds torch on the CPU; ``precision`` of the image encoder
    and of memory attention is bfloat16 where the processor computes in it, else float32. Raises `InputError` for
    anything that cannot be used, such as a name that is unknown or not fetched, and a kept file that is not as it was
    recorded.
    """
    torch_device = choose_device(device)
    if image_size is not None:
        check_image_size(image_size)
    if precision not in (None, "float32", "bfloat16"):
        raise InputError(f"precision {precision!r}: take float32 or bfloat16")
    found = find_weights(name_or_file)
    if found.path is None:
        config = load_config(found.name)
        size = image_size or config.image_size
        model = build_untrained(config, size)
        checkpoint_hash = state_hash(model.state_dict())
        has_memory, origin = True, f"untrained: weights drawn with seed {config.seed}"
    else:
        if found.record is not None:
            require_unchanged(found.record)
        checkpoint = read_checkpoint(found.path)
        config = recognise(checkpoint)
        size = image_size or config.image_size
        model = build_model(config, size)
        has_memory = load_weights(model, checkpoint.state, where=str(found.path))
        checkpoint_hash = checkpoint.sha256 if found.record is None else found.record.tensors_sha256
        kind = "with video memory" if has_memory else "image parts only"
        origin = checkpoint.metadata.get("origin") or f"{config.title} from {found.path.name} ({kind})"
    return MetaSam2Backend(
        model=model.to(torch_device),
        spec=Sam2Spec(
            name=found.name,
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
        on_processor = max(1, _PROCESSOR_BATCH_PIXELS // spec.image_size**2)
        self._batch = on_processor if device.type == "cpu" else _ACCELERATOR_BATCH
        self._batch_is_told = True
        dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
        self._walker = VideoWalker(model, device, dtype=dtype) if spec.has_memory else None
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
                self._batch_is_told = False
                continue
            if not self._batch_is_told:
                say(f"SAM 2: the memory is too small for the usual batch; {self._batch} images are encoded at once")
                self._batch_is_told = True
            for name, features in zip(TENSORS, maps, strict=True):
                # Rounded at once: a long volume in full precision would not fit.
                parts[name].append(to_half(features.float()))
            start = stop
        return self._cache.put(key, {name: joined_halves(parts.pop(name)) for name in TENSORS})

    def decode(
        self,
        embeddings: Embeddings,
        index: int,
        *,
        boxes_k4: np.ndarray | None = None,
        points: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
        mask_logits_khw: torch.Tensor | None = None,
        features_kchw: torch.Tensor | None = None,
        gate_khw: torch.Tensor | None = None,
        several: bool = False,
    ) -> Decoded:
        """Answer K prompts on one frame; see `Sam2Backend.decode`.

        Masks are not gated by object score: who prompts a frame says that the object is there, and sam2's image
        predictor does not ask either.
        """
        with self.computing():
            return decode_frame(
                self._model,
                self._device,
                embeddings,
                index,
                boxes_k4=boxes_k4,
                points=points,
                mask_logits_khw=mask_logits_khw,
                features_kchw=features_kchw,
                gate_khw=gate_khw,
                several=several,
            )

    def recall(
        self,
        frame: tuple[Embeddings, int],
        memories: Sequence[tuple[Embeddings, int]],
        masks_mkss: np.ndarray,
    ) -> torch.Tensor:
        """Return a frame's features after attention to prompted frames; see `Sam2Backend.recall`."""
        walker = self._memory()
        with self.computing(reduced=self._device.type == "cuda"):
            return walker.recall(frame, memories, masks_mkss).float()

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
        for _, answer in self.walk_many([VideoWalk(video=video, masks_kss=masks_kss, reverse=reverse)]):
            yield answer

    def walk_many(self, walks: Sequence[VideoWalk]) -> Iterator[tuple[int, Propagated]]:
        """Yield (number of the walk, answer) for walks that advance together; see `Sam2Backend.walk_many`."""
        steps = self._memory().walk_many(walks)
        while True:
            # The context is left between frames, so that the caller never runs inside it.
            with self.computing(reduced=self._device.type == "cuda"):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _encode(self, images_n3ss: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self.computing(reduced=self._spec.precision == "bfloat16"):
            images = (torch.from_numpy(images_n3ss).to(self._device) - self._mean) / self._std
            maps = self._model.forward_image(images)["backbone_fpn"]
            return maps[0], maps[1], maps[2]

    @contextmanager
    def computing(self, *, reduced: bool = False, gradients: bool = False) -> Iterator[None]:
        """Set threads, precision and gradients for one computation and put back what the caller had.

        Gradients are off by ``no_grad``, not inference mode, whose tensors callers could not change in place.
        """
        threads = torch.get_num_threads()
        if self._threads is not None and self._threads != threads:
            torch.set_num_threads(self._threads)
        try:
            with (
                torch.set_grad_enabled(gradients),
                torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=reduced),
            ):
                yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def model_copy(self) -> Any:
        """Return a copy of the model that may be trained; see `Sam2Backend.model_copy`."""
        return copy.deepcopy(self._model)

    def adapted(self, changed: Mapping[str, torch.Tensor], *, name: str) -> MetaSam2Backend:
        """Return a back end with some weights replaced; see `Sam2Backend.adapted`."""
        model = self.model_copy()
        unknown = sorted(changed.keys() - model.state_dict().keys())
        if unknown:
            raise ValueError(f"{self._spec.name} has no weights {unknown[0]}")
        model.load_state_dict(dict(changed), strict=False)
        identity = [self._spec.checkpoint_hash, state_hash({key: tensor.cpu() for key, tensor in changed.items()})]
        return MetaSam2Backend(
            model=model,
            spec=replace(self._spec, name=f"{self._spec.name}+{name}", checkpoint_hash=value_hash(identity)),
            device=self._device,
            cache=self._cache,
            threads=self._threads,
        )

    def _memory(self) -> VideoWalker:
        if self._walker is None:
            raise InputError(
                f"SAM 2 checkpoint {self._spec.name} holds no video memory, so masks cannot be carried through a "
                f"volume; use a strategy that needs none (--strategy transfer) or a whole checkpoint"
            )
        return self._walker

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


def state_hash(state: Mapping[str, torch.Tensor]) -> str:
    """Compute a hash of named weights on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
