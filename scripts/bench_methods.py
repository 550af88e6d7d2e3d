"""Judge all labelling strategies on real images and write docs/benchmarks/methods.json and its tables.

``python scripts/bench_methods.py --cache-dir DIR`` measures every cell (set, number of supports, strategy with its
presets, checkpoint) that has no result yet, cheap ones first, and writes the JSON after each, so that it may be stopped
at any time (``--minutes M`` stops it cleanly) and goes on when started again. ``--table`` only writes the tables.

Everything is done as ``nnunet_sam2 label`` does it. Options are the defaults or a paper's preset; no case here decides
any of them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import HIERA_TINY_IMAGE, PROJECT
from methods_bench.counting import CountingBackend, spent
from methods_bench.measure import Students, measure, measure_copies
from methods_bench.organs_chart import draw_organs
from methods_bench.plan import CALIBRATED, SET_NAMES, SUPPORTS, Cell, planned
from methods_bench.store import VERSION, Results, is_done, slim
from methods_bench.summary import summarised
from methods_bench.tables import write_tables
from methods_bench.tasks import FEW_SHOT, Cases, case_names, set_of
from methods_bench.variants import all_variants

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.registry import options_json
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.sam2.cache import EmbeddingCache

RESULTS = PROJECT / "docs" / "benchmarks" / "methods.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
CHECKPOINTS = {"none": None, "embedded": "embedded", "hiera_tiny": str(HIERA_TINY_IMAGE)}
"""Short name on the command line -> what is loaded; ``none`` stands for the copies, which need no model."""
HIERA_SIZES = {"hippocampus": 256}
"""Pixels for Hiera-tiny where it is not 512."""
_TIMES = {256: 1.5, 512: 12.0}
"""How much slower Hiera-tiny is than the embedded model, by pixels; only the plan asks."""

_ENCODED_TO_TIME = 6


def main() -> None:
    """Measure what is asked for and has no result yet, then write the tables."""
    args = _arguments()
    results = Results(args.output)
    if not args.table:
        end = None if args.minutes is None else time.monotonic() + 60.0 * args.minutes
        for checkpoint in args.checkpoints:
            for size, sets in _sets_by_size(checkpoint, args.sets, args.image_size):
                _Bench(checkpoint, size, sets, results, args).run(end)
    if args.output == RESULTS:
        write_tables(results.read(), PAGE, PROJECT / "README.md")
        draw_organs(results.read()["cells"], PAGE.parent / "organs.svg")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in all_variants()]
    parser.add_argument("--table", action="store_true", help="only write the tables from the results that are there")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument(
        "--again", nargs="+", choices=names, default=[], metavar="VARIANT", help="measure these anew, whatever is there"
    )
    parser.add_argument("--sets", nargs="+", choices=SET_NAMES, default=list(SET_NAMES))
    parser.add_argument("--supports", nargs="+", type=int, default=list(SUPPORTS))
    parser.add_argument("--checkpoints", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--image-size", type=int, default=None, help="pixels for hiera_tiny (default: 256 or 512)")
    parser.add_argument("--calibrate", nargs="*", choices=names, default=list(CALIBRATED), metavar="VARIANT")
    parser.add_argument("--queries", type=int, default=None, help="query cases a cell (default: what is affordable)")
    parser.add_argument("--seconds-a-cell", type=float, default=60.0, help="what is affordable, in a core's seconds")
    parser.add_argument("--minutes", type=float, default=None, help="begin no cell after so many minutes")
    parser.add_argument("--plan", action="store_true", help="only print what would be measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-dir", type=Path, default=None, help="keep embeddings between cells and runs")
    parser.add_argument("--cache-gb", type=float, default=8.0, help="what that folder may hold")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _sets_by_size(checkpoint: str, sets: list[str], asked: int | None) -> list[tuple[int | None, list[str]]]:
    if checkpoint != "hiera_tiny":
        return [(None, sets)]
    sizes = {name: asked or HIERA_SIZES.get(name, 512) for name in sets}
    return [(size, [name for name in sets if sizes[name] == size]) for size in sorted(set(sizes.values()))]


class _Bench:
    """Measure the cells of one checkpoint at one image size."""

    def __init__(
        self, checkpoint: str, size: int | None, sets: list[str], results: Results, args: argparse.Namespace
    ) -> None:
        self._results, self._args = results, args
        self._quality = QualityOptions()
        variants = [v for v in all_variants() if v.name in args.only and v.copies == (checkpoint == "none")]
        self._cells = planned(
            variants,
            sets=sets,
            supports=args.supports,
            queries=args.queries,
            seconds_a_cell=args.seconds_a_cell,
            times=_TIMES.get(size, 1.0) if size else 1.0,
            calibrated=args.calibrate,
        )
        self._backend: CountingBackend | None = None
        self._name = ""
        if CHECKPOINTS[checkpoint] is not None and self._cells:
            loaded = load_backend(
                CHECKPOINTS[checkpoint],
                device=args.device,
                image_size=size,
                threads=args.threads,
            )
            self._backend = CountingBackend(loaded, cache=EmbeddingCache(args.cache_dir, disk_gb=args.cache_gb))
            self._name = f"{checkpoint}, {loaded.spec.image_size} px"
            self._students = Students(self._backend, args.seed)
        self._cases = Cases(self._backend)

    def run(self, end: float | None) -> None:
        """Measure every cell that has no result, until ``end``."""
        for cell in self._cells:
            if end is not None and time.monotonic() >= end:
                print("time is up; start again to go on", flush=True)
                return
            self._cell(cell)

    def _cell(self, cell: Cell) -> None:
        args, variant = self._args, cell.variant
        strategy = None
        if self._backend is not None:
            strategy = variant.make(has_memory=self._backend.spec.has_memory)
            if strategy.needs_memory and not self._backend.spec.has_memory:
                return
        row = f"{cell.key}/seed {args.seed}"
        task = f"{self._name}: {variant.name}" if self._name else variant.name
        supports, _ = case_names(cell.set_name, cell.supports, cell.queries, args.seed)
        calibrate = variant.name in args.calibrate and cell.supports > 1
        identity = self._identity(strategy, supports, calibrate)
        entry = self._results.read()["cells"].get(row, {}).get(task)
        if variant.name not in args.again and is_done(entry, identity, cell.queries):
            return
        if args.plan:
            print(f"{row} {task}: {cell.queries} queries, about {cell.seconds:.0f} s", flush=True)
            return
        started = time.monotonic()
        tasks = self._cases.tasks(cell.set_name, cell.supports, cell.queries, args.seed)
        self._time_encoding()
        found: dict[str, Any]
        try:
            if self._backend is None or strategy is None:
                found = measure_copies(variant, tasks)
            else:
                found = measure(
                    variant,
                    strategy,
                    tasks,
                    self._backend,
                    self._students,
                    seed=args.seed,
                    quality=self._quality,
                    calibrate=calibrate,
                )
            found = slim({**summarised(set_of(cell.set_name), found), **found}, organ_slices=cell.set_name == FEW_SHOT)
        except InputError as error:
            found = {"refused": str(error)}
        machine = {"device": args.device, "threads": args.threads, "cores": os.cpu_count()}
        date = datetime.date.today().isoformat()
        self._results.put(row, task, {"identity": identity, **found, "machine": machine, "date": date})
        told = found.get("refused") or f"Dice {found['mean']} {found['classes']}"
        print(f"{row} {task}: {told} ({time.monotonic() - started:.0f} s)", flush=True)

    def _identity(self, strategy: Any, supports: list[str], calibrate: bool) -> dict[str, Any]:
        identity: dict[str, Any] = {"version": VERSION, "supports": supports}
        if self._backend is not None:
            spec = self._backend.spec
            options = options_json(strategy.options)
            # Where a file lies changes nothing.
            options.pop("lpips_weights", None)
            identity |= {
                "checkpoint": spec.checkpoint_hash,
                "image_size": spec.image_size,
                "precision": spec.precision,
                "options": options,
                "quality": self._quality.looked_at,
                "calibrated": calibrate,
            }
        return identity

    def _time_encoding(self) -> None:
        """Measure what a slice takes to encode, once for a checkpoint, on images that no cache holds."""
        if self._backend is None or self._name in self._results.read()["encoding"]:
            return
        size = self._backend.spec.image_size
        images = np.random.default_rng(time.time_ns()).random((_ENCODED_TO_TIME, 3, size, size), dtype=np.float32)
        self._backend.embed(Frames.from_images(images[:1]))
        before = self._backend.counter.reading()
        cpu = time.process_time()
        self._backend.embed(Frames.from_images(images[1:]))
        counted = spent(before, self._backend.counter.reading())
        self._results.put_encoding(
            self._name,
            {
                "wall_a_slice": round(counted["encoder_wall"] / counted["slices_encoded"], 4),
                "cpu_a_slice": round((time.process_time() - cpu) / counted["slices_encoded"], 4),
                "checkpoint": self._backend.spec.checkpoint_hash,
                "precision": self._backend.spec.precision,
            },
        )


if __name__ == "__main__":
    main()
