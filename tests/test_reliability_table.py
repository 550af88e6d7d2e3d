"""The tables in docs/reliability.md name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
NAMED = re.compile(r"`(tests/test_\w+\.py)(?:::(\w+))?`")


def test_every_test_that_the_table_names_exists() -> None:
    text = (PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = NAMED.findall(text)
    assert len(named) > 100
    functions: dict[str, set[str]] = {}
    wrong = []
    for file, name in named:
        path = PROJECT / file
        if file not in functions:
            tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
            functions[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if not path.is_file() or (name and name not in functions[file]):
            wrong.append(f"{file}::{name}")
    assert wrong == []


def test_every_row_of_the_table_names_a_test() -> None:
    text = (PROJECT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| F")]
    assert len(rows) > 40
    assert [row for row in rows if not NAMED.search(row)] == []
    assert [int(row[3:].split()[0]) for row in rows] == list(range(1, len(rows) + 1))
