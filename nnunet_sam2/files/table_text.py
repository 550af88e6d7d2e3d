"""Label tables as text: those of Connectome Workbench, AFNI, ITK-SNAP, and plain JSON."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass

_ITKSNAP = re.compile(r'\s*(\d+)\s+\d+\s+\d+\s+\d+\s+[\d.eE+-]+\s+[01]\s+[01]\s+"(.*)"\s*')
_ITKSNAP_MARK = "ITK-SnAP Label Description File"
_CARET = re.compile(r'<Label\b[^>]*\bKey="(-?\d+)"[^>]*>(?:<!\[CDATA\[)?(.*?)(?:\]\]>)?</Label>', re.DOTALL)
_AFNI = re.compile(r'atr_name="VALUE_LABEL_DTABLE".*?>(.*?)</AFNI_atr>', re.DOTALL)
_AFNI_PAIR = re.compile(r'"(\d+)"\s+"([^"]*)"')
_JSON_PAIR = re.compile(r'"\s*:\s*["\d]')
_DEFAULT_NAME = re.compile(r"Label (\d+)")


class BrokenTableError(Exception):
    """Say in words why a text is a label table, and cannot be read as one: to pass it over would swap labels."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Name what one value of a label file, or of one layer of it, stands for."""

    name: str
    value: int
    layer: int = 0


def text_segments(text: str) -> list[Segment]:
    """Find a table in an extension's text: XML of Workbench or AFNI, JSON, or ITK-SNAP's lines; nothing where none is.

    Raises `BrokenTableError` for what can only be a damaged table.
    """
    pairs: list[tuple[str, str]] = []
    if "LabelTable" in text or "<Label" in text:
        pairs = _CARET.findall(text)
        if len(pairs) != len(re.findall(r"</?Label\b", text)) / 2 or any("<" in name for _, name in pairs):
            raise BrokenTableError("a <Label> in it has no key or no end")
    elif "VALUE_LABEL_DTABLE" in text or _AFNI_PAIR.search(html.unescape(text)):
        pairs = _afni_pairs(text)
    elif text.lstrip().startswith("{") or text.rstrip().endswith("}") or _JSON_PAIR.search(text):
        pairs = _json_pairs(text)
    if pairs:
        return [Segment(name=name.strip(), value=int(value)) for value, name in pairs]
    return itksnap_segments(text)


def itksnap_segments(text: str) -> list[Segment]:
    """Read ITK-SNAP's label descriptions; a text of another kind names nothing."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    matches = [_ITKSNAP.fullmatch(line) for line in lines]
    found = [Segment(name=match[2], value=int(match[1])) for match in matches if match]
    if len(found) != len(lines) and (found or _ITKSNAP_MARK in text):
        raise BrokenTableError(f"its line {lines[matches.index(None)].strip()[:60]!r} describes no label")
    # ITK-SNAP writes "Label 1" to "Label 6" where nobody gave a name: that names nothing.
    given = [s for s in found if s.value and not ((m := _DEFAULT_NAME.fullmatch(s.name)) and int(m[1]) == s.value)]
    return [s for s in found if s in given or not s.value] if given else []


def _afni_pairs(text: str) -> list[tuple[str, str]]:
    match = _AFNI.search(text)
    inside = html.unescape(match[1]) if match else ""
    body = re.sub(r"</?VALUE_LABEL_DTABLE([^>\"]*(\"[^\"]*\"[^>\"]*)*>)?", "", inside)
    pairs = _AFNI_PAIR.findall(body)
    if not pairs or re.search(r"\w", _AFNI_PAIR.sub("", body)):
        raise BrokenTableError("its AFNI value label table is no list of numbers and names")
    return pairs


def _json_pairs(text: str) -> list[tuple[str, str]]:
    try:
        value = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        if '"' in text:
            raise BrokenTableError("it is no valid JSON") from None
        return []
    meant = isinstance(value, dict) and "labels" in value
    table = value.get("labels", value) if isinstance(value, dict) else None
    if isinstance(table, dict) and table:
        numbered = [isinstance(v, str) and str(k).isdecimal() and str(k).isascii() for k, v in table.items()]
        if all(numbered):
            return list(table.items())
        if all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in table.values()):
            return [(str(v), name) for name, v in table.items()]
        if meant or any(numbered):
            raise BrokenTableError("it gives some values no name, or some names no value")
    elif meant:
        raise BrokenTableError("its labels are no table")
    return []


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise BrokenTableError("it has one key twice")
    return dict(pairs)
