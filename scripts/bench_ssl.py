"""Judge the loop as semi-supervised methods are judged: all arms at the same number of iterations, final checkpoint.

``bench_ssl.py --work DIR`` runs the arms of a split one after the other and writes docs/benchmarks/ssl.json and its
table after each. A killed benchmark continues when started again, in the middle of a training as well: on a machine
that is at hand for minutes, the same command under ``timeout 590``, again and again, ends with what one call would have
given (``--profile gpu --device cuda``). Nothing is chosen on the test cases, and nothing is held out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench_data import PROJECT
from filelock import FileLock
from ssl_bench.arms import ARMS, Budget, run_arm
from ssl_bench.protocol import PROTOCOLS, converted
from ssl_bench.tables import write_tables

from nnunet_sam2.storage import read_json, write_json

RESULTS = PROJECT / "docs" / "benchmarks" / "ssl.json"


def main() -> None:
    """Run what is asked for and has no result yet; write JSON and table after every arm."""
    args = _arguments()
    if not args.table:
        protocol = PROTOCOLS[args.set]
        for seed in args.seeds:
            cohorts = converted(protocol, args.labelled, seed, args.work.resolve())
            budget = Budget(
                iterations=args.iterations, profile=args.profile, device=args.device, threads=args.threads, seed=seed
            )
            for name in args.arms:
                key = f"{args.set}/{args.labelled}/{args.profile}/{args.iterations}/seed {seed}/{name}"
                if key in _results():
                    continue
                out = args.work.resolve() / "test" / f"{cohorts.folders.name}_i{args.iterations}s{seed}"
                result = run_arm(ARMS[name], name, protocol, cohorts, budget, out)
                _keep(key, {**result, "device": args.device, "finished": time.strftime("%Y-%m-%d")})
                print(f"{key}: Dice {result['dice']:.4f}, largest piece {result['largest']['dice']:.4f}", flush=True)
    write_tables(_results(), PROJECT / "docs" / "benchmarks.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(PROTOCOLS), default="acdc_ssl4mis")
    parser.add_argument("--labelled", type=int, default=3, help="labelled patients (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    names = list(ARMS)
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=", ".join(names))
    parser.add_argument("--iterations", type=int, default=4800, help="of every arm, all its trainings together")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=PROJECT / "bench_work")
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args()
    if args.labelled not in PROTOCOLS[args.set].labelled:
        parser.error(f"--labelled {args.labelled}: {args.set} has {PROTOCOLS[args.set].labelled}")
    return args


def _results() -> dict[str, Any]:
    return dict(read_json(RESULTS)) if RESULTS.is_file() else {}


def _keep(key: str, result: dict[str, Any]) -> None:
    with FileLock(RESULTS.with_suffix(".lock")):
        write_json(RESULTS, dict(sorted({**_results(), key: result}.items())))


if __name__ == "__main__":
    main()
