"""What a member's record says about one class, strategy by strategy, in words.

Records are read as JSON values, so that nothing heavy is imported; what a record lacks is left unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Said:
    """Hold sentences on how a member came to a class, and on what it left out."""

    made: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def explain_member(strategy: str, member: Json, value: str) -> Said:
    """Say how a member came to the class ``value`` (as text, like in the record)."""
    return _STRATEGIES.get(strategy, _other)(member, value)


def ranges(numbers: Iterable[int]) -> str:
    """Write ascending whole numbers with runs drawn together: ``1-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def slices(numbers: Iterable[int]) -> str:
    """Write slice numbers with the word before them, in singular or plural."""
    known = sorted(set(numbers))
    return f"slice {known[0]}" if len(known) == 1 else f"slices {ranges(known)}"


def _insert(member: Json, value: str) -> Said:
    entry = member["classes"].get(value, {})
    if entry.get("absent_in_all_supports"):
        return Said(left_out=["no support shows it at model size"])
    if not entry:
        return Said()
    support = entry["support"]
    lent = "" if support == member["support"] else f" (for {member['support']}, which does not show the class)"
    iou = entry.get("estimated_iou")
    own = "" if iou is None else f", SAM 2's own IoU {iou:.2f}"
    made = (
        f"{member['name']}: {support}{lent}, {slices(entry['prompted_slices'])} with masks, {_place(entry['place'])}; "
        f"found on {entry['slices_found']} query slices{own}"
    )
    reasons = {
        "vanished_slices": "show it, but not at model size",
        "partly_judged_slices": "hold voxels that nobody has judged",
        "slices_beyond_limit": "are more than prompted_slices allows",
    }
    return Said(
        made=[made],
        left_out=[f"{support}: {slices(entry[name])}, which {why}" for name, why in reasons.items() if entry.get(name)],
    )


def _place(place: Json) -> str:
    if "before_query_slice" in place:
        return f"inserted before query slice {place['before_query_slice']}"
    if "after_support_slice" in place:
        return f"the query inserted after support slice {place['after_support_slice']}"
    if "chunks" in place:
        parts = [
            f"query {slices(range(c['query_slices'][0], c['query_slices'][1] + 1))} before support slice "
            f"{c['before_support_slice']}"
            for c in place["chunks"]
        ]
        return "; ".join(parts)
    (low, high), (first, last) = place["support_slices"], place["query_slices"]
    return f"support {slices(range(low, high + 1))} exchanged for query {slices(range(first, last + 1))}"


def _match(member: Json, value: str) -> Said:
    if int(value) in member.get("absent_in_all_supports", []):
        return Said(left_out=["no support shows it at model size"])
    metric = member["metric"]
    said = Said()
    for pool in member["pools"]:
        if int(value) not in pool["classes"]:
            continue
        sent = {n: found for n, found in enumerate(pool["slices"]) if value in found["classes"]}
        by_support: dict[str, list[Json]] = {}
        for found in sent.values():
            by_support.setdefault(found["support"], []).append(found)
        parts = [
            f"{case} {slices(f['slice'] for f in found)} ({sum(f['variant'] is not None for f in found)} of "
            f"{len(found)} varied)"
            for case, found in by_support.items()
        ]
        if sent:
            said.made.append(
                f"{member['name']}: carried to query {slices(sent)} from {'; '.join(parts)}; {metric} "
                f"{_span([found[metric] for found in sent.values()])}, {pool['candidates']} candidates a slice"
            )
        empty = [n for n in range(len(pool["slices"])) if n not in sent]
        if empty:
            said.left_out.append(f"query {slices(empty)}: the most similar support slice does not show it")
        vanished = {(f["support"], f["slice"]) for f in pool["slices"] if int(value) in f.get("vanished_classes", [])}
        said.left_out.extend(f"{case} slice {n}, which shows it, but not at model size" for case, n in sorted(vanished))
    return said


def _guided(member: Json, value: str) -> Said:
    if int(value) in member.get("absent_in_all_supports", []):
        return Said(left_out=["no support shows it at model size"])
    entries = {s["slice"]: s["classes"].get(value, {}) for s in member["slices"]}
    asked = [n for n, entry in entries.items() if "iou" in entry]
    boxed = [n for n in asked if "box" in entries[n]]
    gone = [n for n in asked if entries[n].get("object_score", 1.0) <= 0]
    remembered = {f["case"] for s in member["slices"] if s["slice"] in asked for f in s["supports"]}
    said = Said()
    if asked:
        choice = member.get("choice", {}).get(value, "-")
        said.made.append(
            f"{member['name']}: asked on query {slices(asked)} with {', '.join(sorted(remembered))} in memory; "
            f"prompted again by a box on {len(boxed)} of them; taken: {choice}"
        )
    if gone:
        said.left_out.append(f"query {slices(gone)}: SAM 2 says that the object is not there")
    if rest := sorted(set(entries) - set(asked)):
        said.left_out.append(f"query {slices(rest)}: too few of the similar support slices show it")
    return said


def _refine(member: Json, value: str) -> Said:
    said = Said(made=[f"{member['name']}: starts from {member['start']}; taken: {member['choice'][value]}"])
    components = member.get("components", {}).get(value, {})
    if components.get("components"):
        kept = components["kept"]
        said.made.append(
            f"{len(kept)} of {components['components']} components prompt, with "
            f"{', '.join(str(c['voxels']) for c in kept)} voxels"
        )
    else:
        said.left_out.append("the prediction shows it nowhere, so nothing prompts")
    prompted = [s["slice"] for s in member.get("prompts", []) if any(p["class"] == int(value) for p in s["pieces"])]
    if prompted:
        said.made.append(f"box, then points and the box's answer, on query {slices(prompted)}")
    if int(value) in member.get("brought_back", []):
        said.made.append("the student had missed it; it was taken from the supports")
    if member.get("unchecked"):
        said.left_out.append("nothing could be checked on labelled cases")
    return said


def _transfer(member: Json, value: str) -> Said:
    share = member.get("decoder_share", {}).get(value, 0.0)
    decoder = f"SAM 2's decoder redraws it with weight {share:g}" if share else "the decoder does not redraw it"
    said = Said(made=[f"{member['name']}: nearest locations of {', '.join(member.get('supports', []))}; {decoder}"])
    recipes = [" ".join(f"{key}={number:g}" for key, number in recipe.items()) for recipe in member.get("recipes", [])]
    if recipes:
        said.made.append(f"mean of {len(recipes)} recipes: {'; '.join(recipes)}" if recipes[1:] else recipes[0])
    agree = (member.get("supports_agree") or {}).get(value)
    if agree is not None:
        said.made.append(f"by their own votes alone two of them would agree to a Dice of {agree:.2f}")
    return said


def _auto(member: Json, value: str) -> Said:
    said = _transfer(member, value)
    ground = member.get("ground") or {}
    if ground.get("shift_mm") is not None:
        said.made.append(
            f"shows another part of the body than the supports: slices meet those that look alike, "
            f"{ground['shift_mm']:g} mm along; what both show: voxels {_bounds(ground['part_zyx'])}"
        )
    if member.get("box_zyx"):
        bent = "; the supports are bent onto what was found" if member.get("supports_bent") else ""
        part = _bounds(member["box_zyx"])
        said.made.append(f"seen from near: voxels {part}, where a first transfer found the classes{bent}")
    for group in member.get("groups", []):
        if int(value) in group["classes"]:
            together = ", ".join(str(v) for v in group["classes"])
            said.made.append(
                f"too thin to be seen with all others: {group['share']:.2g} of it comes from a nearer look at "
                f"{together}, voxels {_bounds(group['box_zyx'])}"
            )
    threshold = member.get("threshold", {}).get(value)
    if threshold is not None:
        said.made.append(f"drawn from a probability of {threshold:.2g} on, where its expected Dice is highest")
    taken = member.get("intensities", {}).get("taken", "as it is")
    if taken != "as it is":
        said.made.append(f"the query's intensities were foreign to the supports and were {taken} before")
    weight = member.get("weights", {}).get(value)
    if weight is not None:
        said.made.append(f"counts with weight {weight:g}")
    return said


def _bounds(box_zyx: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{axis} {a}-{b - 1}" for axis, a, b in zip("zyx", *box_zyx, strict=True))


def _chain(member: Json, value: str) -> Said:
    prompted = [f"{case} slice {n}" for case, n in member.get("anchors", [])]
    said = Said(
        made=[
            f"{member['name']}: one of {member.get('images', '?')} images in a row, prompted by {member['seeds']}; "
            f"taken: {member['choice'].get(value, '-')}"
        ]
    )
    if prompted:
        said.made.append(f"masks carried from {', '.join(prompted)}")
    for entry in member.get("slices", []):
        point, threshold = entry.get("point"), entry.get("threshold")
        if point and threshold and member["seeds"] == "points":
            said.made.append(
                f"slice {entry['slice']}: point {tuple(point)} in the {entry['component']['chosen']} of "
                f"{entry['component']['of']} pieces above {threshold['method']} threshold {threshold['intensity']}"
            )
    return said


def _other(member: Json, value: str) -> Said:
    said = Said(made=[f"{member['name']}"])
    choice = member.get("choice")
    if isinstance(choice, Mapping) and value in choice:
        said.made[0] += f": taken: {choice[value]}"
    return said


def _span(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "of equal images"
    low, high = min(known), max(known)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


_STRATEGIES: Mapping[str, Callable[[Json, str], Said]] = {
    "insert": _insert,
    "match": _match,
    "guided": _guided,
    "refine": _refine,
    "auto": _auto,
    "transfer": _transfer,
    "chain": _chain,
}
