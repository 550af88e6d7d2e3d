"""``nnunet_sam2 doctor``: check machine, installation and a dataset, and say how to mend what is amiss."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from nnunet_sam2.doctor import Finding, Level, examine, examine_dataset
from nnunet_sam2.folders import find_dataset
from nnunet_sam2.progress import say

FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-d", dest="dataset", help="also check this dataset: id or DatasetXXX_Name")
    parser.add_argument("--trial", action="store_true", help="also let nnU-Net find and import the trainer (10 s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = "Exit status: 0 where nothing fails, else 1. Nothing is changed."


def run(args: argparse.Namespace) -> int:
    """Check, print a line for each check, and return the exit status."""
    findings = []
    for finding in _findings(args.dataset, trial=args.trial):
        findings.append(finding)
        if not args.json:
            say(line(finding))
    if args.json:
        print(json.dumps(as_json(findings), indent=1))
    else:
        say(summary(findings))
    return FAILED if any(finding.level is Level.FAIL for finding in findings) else 0


def line(finding: Finding) -> str:
    """Write a finding as one line."""
    text = f"{finding.level.value:<5}{finding.check:<29}{finding.message}"
    return f"{text}; mend: {finding.mend}" if finding.mend else text


def summary(findings: Sequence[Finding]) -> str:
    """Count."""
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    return f"{counts[Level.OK]} ok, {counts[Level.WARN]} warn, {counts[Level.FAIL]} fail"


def as_json(findings: Sequence[Finding]) -> dict[str, object]:
    """Return all findings as a JSON value."""
    return {
        "findings": [finding.to_json() for finding in findings],
        **{level.value: sum(finding.level is level for finding in findings) for level in Level},
    }


def _findings(dataset: str | None, *, trial: bool) -> Iterator[Finding]:
    yield from examine(trial=trial)
    if dataset is not None:
        yield from examine_dataset(find_dataset(dataset))
