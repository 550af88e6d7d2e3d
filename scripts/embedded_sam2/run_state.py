"""A training that a kill cannot harm: whole checkpoints, a log of JSON lines, a clock that counts across restarts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from nnunet_sam2.storage import atomic_path


class RunState:
    """Keep what a training stage needs to go on where it was, bit by bit on the CPU.

    Batches and dropout are drawn from (seed, step), so weights, optimizer and the step's number are all there is.
    """

    def __init__(self, folder: Path, stage: str, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / f"{stage}.pt"
        self._log = folder / f"{stage}.jsonl"
        self._settings = settings
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self.extra: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Return the time spent in this stage, earlier starts included."""
        return self._seconds_before + time.monotonic() - self._started

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
        """Load the last checkpoint and return its step, 0 where there is none; the log is cut back to that step."""
        if not self.checkpoint.is_file():
            self._log.unlink(missing_ok=True)
            return 0
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if saved["settings"] != self._settings:
            raise SystemExit(
                f"{self.checkpoint} was made with other settings ({saved['settings']}); take another --work folder"
            )
        model.load_state_dict(saved["model"])
        if optimizer is not None and saved["optimizer"] is not None:
            optimizer.load_state_dict(saved["optimizer"])
        self.extra = saved["extra"]
        self._seconds_before = saved["seconds"]
        step = int(saved["step"])
        if self._log.is_file():
            lines = [line for line in self._log.read_text().splitlines() if _step_of(line) <= step]
            self._log.write_text("".join(f"{line}\n" for line in lines))
        return step

    def save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Write everything, whole or not at all."""
        with atomic_path(self.checkpoint) as temporary:
            torch.save(
                {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": None if optimizer is None else optimizer.state_dict(),
                    "settings": self._settings,
                    "seconds": self.seconds,
                    "extra": self.extra,
                },
                temporary,
            )

    def log(self, step: int, **values: Any) -> None:
        """Append one JSON line; a number keeps four digits."""
        line = {"step": step, "seconds": round(self.seconds, 1)}
        line |= {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        with self._log.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        # The line that a kill cut off.
        return 1 << 62


def load_model(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the weights of a finished stage."""
    if not checkpoint.is_file():
        raise SystemExit(f"{checkpoint} is missing; run --stage features first or name one with --encoder")
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"])


def learning_rate(step: int, steps: int, *, peak: float, warmup: int) -> float:
    """Rise linearly, then fall as a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    part = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(part * torch.pi)))))
