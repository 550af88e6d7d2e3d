"""Score a SAM 2 checkpoint as a labeller on real images and write its table into docs/benchmarks.md.

``python scripts/bench_sam2.py --sam2 NAME_OR_FILE`` labels query volumes from 1, 3 and 8 support volumes by each
strategy, and by two methods that learn nothing: the mask of the best-matching support slice copied, and the same after
affine registration. Options as they are by default; no test here decides any of them. Results are kept after every
combination, so a killed benchmark goes on when started again. Without ``--sam2`` the two baselines alone are scored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from baselines import CopyBaseline
from bench_data import PROJECT
from bench_sets import SETS, Sam2BenchSet, draw_cases, load_case, summary
from marked_table import replace_marked

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategy import Prepares
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.support.cases import Query, Support

RESULTS = PROJECT / "docs" / "benchmarks" / "sam2.json"
BASELINES = ("copy", "copy, registered")


def main() -> None:
    """Score what is asked for and has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", default=None, help="name or checkpoint file")
    parser.add_argument("--table", action="store_true", help="only write the table from the results that are there")
    parser.add_argument("--name", default=None, help="name in the table (default: the file's)")
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    parser.add_argument("--supports", nargs="+", type=int, default=[1, 3, 8])
    parser.add_argument("--strategies", nargs="*", default=["transfer", "insert", "match"])
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--queries", type=int, default=None, help="query volumes a set (default: the set's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cache-dir", type=Path, default=None, help="keep embeddings between runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.table:
        backend = None
        if args.sam2 is not None:
            backend = load_backend(
                args.sam2,
                device=args.device,
                image_size=args.image_size,
                cache_dir=args.cache_dir,
                threads=args.threads,
            )
        name = args.name or (f"{backend.spec.name}, {backend.spec.image_size} px" if backend else "")
        for set_name in args.sets:
            for supports in args.supports:
                score_set(SETS[set_name], supports, backend, name, args)
    if args.output == RESULTS:
        write_table(args.output, PROJECT / "docs" / "benchmarks.md")


def score_set(
    bench: Sam2BenchSet, supports: int, backend: MetaSam2Backend | None, name: str, args: argparse.Namespace
) -> None:
    """Score every labeller that has no result for this set and number of supports."""
    queries = args.queries or bench.queries
    tasks: dict[str, Callable[[Sequence[Support]], Callable[[Query], np.ndarray]]] = {}
    for baseline in args.baselines:
        registered = baseline == BASELINES[1]
        tasks[baseline] = lambda given, registered=registered: CopyBaseline(given, registered=registered).label
    for strategy in args.strategies if backend else ():
        tasks[f"{name}: {strategy}"] = lambda given, strategy=strategy: _labeller(strategy, given, backend, args.seed)
    results = read_json(args.output) if args.output.is_file() else {}
    key = f"{bench.name}/{supports}/seed {args.seed}/{queries} queries"
    row = results.setdefault(key, {})
    wanted = [task for task in tasks if task not in row or row[task]["checkpoint"] != _checkpoint(task, backend)]
    if not wanted:
        return
    support_cases, query_cases = draw_cases(bench, supports, queries, args.seed)
    given = [load_case(bench, case, backend) for case in support_cases]
    asked = [load_case(bench, case, backend) for case in query_cases]
    for task in wanted:
        started = time.monotonic()
        try:
            label = tasks[task](given)
            scores = [_dice(bench, label(case.as_query()), case.label_zyx) for case in asked]
        except InputError as error:
            print(f"{key} {task}: left out ({error})", flush=True)
            continue
        row[task] = summary(bench, scores)
        row[task]["seconds_a_volume"] = round((time.monotonic() - started) / len(asked), 2)
        row[task]["checkpoint"] = _checkpoint(task, backend)
        print(key, task, row[task]["mean"], row[task]["classes"], flush=True)
        results = read_json(args.output) if args.output.is_file() else {}
        results[key] = results.get(key, {}) | {task: row[task]}
        write_json(args.output, dict(sorted(results.items())))


def write_table(results: Path, page: Path) -> None:
    """Replace the page's marked part with one table a set."""
    by_set: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in (read_json(results) if results.is_file() else {}).items():
        set_name, supports, *how = key.split("/")
        for task, entry in row.items():
            by_set.setdefault(f"{set_name} ({', '.join(how)})", {}).setdefault(task, {})[supports] = entry
    tables = "\n".join([_gains(by_set), *(_table(name, rows) for name, rows in by_set.items())]) if by_set else ""
    replace_marked(page, "sam2", tables or "Not run yet.")


def _gains(by_set: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return what each checkpoint's best strategy gains on the better of the two baselines, set by set."""
    models = sorted({task.rpartition(": ")[0] for rows in by_set.values() for task in rows if task not in BASELINES})
    lines = ["### Gain of the best strategy on the better baseline", ""]
    lines += ["| checkpoint | set | supports | better baseline | best strategy | gain |", "|---|---|---|---|---|---|"]
    for model in models:
        gains = []
        for name, rows in by_set.items():
            for count in sorted({c for row in rows.values() for c in row}, key=int):
                learnt = {
                    t: row[count]["mean"] for t, row in rows.items() if t.startswith(f"{model}: ") and count in row
                }
                plain = {t: rows[t][count]["mean"] for t in BASELINES if count in rows.get(t, {})}
                if not learnt or not plain:
                    continue
                best, baseline = max(learnt, key=lambda t: learnt[t]), max(plain, key=lambda t: plain[t])
                gains.append(learnt[best] - plain[baseline])
                strategy = best.removeprefix(f"{model}: ")
                lines.append(
                    f"| {model} | {name.split(' ')[0]} | {count} | {baseline} {plain[baseline]:.3f} | "
                    f"{strategy} {learnt[best]:.3f} | {gains[-1]:+.3f} |"
                )
        if gains:
            lines.append(f"| {model} | **mean** | | | | **{np.mean(gains):+.3f}** |")
    return "\n".join([*lines, ""])


def _table(name: str, rows: dict[str, dict[str, Any]]) -> str:
    counts = sorted({count for row in rows.values() for count in row}, key=int)
    bench = SETS[name.split(" ")[0]]
    lines = [f"### {name}", ""]
    header = ["labeller", *(f"{c} support{'s' if c != '1' else ''}" for c in counts)]
    if len(bench.scored) > 1:
        header += [f"{part}, {counts[-1]}" for part in bench.scored]
    header.append("s a volume")
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for task in sorted(rows, key=lambda t: (t not in BASELINES, t)):
        row = rows[task]
        cells = [task, *(f"{row[c]['mean']:.3f}" if c in row else "" for c in counts)]
        if len(bench.scored) > 1:
            last = row.get(counts[-1])
            cells += ["" if last is None else f"{last['classes'][part]:.3f}" for part in bench.scored]
        cells.append(f"{max(entry['seconds_a_volume'] for entry in row.values()):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _labeller(
    strategy_name: str, given: Sequence[Support], backend: MetaSam2Backend | None, seed: int
) -> Callable[[Query], np.ndarray]:
    if backend is None:
        raise ValueError(f"strategy {strategy_name} needs a SAM 2")
    values = tuple(sorted({int(v) for support in given for v in np.unique(support.label_zyx) if v}))
    strategy = make_strategy(strategy_name)
    if isinstance(strategy, Prepares):
        strategy.prepare(given, values, backend)
    fusion = FusionOptions(
        single_component_classes=single_component_classes([support.label_zyx for support in given], values)
    )

    def label(query: Query) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return fuse(strategy.members(query, given, values, backend, rng), values, fusion).label_zyx

    return label


def _dice(bench: Sam2BenchSet, answer_zyx: np.ndarray, truth_zyx: np.ndarray) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for part, values in bench.scored.items():
        predicted, true = np.isin(answer_zyx, values), np.isin(truth_zyx, values)
        total = int(predicted.sum() + true.sum())
        scores[part] = float(2 * (predicted & true).sum() / total) if total else None
    return scores


def _checkpoint(task: str, backend: MetaSam2Backend | None) -> str | None:
    """Return the hash that a task's result depends on; the copies depend on none."""
    return None if task in BASELINES or backend is None else backend.spec.checkpoint_hash


if __name__ == "__main__":
    main()
