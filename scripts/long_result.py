"""Write what the long tests did, from pytest's own record, to docs/reliability/last_long.json and its page."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from marked_table import replace_marked

from nnunet_sam2 import __version__
from nnunet_sam2.provenance import provenance
from nnunet_sam2.storage import write_json

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULT, PAGE = DOCS / "reliability" / "last_long.json", DOCS / "reliability.md"


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read name, outcome, seconds and figures of every test in pytest's JUnit file."""
    tests = []
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed")
        figures = [p.get("value") for p in case.iter("property") if p.get("name") == "figures"]
        tests.append(
            {
                "test": f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}",
                "outcome": {"failure": "failed", "error": "failed"}.get(outcome, outcome),
                "seconds": round(float(case.get("time", 0.0)), 1),
                "figures": figures[0] if figures else "",
            }
        )
    return tests


def table(result: dict[str, Any]) -> str:
    """Lay out a result as a Markdown table with a line on where and when."""
    machine = result["machine"]
    minutes = sum(test["seconds"] for test in result["tests"]) / 60
    lines = [
        f"Last run: {result['date']}, version {result['version']}, {machine['processor']} ({machine['cores']} cores), "
        f"{minutes:.0f} minutes.",
        "",
        "| test | outcome | minutes | figures |",
        "|---|---|---|---|",
    ]
    for test in result["tests"]:
        name = test["test"].split("::")[-1].removeprefix("test_").replace("_", " ")
        lines.append(f"| {name} | {test['outcome']} | {test['seconds'] / 60:.1f} | {test['figures']} |")
    return "\n".join(lines)


def main() -> None:
    """Write the result of the JUnit file named on the command line."""
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "version": __version__,
        "machine": provenance(),
        "tests": read_results(Path(sys.argv[1])),
    }
    write_json(RESULT, result)
    replace_marked(PAGE, "long", table(result))


if __name__ == "__main__":
    main()
