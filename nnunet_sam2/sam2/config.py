"""The SAM 2 architectures that can be built, read from small bundled files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError

CONFIG_FOLDER = Path(__file__).parent / "configs"
UNTRAINED = "untrained"
"""Name of the small model with seeded random weights."""

SIZE_STEP = 32
"""The image encoder halves five times, so the image size must be a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Hold the sizes of a Hiera trunk, named as in Meta's configuration files."""

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    global_att_blocks: tuple[int, ...]
    window_pos_embed_bkg_spatial_size: tuple[int, int]
    window_spec: tuple[int, ...]

    @property
    def channels_coarse_to_fine(self) -> list[int]:
        """Return the channels of the trunk's outputs, coarsest first, as the neck wants them."""
        return [self.embed_dim * 2**stage for stage in reversed(range(len(self.stages)))]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hold all that tells one SAM 2 architecture from another."""

    name: str
    title: str
    version: str
    """"2.0" or "2.1": the latter gives object pointers a place in time and empty frames an embedding of their own."""
    image_size: int
    """Side of the square that images are resized to by default."""
    native_size: int
    """Side at which the released weights were trained: four times the work of half of it, and more in the memory."""
    trunk: TrunkConfig
    d_model: int
    mem_dim: int
    memory_layers: int
    memory_feedforward: int
    seed: int | None = None
    """Where given, the model needs no checkpoint: its weights are drawn with this seed."""

    def __post_init__(self) -> None:
        if self.version not in ("2.0", "2.1"):
            raise ValueError(f"SAM 2 version must be 2.0 or 2.1, got {self.version}")
        if len(self.trunk.stages) not in (3, 4):
            raise ValueError(f"a trunk has 3 or 4 stages, got {len(self.trunk.stages)}")
        check_image_size(self.image_size)


def check_image_size(image_size: int) -> None:
    """Raise `InputError` where the image encoder cannot work at this size."""
    if image_size < 2 * SIZE_STEP or image_size % SIZE_STEP:
        raise InputError(f"image size {image_size}: take a multiple of {SIZE_STEP}, at least {2 * SIZE_STEP}")


def config_names() -> tuple[str, ...]:
    """Return the names of the bundled architectures, sorted."""
    return tuple(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))


@cache
def load_config(name: str) -> ModelConfig:
    """Read a bundled architecture by its name."""
    from omegaconf import OmegaConf

    path = CONFIG_FOLDER / f"{name}.yaml"
    if name not in config_names():
        raise InputError(f"no SAM 2 architecture {name}; there are: {', '.join(config_names())}")
    value: Any = OmegaConf.to_container(OmegaConf.load(path))
    trunk: dict[str, Any] = {
        key: tuple(item) if isinstance(item, list) else item for key, item in value.pop("trunk").items()
    }
    return ModelConfig(name=name, trunk=TrunkConfig(**trunk), **value)
