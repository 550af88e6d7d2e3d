"""What the parts share: models, real cases, the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_sets import SETS, draw_cases, load_case

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend, state_hash
from nnunet_sam2.sam2.cache import EmbeddingCache
from nnunet_sam2.sam2.config import load_config
from nnunet_sam2.sam2.model import build_model, model_arguments
from nnunet_sam2.sam2.protocol import Sam2Spec
from nnunet_sam2.support.cases import Query, Support

SEED = 1
SUPPORTS, QUERIES = 3, 4
MODELS = ("embedded", "hiera_tiny")
SIZE = 256
TITLES = {"embedded": "embedded", "hiera_tiny": "Hiera-tiny (untrained)"}


def make_backend(
    name: str,
    *,
    threads: int,
    precision: str | None = None,
    cache_dir: Path | None = None,
    device: str = "cpu",
    image_size: int = SIZE,
) -> MetaSam2Backend:
    """Return the model in the box, or one of Hiera-tiny's size whose weights are drawn: time does not ask for more."""
    if name == "embedded":
        return load_backend(
            "embedded", device=device, threads=threads, precision=precision, cache_dir=cache_dir, image_size=image_size
        )
    config = load_config("sam2.1_hiera_tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_model(config, image_size).to(device)
    spec = Sam2Spec(
        name=name,
        checkpoint_hash=state_hash(model.state_dict()),
        image_size=image_size,
        has_memory=True,
        precision=precision or "float32",
        config=config.name,
        origin="untrained: drawn for timing",
    )
    return MetaSam2Backend(
        model=model, spec=spec, device=torch.device(device), cache=EmbeddingCache(cache_dir), threads=threads
    )


def stock_arguments(backend: MetaSam2Backend) -> dict[str, Any]:
    """Return what sam2's own predictor of the same model is built from."""
    return model_arguments(load_config(backend.spec.config), backend.spec.image_size)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Hold one query and its supports."""

    query: Query
    supports: list[Support]
    truth_zyx: np.ndarray
    classes: tuple[int, ...]


def load_supports(dataset: str, backend: MetaSam2Backend) -> list[Support]:
    """Read and encode the supports of a set's draw."""
    names, _ = draw_cases(SETS[dataset], SUPPORTS, QUERIES, SEED)
    return [load_case(SETS[dataset], name, backend) for name in names]


def load_scene(
    dataset: str, backend: MetaSam2Backend, *, query: int = 0, supports: list[Support] | None = None
) -> Scene:
    """Read and encode one query of a set's draw, and the supports where they are not given."""
    bench = SETS[dataset]
    support_names, query_names = draw_cases(bench, SUPPORTS, query + 1, SEED)
    case = load_case(bench, query_names[query], backend)
    return Scene(
        query=case.as_query(),
        supports=[load_case(bench, name, backend) for name in support_names] if supports is None else supports,
        truth_zyx=case.label_zyx,
        classes=class_values(dataset),
    )


def class_values(dataset: str) -> tuple[int, ...]:
    """Return the label values of a set."""
    return tuple(sorted({value for values in SETS[dataset].scored.values() for value in values}))


def made_up_case(case_id: str, slices: int, side: int, backend: MetaSam2Backend) -> tuple[Query, np.ndarray]:
    """Return a volume with a bright ball that drifts from slice to slice, and the ball as a label."""
    from nnunet_sam2.geometry import Geometry
    from nnunet_sam2.volumes import Volume

    geometry = Geometry(shape_zyx=(slices, side, side))
    array, label = np.empty((1, slices, side, side), np.float32), np.zeros((slices, side, side), np.uint8)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    for n in range(slices):
        noise = np.random.default_rng([len(case_id), n]).normal(0, 0.1, (side, side))
        turn = 6.28 * n / slices
        inside = (y - 0.5 - 0.1 * np.sin(turn)) ** 2 + (x - 0.5 - 0.1 * np.cos(turn)) ** 2 < 0.04
        array[0, n] = noise + inside
        label[n] = inside & (0.1 < (n + 0.5) / slices < 0.9)
    frames = Frames.from_volume(Volume(array_czyx=array, geometry=geometry), size=backend.spec.image_size, slice_axis=0)
    embeddings = backend.embed(frames)
    return Query(case_id=case_id, frames=frames, embeddings=embeddings, geometry=geometry), label


def as_support(query: Query, label_zyx: np.ndarray) -> Support:
    """Return a made-up case as a labelled one."""
    return Support(
        case_id=query.case_id,
        frames=query.frames,
        embeddings=query.embeddings,
        label_zyx=label_zyx,
        geometry=query.geometry,
    )


@dataclass
class Clock:
    """Add up processor seconds (of all threads) and wall seconds."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    laps: list[float] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what runs inside."""
        _finish()
        cpu, wall = time.process_time(), time.monotonic()
        try:
            yield
        finally:
            _finish()
            self.laps.append(time.process_time() - cpu)
            self.cpu_s += self.laps[-1]
            self.wall_s += time.monotonic() - wall


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Compute Dice of two masks; 1 where both are empty."""
    total = int(first.sum()) + int(second.sum())
    return 2.0 * int((first & second).sum()) / total if total else 1.0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
