"""Replace the part of a page that a benchmark's script writes from its own JSON."""

from __future__ import annotations

from pathlib import Path

from nnunet_sam2.storage import write_text


def replace_marked(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the lines ``<!-- NAME: ... -->`` and ``<!-- NAME: end -->`` of ``page``."""
    lines = page.read_text(encoding="utf-8").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(f"<!-- {name}: ") and "end -->" not in line]
    ends = [i for i, line in enumerate(lines) if line == f"<!-- {name}: end -->"]
    if len(starts) != 1 or len(ends) != 1 or ends[0] <= starts[0]:
        raise SystemExit(f"{page} lacks a line '<!-- {name}: ... -->' followed by '<!-- {name}: end -->'")
    write_text(page, "\n".join([*lines[: starts[0] + 1], "", text.strip("\n"), "", *lines[ends[0] :]]))
