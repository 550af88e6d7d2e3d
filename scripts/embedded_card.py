"""Collect what trainings of the embedded SAM 2 have logged and write the model card's tables from it.

``python scripts/embedded_card.py --run NAME=FOLDER ...`` adds folders of train_embedded_sam2.py to
docs/benchmarks/embedded_training.json and rewrites docs/embedded_model.md. A name may come
twice, with a folder a stage.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from bench_data import PROJECT
from marked_table import replace_marked
from safetensors import safe_open

from nnunet_sam2.storage import read_json, write_json

RESULTS = PROJECT / "docs" / "benchmarks" / "embedded_training.json"
CARD = PROJECT / "docs" / "embedded_model.md"
STAGES = ("features", "memory")
WEIGHTS = PROJECT / "nnunet_sam2" / "sam2" / "weights" / "embedded.safetensors"
PARTS = {
    "image encoder": (("image_encoder.",), "Hiera, three stages (1, 2 and 2 blocks, 96 to 384 channels), and its neck"),
    "mask decoder, prompt encoder": (("sam_mask_decoder.", "sam_prompt_encoder."), "SAM 2.1's, 64 channels"),
    "memory attention": (("memory_attention.",), "two layers"),
    "memory encoder, object pointers, the rest": (("",), "memories as wide as the features"),
}
"""Part -> (how its weights' names begin, what it is); a weight counts for the first part that it fits."""


def main() -> None:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    results: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {}
    for item in args.run:
        name, _, folder = item.partition("=")
        found = {stage: entry for stage in STAGES if (entry := collect(Path(folder), stage))}
        if not found:
            raise SystemExit(f"{folder} holds no training of the embedded SAM 2 (features.pt or memory.pt)")
        results.setdefault(name, {}).update(found)
    write_json(RESULTS, results)
    tables = {"features": features_table(results), "memory": memory_table(results), "parameters": parameters_table()}
    for name, table in tables.items():
        replace_marked(CARD, name, table)


def collect(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return a stage's settings, its log thinned to fifty lines, and how far it came; None where it was not run."""
    checkpoint, log = folder / f"{stage}.pt", folder / f"{stage}.jsonl"
    if not checkpoint.is_file() or not log.is_file():
        return None
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    scores = [line for line in lines if any(key.startswith(("val_", "transfer_")) for key in line)]
    losses = [line for line in lines if line not in scores]
    kept = losses[:: max(1, len(losses) // 50)] + losses[-1:]
    return {
        "settings": saved["settings"],
        "steps": saved["step"],
        "seconds": round(saved["seconds"]),
        "curve": [line for n, line in enumerate(kept) if line not in kept[:n]],
        "scores": scores,
    }


def parameters_table() -> str:
    """Return the table of the parts' parameters, counted in the shipped file."""
    counts = dict.fromkeys(PARTS, 0)
    with safe_open(WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            part = next(part for part, (starts, _) in PARTS.items() if name.startswith(starts))
            counts[part] += math.prod(file.get_slice(name).get_shape())
    lines = ["| part | parameters | what |", "|---|---|---|"]
    lines += [f"| {part} | {counts[part] / 1e6:.2f} M | {what} |" for part, (_, what) in PARTS.items()]
    size_mb = WEIGHTS.stat().st_size / 1e6
    lines.append(f"| together | {sum(counts.values()) / 1e6:.2f} M | {size_mb:.1f} MB in half precision |")
    return "\n".join(lines)


def features_table(results: dict[str, Any]) -> str:
    """Return the table of the first stage."""
    lines = [
        "| run | start | teacher | images | peak rate | steps | error, first and last | held out | transfer Dice "
        "| minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in _with(results, "features"):
        s, curve, scores = entry["settings"], entry["curve"], entry["scores"]
        teacher = s["shards_of"].split("_")[1]
        start = "random" if s["start"] == "random" else "teacher's blocks"
        held_out = f"{scores[-1]['val_error']:.3f}" if "val_error" in scores[-1] else ""
        steps = f"{entry['steps']}" + (f" of {s['steps']}" if entry["steps"] < s["steps"] else "")
        lines.append(
            f"| {name} | {start} | {teacher} px | {64 * s['shards']} | {s['peak_rate']:g} | {steps} | "
            f"{curve[0]['error']:.3f} to {curve[-1]['error']:.3f} | {held_out} | "
            f"{scores[0]['transfer_dice']:.3f} to {scores[-1]['transfer_dice']:.3f} | {entry['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines)


def memory_table(results: dict[str, Any]) -> str:
    """Return the table of the second stage."""
    lines = [
        "| run | attention starts | families | peak rate | prompts | steps | loss, last | clips, Dice | absent, right "
        "| prompts, Dice | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in _with(results, "memory"):
        s, last = entry["settings"], entry["scores"][-1]
        steps = f"{entry['steps']}" + (f" of {s['steps']}" if entry["steps"] < s["steps"] else "")
        scores = " | ".join(f"{last[key]:.3f}" for key in ("val_clip_dice", "val_absent_right", "val_prompt_dice"))
        lines.append(
            f"| {name} | {'as a lookup' if s['lookup'] else 'at random'} | {s['families']} | {s['peak_rate']:g} | "
            f"{s['prompt_part']:g} | {steps} | {entry['curve'][-1]['loss']:.2f} | {scores} | "
            f"{entry['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines)


def _with(results: dict[str, Any], stage: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry[stage]) for name, entry in results.items() if stage in entry]


if __name__ == "__main__":
    main()
