"""``nnunet_sam2 weights``: SAM 2 checkpoints by name: list, show, fetch, add, verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunet_sam2.progress import say
from nnunet_sam2.sam2.weights.bundled import header_text, verify_bundled
from nnunet_sam2.sam2.weights.cache import (
    CHANGED,
    WeightsRecord,
    all_names,
    cache_folder,
    kept_path,
    known_entry,
    read_record,
    record_path,
    recorded_names,
    state_of,
    verify_weights,
)
from nnunet_sam2.sam2.weights.registry import EMBEDDED, SEE_ORIGIN, WeightsEntry

CHANGED_STATUS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _action(actions, "list", "show the names, what is there, size, licence and native input size")
    show = _action(actions, "show", "print all that is known of a name")
    fetch = _action(actions, "fetch", "download named weights, or continue to, and keep them as safetensors")
    add = _action(actions, "add", "adopt a checkpoint file under a name, yours or one of the list")
    verify = _action(actions, "verify", "hash the kept files again; exit status 1 where one has changed")
    for reading in (listing, show, verify):
        reading.add_argument("--json", action="store_true", help="print JSON")
    for named in (show, fetch, add):
        named.add_argument("name", metavar="NAME")
    verify.add_argument("name", metavar="NAME", nargs="?", help="default: all that are kept")
    add.add_argument("file", metavar="FILE", type=Path, help="checkpoint (.pt, .safetensors); it is left alone")
    add.add_argument("--origin", metavar="TEXT", help="where the weights come from, for the records of runs")
    add.add_argument("--licence", metavar="TEXT", help=f"default: that of the name, or '{SEE_ORIGIN}'")
    for changing in (fetch, add):
        changing.add_argument(
            "--accept-changed",
            action="store_true",
            help="take the file although it is another one than was recorded or published",
        )


def run(args: argparse.Namespace) -> int:
    """Do what is asked and return the exit status."""
    return {"list": _list, "show": _show, "fetch": _fetch, "add": _add, "verify": _verify}[args.action](args)


def _action(actions: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
    )
    return parser


def _list(args: argparse.Namespace) -> int:
    all_facts = [_facts(known_entry(name)) for name in all_names()]
    if args.json:
        print(json.dumps(all_facts, indent=1))
        return 0
    width = max(len(facts["name"]) for facts in all_facts) + 2
    print(f"{'name':<{width}}{'state':<18}{'size':>8}{'input':>10}  {'licence':<14}weights")
    for facts in all_facts:
        print(
            f"{facts['name']:<{width}}{facts['state']:<18}{_megabytes(facts):>8}{facts['native_size']:>7} px  "
            f"{facts['licence']:<14}{facts['title']}"
        )
    print(f"kept in {cache_folder()}")
    return 0


def _show(args: argparse.Namespace) -> int:
    entry = known_entry(args.name)
    facts = _facts(entry)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print("\n".join(_lines(facts)))
    if entry.repo is not None and entry.sha256 is None and facts["record"] is None:
        print("no hash from the publisher is known: it is recorded at the first fetch and enforced from then on")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    entry = known_entry(args.name)
    if entry.repo is not None:
        say(f"{args.name}: {entry.file} of {entry.page}, {_megabytes(_facts(entry))}")
    from nnunet_sam2.sam2.weights.fetch import fetch_weights

    fetched = fetch_weights(args.name, accept_changed=args.accept_changed)
    say(f"{args.name} {fetched.done}")
    _say_kept(fetched.record)
    return 0


def _add(args: argparse.Namespace) -> int:
    from nnunet_sam2.sam2.weights.adopt import add_weights

    record = add_weights(
        args.name, args.file, origin=args.origin, licence=args.licence, accept_changed=args.accept_changed
    )
    say(f"{args.name} added from {args.file}")
    _say_kept(record)
    return 0


def _verify(args: argparse.Namespace) -> int:
    names = [args.name] if args.name else [EMBEDDED, *recorded_names()]
    verdicts = {name: _verdict(known_entry(name)) for name in names}
    if args.json:
        print(json.dumps(verdicts, indent=1))
    else:
        width = max(map(len, verdicts)) + 2
        print("\n".join(f"{name:<{width}}{verdict}" for name, verdict in verdicts.items()))
    return CHANGED_STATUS if any(verdict.startswith(CHANGED) for verdict in verdicts.values()) else 0


def _verdict(entry: WeightsEntry) -> str:
    if entry.bundled:
        return verify_bundled(entry)
    record = read_record(entry.name)
    if record is None:
        return state_of(entry)
    verdict = verify_weights(record)
    if verdict == "OK":
        return f"OK: as recorded on {record.recorded[:10]}"
    again = f"fetch {entry.name}" if entry.repo is not None else f"add {entry.name} FILE"
    return f"{verdict}; get it anew: nnunet_sam2 weights {again}"


def _facts(entry: WeightsEntry) -> dict[str, Any]:
    """Gather what the registry and the record say of a name, as a JSON value."""
    record = read_record(entry.name)
    path = entry.bundled_path if record is None else kept_path(record)
    there = path is not None and path.is_file()
    return {
        **asdict(entry),
        "state": state_of(entry),
        "page": entry.page,
        "needs": "nothing more: it is there" if record is not None and there else entry.needs,
        "kept_file": str(path) if there else None,
        "kept_bytes": path.stat().st_size if path is not None and there else None,
        "header": header_text(path) if entry.bundled and path is not None and there else None,
        "record_file": str(record_path(entry.name)) if record is not None else None,
        "record": asdict(record) if record is not None else None,
    }


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif value not in (None, "", [], ()):
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield f"{indent}{key.replace('_', ' '):<18} {shown}"


def _megabytes(facts: Mapping[str, Any]) -> str:
    if facts["kept_bytes"] is not None:
        return f"{facts['kept_bytes'] / 1e6:.0f} MB"
    return f"{facts['size_mb']} MB" if facts["size_mb"] else "-"


def _say_kept(record: WeightsRecord) -> None:
    say(f"{record.origin}; licence: {record.licence}")
    say(f"sha256 of the file {record.source_sha256}, recorded on {record.recorded[:10]} and enforced from then on")
    say(f"kept as {kept_path(record)}; use it with: --sam2 {record.name}")
