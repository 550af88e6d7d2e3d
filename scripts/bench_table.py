"""Write the loop's benchmark table from its JSON into a marked part of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marked_table import replace_marked

from nnunet_sam2.storage import read_json


def write_table(results: Path, page: Path, readme: Path) -> None:
    """Replace the marked part of the page with all sets and seeds in ``results``, and of the README with their gist."""
    tables = "\n".join(_table(name, result) for name, result in read_json(results).items())
    replace_marked(page, "loop", tables)
    replace_marked(readme, "figures", _summary(read_json(results)))


def _summary(results: dict[str, Any]) -> str:
    lines = [
        "| real images, CPU | labelled | unlabelled | SAM 2 | nnU-Net, labelled only | as long as all rounds "
        "| SAM 2's labels | nnU-Net after the rounds | human labels for all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cut, labeller, longer = result["set"], result["labeller"], result.get("labelled_only_longer")
        kept = next((r for r in result["rounds"] if r["round"] == result["best_round"]), result["labelled_only"])
        lines.append(
            f"| {name.split('/')[0]}, seed {name.split('/')[1]} | {cut['n_labelled']} | {cut['n_unlabelled']} | "
            f"{labeller['sam2']}, `{labeller['strategy']}` | {result['labelled_only']['dice']:.3f} | "
            f"{format(longer['dice'], '.3f') if longer else ''} | {result['sam2']['dice']:.3f} | "
            f"**{kept['dice']:.3f}** | {result['all_labels']['dice']:.3f} |"
        )
    return "\n".join(lines)


def _table(name: str, result: dict[str, Any]) -> str:
    bench, seed = name.split("/")
    cut = result["set"]
    classes = list(result["all_labels"]["classes"])
    lines = [
        f"### {bench}, seed {seed}",
        "",
        f"{cut['n_labelled']} labelled, {cut['n_unlabelled']} unlabelled, {cut['n_test']} test; `-c "
        f"{cut['configuration']} -f {cut['fold']} --profile cpu`. Stopped: "
        f"{result['stop_reason']}; kept: round {result['best_round']}. {result['finished']}.",
        "",
        "| | scored on | Dice | "
        + " | ".join(f"class {c}" for c in classes)
        + " | HD95 mm | change (mean / worst tenth) | validation Dice | iterations | seconds |",
        "|---|---|---|" + "---|" * (len(classes) + 5),
        _row("nnU-Net, labelled only", "test", result["labelled_only"], classes),
        *(
            [_row("same, as long as all rounds together", "test", result["labelled_only_longer"], classes)]
            if "labelled_only_longer" in result
            else []
        ),
        _row(
            f"SAM 2 labels (`{result['labeller']['strategy']}`)",
            "unlabelled",
            result["sam2"],
            classes,
            result["sam2_labels_seconds"],
        ),
    ]
    for entry in result["rounds"]:
        lines.append(_row(f"round {entry['round']}: labels", "unlabelled", entry["labels"], classes))
        lines.append(_row(f"round {entry['round']}: nnU-Net", "test", entry, classes))
    lines += [
        _row("final labels", "unlabelled", result["final_labels"], classes),
        _row("bound: human labels for all", "test", result["all_labels"], classes),
        "",
    ]
    return "\n".join([*lines, *_largest(result)])


def _largest(result: dict[str, Any]) -> list[str]:
    kept = next((r for r in result["rounds"] if r["round"] == result["best_round"]), None)
    entries = {
        "labelled only": result["labelled_only"],
        "as long as all rounds": result.get("labelled_only_longer"),
        f"round {result['best_round']}": kept,
        "bound": result["all_labels"],
    }
    told = [
        f"{name} {entry['largest']['dice']:.3f} (HD95 {entry['largest']['hd95']:.1f} mm)"
        for name, entry in entries.items()
        if entry and "largest" in entry
    ]
    return [f"The same predictions with `--keep-largest`: {', '.join(told)}.", ""] if told else []


def _row(title: str, scored_on: str, entry: dict[str, Any], classes: list[str], seconds: float | None = None) -> str:
    change = entry.get("change_mean")
    cells = [
        title,
        scored_on,
        f"**{entry['dice']:.3f}**",
        *(f"{entry['classes'][c]:.3f}" for c in classes),
        f"{entry['hd95']:.1f}",
        "" if change is None else f"{change:.3f} / {entry['change_worst_tenth']:.3f}",
        "" if entry.get("validation_dice") is None else f"{entry['validation_dice']:.3f}",
        str(entry.get("iterations") or ""),
        f"{entry.get('seconds', seconds):.0f}" if entry.get("seconds", seconds) is not None else "",
    ]
    return "| " + " | ".join(cells) + " |"
