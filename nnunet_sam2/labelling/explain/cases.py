"""Say from its record which supports, prompts and members made a label, and what was left out. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import IGNORE, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.explain.members import Json, explain_member
from nnunet_sam2.labelling.records import find_records, find_rounds
from nnunet_sam2.storage import read_json

_CHECKS = ("prompt_check", "decoder_check", "second_pass_check", "check")
"""Where records keep the Dice of choices on labelled cases: case, then choice, then class."""

_MOST_LINES = 40
"""Lines of a class that are printed; records of hundreds of slices have more, and JSON has them all."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Hold what is known of one case: the records of its labels, and of the rounds that fused them."""

    case_id: str
    folder: Path
    records: tuple[tuple[Path, Json], ...]
    rounds: tuple[tuple[Path, Json], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the records with the files that they come from, as a JSON value."""
        return {
            "case": self.case_id,
            "records": [{"file": str(path), "record": record} for path, record in self.records],
            "rounds": [{"file": str(path), **_of_case(fused, self.case_id)} for path, fused in self.rounds],
        }


def find_case(cohort: Cohort, case_id: str, folder: Path, *, dataset: str) -> Found:
    """Read all records of a case in a folder of labels, a run's folder, or the folder of all of them.

    Raises `InputError` where the cohort has no such case, or the folder no record of it.
    """
    cohort.case(case_id)
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; label the case with: {_command(dataset, case_id)}")
    paths = find_records(folder, case_id)
    if not paths:
        others = sorted({case.case_id for case in cohort.cases if find_records(folder, case.case_id)})
        known = f" (there are records of {', '.join(others[:10])})" if others else ""
        raise InputError(f"{folder} holds no record of {case_id}{known}; label it with: {_command(dataset, case_id)}")
    rounds = [(path, read_json(path)) for path in find_rounds(folder)]
    return Found(
        case_id=case_id,
        folder=folder,
        records=tuple((path, _read_record(path)) for path in paths),
        rounds=tuple((path, fused) for path, fused in rounds if case_id in fused.get("voxels", {})),
    )


def as_text(found: Found, cohort: Cohort) -> str:
    """Write what is known of a case for people."""
    names = class_names(cohort)
    own = {c.case_id for c in cohort.cases if c.patient == cohort.case(found.case_id).patient}
    blocks = [_record_text(found.folder, path, record, names, own) for path, record in found.records]
    blocks += [_round_text(found.folder, path, _of_case(fused, found.case_id), names) for path, fused in found.rounds]
    return "\n\n".join(blocks)


def class_names(cohort: Cohort) -> dict[str, str]:
    """Return the names of the class values (as text), joined where several regions hold one."""
    names: dict[str, list[str]] = {str(value): [] for value in cohort.class_values}
    for name, value in cohort.labels.items():
        for single in value if isinstance(value, list) else [value]:
            if name != IGNORE and str(single) in names:
                names[str(single)].append(name)
    return {value: "/".join(found) for value, found in names.items()}


def _record_text(folder: Path, path: Path, record: Json, names: Mapping[str, str], own: Set[str]) -> str:
    strategy, sam2 = record["strategy"], record["sam2"]
    members: Sequence[Json] = record.get("members", [])
    options = " ".join(f"{key}={_plain(value)}" for key, value in record["options"].items())
    lines = [
        f"{record['case']}, strategy {strategy} ({path.relative_to(folder)})",
        f"  SAM 2: {sam2['name']} at {sam2['image_size']} pixels; seed {record['seed']}",
        f"  options: {options}",
        f"  supports: {', '.join(record['supports']) or 'none'}",
        *_shown(record),
        *_of_the_patient(record),
        f"  {_counted(members)}; components kept: {record['fusion']['components']}",
    ]
    human = record.get("dice_with_human_label")
    for value, name in names.items():
        lines.append(f"  class {value} ({name}): {_measured(record, value, human)}")
        made, left_out = _of_members(strategy, members, value)
        checked = _checked(record, value, own)
        removed = record.get("removed_by_component_filter", {}).get(value)
        if int(value) in record.get("unanswered", ()):
            left_out.append("no support is annotated for it")
        if removed:
            left_out.append(f"{removed} voxels outside of the kept component")
        lines += _listed([*made, *([checked] if checked else [])], "    ")
        lines += _listed(left_out, "    left out: ")
    lines += [f"  left out: {sentence}" for sentence in _unused_supports(record, members)]
    return "\n".join(lines)


def _shown(record: Json) -> list[str]:
    """Say what SAM 2 saw of the images: channels, windows, and how the file was turned."""
    shown = record.get("shown")
    if not shown:
        return []
    planes = [
        f"{name} from {low:g} to {high:g}"
        for name, (low, high) in zip(shown["channels"], shown["windows"], strict=True)
    ]
    red, green, blue = planes
    text = f"  shown: {red}" if len(set(planes)) == 1 else f"  shown: red {red}, green {green}, blue {blue}"
    turned = shown["turned"]
    if not turned:
        return [text]
    axes = [
        f"{'the reverse of ' if flip else ''}{'zyx'[axis]}"
        for axis, flip in zip(turned["axes_zyx"], turned["flips_zyx"], strict=True)
    ]
    return [text, f"  turned: the axes z, y, x of slices and places below are {', '.join(axes)} of the file"]


def _measured(record: Json, value: str, human: Mapping[str, float | None] | None) -> str:
    parts = [f"{record.get('voxels', {}).get(value, 0)} voxels"]
    agreement = record.get("agreement", {}).get(value)
    if agreement is not None:
        parts.append(f"members agree with the label by Dice {agreement:.2f}")
    quality = record.get("quality") or {}
    expected = (quality.get("classes") or {}).get(value, {})
    if expected.get("dice") is not None:
        bound = _bound(expected) if expected.get("lower") else ""
        how = "" if quality["calibrated"] else ", uncalibrated"
        parts.append(f"estimated Dice {expected['dice']:.2f} ({_seen(quality, value)}{how}{bound})")
    dice = (human or {}).get(value)
    if dice is not None:
        parts.append(f"Dice with the human label {dice:.2f}, which had no part in it")
    return ", ".join(parts)


def _bound(expected: Json) -> str:
    """Say how often the lower bound holds, and for how many cases that is proven."""
    # Records of earlier versions do not say what is proven.
    proven = f", proven for {expected['proven']:.0%}" if expected.get("proven") is not None else ""
    return f", {expected['lower']:.2f} at least in {expected['coverage']:.0%} as a rule{proven}"


def _seen(quality: Json, value: str) -> str:
    """Say what an estimate was made of."""
    seen = quality["features"].get(value, {})
    if not seen.get("voxels"):
        return "nothing was found of it"
    parts = []
    for key, text in (("reverse", "labels"), ("agreement", "agrees with")):
        found = seen.get(key) or {}
        if found:
            parts.append(f"{text} " + ", ".join(f"{case} {dice:.2f}" for case, dice in found.items()))
    return "; ".join([*parts, f"probability inside {seen['inside']:.2f}"])


def _of_members(strategy: str, members: Sequence[Json], value: str) -> tuple[list[str], list[str]]:
    """Return what the members say of a class; what several leave out alike is said once."""
    answering = [member for member in members if int(value) in member.get("answers_for", [int(value)])]
    said = [explain_member(strategy, member, value) for member in answering]
    made = [sentence for one in said for sentence in one.made]
    return made, list(dict.fromkeys(sentence for one in said for sentence in one.left_out))


def _of_the_patient(record: Json) -> list[str]:
    """Say which supports are scans of the case's own patient, and what that does to the estimate."""
    scans = record.get("supports_of_the_patient")
    if not scans:
        return []
    shown = f"  of the same patient: {', '.join(scans)}"
    return [f"{shown}; estimates are drawn from labels of patients who had no such help, and may be too low"]


def _checked(record: Json, value: str, own: Set[str]) -> str | None:
    """Say what labelled cases had to say about the choices for a class; rows of the patient's ``own`` cases did not."""
    prepared = record.get("prepared") or {}
    for group in prepared.get("groups", ()):
        if int(value) in group["answers_for"]:
            prepared = group["prepared"] or {}
    for check in _CHECKS:
        by_choice: dict[str, list[float]] = {}
        for case_id, row in (prepared.get(check) or {}).items():
            for choice, table in row.items():
                if case_id not in own and table.get(value) is not None:
                    by_choice.setdefault(choice, []).append(table[value])
        if by_choice:
            means = [f"{choice} {sum(found) / len(found):.3f}" for choice, found in by_choice.items()]
            return f"checked on {max(map(len, by_choice.values()))} labelled cases, Dice: {', '.join(means)}"
    return None


def _unused_supports(record: Json, members: Sequence[Json]) -> Iterator[str]:
    """Name the supports that strategies which choose among them have not used."""
    used = set(_named_supports(members))
    unused = [case_id for case_id in record["supports"] if case_id not in used]
    if not used or not unused:
        return
    limit = record["options"].get("supports")
    why = f"less similar than those that supports={limit} allows" if limit else "nothing of them was chosen"
    yield f"support{'s' * (len(unused) != 1)} {', '.join(unused)}: {why}"


def _named_supports(value: Any) -> Iterator[str]:
    """Find the supports that a record names as used: under ``support``, or ``case`` in a slice's list of them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("support", "case") and isinstance(item, str):
                yield item
            elif key == "supports" and isinstance(item, list) and all(isinstance(s, str) for s in item):
                yield from item
            else:
                yield from _named_supports(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named_supports(item)


def _round_text(folder: Path, path: Path, fused: Json, names: Mapping[str, str]) -> str:
    people = {
        str(value): said
        for said, values in (("accepted by a person", fused["accepted"]), ("drawn by hand", fused["drawn"]))
        for value in values
    }
    by_hand = all(people.get(value) == "drawn by hand" for value in names)
    what = "drawn by hand" if by_hand else f"mean confidence {_number(fused['confidence'])} where in doubt"
    lines = [f"{'label' if by_hand else 'fused label'} ({path.relative_to(folder)}): {what}"]
    if fused["temperatures"] and not by_hand:
        sure = ", ".join(f"{source} {_number(found)}" for source, found in fused["temperatures"].items())
        measured = f"; the student measured on {fused['held_out']} held out" if fused["held_out"] else ""
        lines.append(f"  temperatures before fusion (above 1: was too sure): {sure}{measured}")
    for value, name in names.items():
        sources = [
            f"{source} with estimated Dice {_number(table[value])}"
            for source, table in fused["quality"].items()
            if value in table
        ]
        changed = fused["change"].get(value)
        since = "" if changed is None else f"; changed by {changed:.3f} since the round before"
        right = fused["right"].get(value)
        differ = "" if right is None else f", sam2 right in {right:.2f} of where they differ"
        origin = f", {people[value]}" if value in people else f" from {', '.join(sources)}{differ}"
        lines.append(f"  class {value} ({name}): {fused['voxels'].get(value, 0)} voxels{origin}{since}")
        if value in fused["estimates"] and value not in people:
            expected = fused["estimates"][value]
            distrusted = ", not learnt from" if int(value) in fused["distrusted"] else ""
            lines.append(f"    estimated Dice of what they were fused to: {_number(expected)}{distrusted}")
    if fused["left_out"]:
        lines.append(f"  left out: not trained on, because {fused['left_out']}")
    return "\n".join(lines)


def _of_case(fused: Json, case_id: str) -> dict[str, Any]:
    """Return what a round's record says about one case."""
    # Records were once without the classes that people drew, and named the cases alone.
    every = fused["voxels"][case_id] if case_id in fused.get("human_cases", []) else ()
    return {
        "voxels": fused["voxels"][case_id],
        "confidence": fused.get("confidence", {}).get(case_id),
        "quality": fused.get("quality", {}),
        "temperatures": fused.get("temperatures", {}),
        "right": fused.get("right", {}),
        "held_out": fused.get("held_out", 0),
        "change": ((fused.get("change") or {}).get("by_case") or {}).get(case_id, {}),
        "left_out": fused.get("left_out", {}).get(case_id),
        "estimates": fused.get("estimates", {}).get(case_id, {}),
        "distrusted": fused.get("distrusted", {}).get(case_id, []),
        "drawn": fused.get("drawn", {}).get(case_id, [int(value) for value in every]),
        "accepted": fused.get("accepted", {}).get(case_id, []),
    }


def _read_record(path: Path) -> Json:
    record = read_json(path)
    wanted = {"case", "strategy", "options", "sam2", "seed", "supports", "fusion"}
    missing = sorted(wanted - set(record)) if isinstance(record, dict) else sorted(wanted)
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)} and is no record of a label; label the case again")
    return dict(record)


def _listed(sentences: Sequence[str], indent: str) -> list[str]:
    lines = [indent + sentence for sentence in sentences[:_MOST_LINES]]
    if len(sentences) > _MOST_LINES:
        lines.append(f"{indent}... {len(sentences) - _MOST_LINES} more (--json has all)")
    return lines


def _command(dataset: str, case_id: str) -> str:
    return f"nnunet_sam2 label -d {dataset} --cases {case_id}"


def _counted(members: Sequence[Json]) -> str:
    return "1 member" if len(members) == 1 else f"mean of {len(members)} members"


def _plain(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
