"""``nnunet_sam2 run --dry-run``: the stages of a run and what each will take, as text or JSON."""

from __future__ import annotations

import json

from nnunet_sam2.cli.status import duration
from nnunet_sam2.rounds.disk import readable
from nnunet_sam2.rounds.estimate.costs import StageEstimate
from nnunet_sam2.rounds.estimate.estimate import RunEstimate

REFUSED = 2


def show_estimate(estimate: RunEstimate, *, as_json: bool) -> int:
    """Print an estimate and return the exit status: 0, or 2 where the run cannot fit on this machine."""
    print(json.dumps(estimate.to_json(), indent=1) if as_json else estimate_table(estimate))
    return REFUSED if estimate.obstacles else 0


def estimate_table(estimate: RunEstimate) -> str:
    """Lay out the stages, their sum, what was assumed, and what stands in the way."""
    on_gpu = any(stage.gpu_bytes for stage in estimate.stages)
    widest = max(len(stage.what) for stage in estimate.stages) + 2
    head = f"{'stage':<20}{'what':<{widest}}{'time':>11}{'CPU time':>11}{'memory':>10}"
    lines = [head + (f"{'GPU':>10}" if on_gpu else "") + f"{'disk':>10}"]
    lines += [_line(stage, widest, on_gpu=on_gpu) for stage in estimate.stages]
    cost = estimate.cost
    total = f"{'all':<20}{'':<{widest}}{duration(cost.seconds):>11}{duration(cost.cpu_seconds):>11}"
    total += f"{readable(estimate.memory_bytes):>10}" + (f"{readable(estimate.gpu_bytes):>10}" if on_gpu else "")
    lines.append(total + f"{readable(estimate.disk_bytes):>10}")
    lines += [f"- {text}" for text in estimate.assumptions]
    lines += [f"warning: {text}" for text in estimate.warnings]
    lines += [f"does not fit: {text}" for text in estimate.obstacles]
    return "\n".join(lines)


def _line(stage: StageEstimate, widest: int, *, on_gpu: bool) -> str:
    start = f"{stage.stage:<20}{stage.what:<{widest}}"
    if stage.done:
        return f"{start}{'done':>11}"
    disk = readable(stage.disk_bytes) if stage.disk_bytes else "-"
    gpu = f"{readable(stage.gpu_bytes) if stage.gpu_bytes else '-':>10}" if on_gpu else ""
    times = f"{duration(stage.cost.seconds):>11}{duration(stage.cost.cpu_seconds):>11}"
    return f"{start}{times}{readable(stage.memory_bytes):>10}{gpu}{disk:>10}"
