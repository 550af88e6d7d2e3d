"""Which cases are scans of one patient, by a pattern or by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_sam2.errors import InputError

EACH_ITS_OWN = "--patient-pattern '^(.*)$' makes each case a patient of its own"
"""What to tell where patients were found by names."""

_NAMED = re.compile(
    r"(sub-[a-z0-9]+(?=_)"  # BIDS
    r"|BraTS[a-z]*-[a-z]+-\d+(?=-\d+$)"
    r"|(?:.*[_-])?(?:patient|participant|volunteer|subject|subj|sub|pat|pt|p)[_-]?\d+[a-z]?(?=[_-]))",
    re.IGNORECASE,
)
"""A prefix that names the person in so many words."""

_SERIAL = r"(?:frame|fr|phase|time|slice|sl|z)[_-]?\d{1,4}"
_VISIT = (
    r"(?:ses|session|visit|exam|scan|run|rep|acq|echo|tp|timepoint|day|week|wk|month|year|followup|fu|mri?|ct|pet)"
    r"[_-]?\d{1,2}|[tvms]\d{1,2}"
)
_OCCASION = (
    r"(?:ed|es|pre|post|baseline|bl|followup|fu|left|right|lh|rh|l|r|sax?|lax?|[234]ch|cine|lge"
    r"|t[12](?:w|c|ce|gd)?|flair|adc|dwi|pd|bold|ct|mri?|pet|ax|axial|cor|coronal|sag|sagittal"
    r"|arterial|venous|portal|delayed|insp|exp|inspiration|expiration)"
)
_LAST_WORD = re.compile(rf"(.+)[_-](?:({_SERIAL})|({_VISIT})|{_OCCASION})", re.IGNORECASE)
"""A name that ends with which of a patient's pictures it is: frame, visit, phase, side, view, sequence."""

_NO_PATIENT = re.compile(
    r"(?:.*[_-])?(?:sites?|cent(?:er|re)|batch|dataset|data|set|group|cohort|vendor|hospital|fold|part|task|study|trial"
    r"|train(?:ing)?|test(?:ing)?|val(?:idation)?)[_-]?\d*",
    re.IGNORECASE,
)
_UNIQUE = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+(?:\.\d+){3,}", re.IGNORECASE)
"""UUIDs and DICOM's identifiers, whose parts say nothing."""

_COUNTED = re.compile(r"(.*\d)[_-](\d+)")
"""A name that ends with a number after a number: a patient's scan, or a site's patient."""

_MOST_VISITS = 20
"""Scans of one patient beyond which a stem is more likely a site than a person; frames and slices may be more."""


@dataclass(frozen=True, kw_only=True)
class Patients:
    """Hold the patient of each case, and what is worth a line about how they were found."""

    of: dict[str, str]
    note: str | None = None
    grouped: bool = False
    """Whether names alone put cases together."""


def patients_of(case_ids: Sequence[str], pattern: str | None) -> Patients:
    """Name each case's patient: the pattern's group ``patient``, its first group, or its match.

    Without a pattern, names tell: those of one stem and a word for which of a patient's pictures it is (``p1_frame01``
    and ``p1_frame12``, ``sub-01_ses-01_T1w``, ``A7_pre`` and ``A7_post``) are one patient's. What two such cases have
    in common is learnt from one when the other is judged, so that in doubt they are put together. A number alone says
    nothing (``case_001``); two of them say it where the last one counts up anew for each of many (``12_1``, ``12_2``,
    ``13_1``). Raises `InputError` for a pattern that is none or does not match.
    """
    if pattern is not None:
        return Patients(of=_by_pattern(case_ids, pattern))
    ids = sorted(case_ids)
    stem_of = {case_id: _stem(case_id) for case_id in ids}
    doubtful = _put_counted(stem_of)
    cases_of: dict[str, list[str]] = {}
    for case_id, (stem, _) in stem_of.items():
        cases_of.setdefault(stem, []).append(case_id)
    several = {
        stem: cases
        for stem, cases in cases_of.items()
        if len(cases) > 1 and (len(cases) <= _MOST_VISITS or any(stem_of[c][1] for c in cases))
    }
    patient_of = {case_id: stem if stem in several else case_id for case_id, (stem, _) in stem_of.items()}
    notes = []
    if several:
        count, (one, other, *_) = sum(map(len, several.values())), next(iter(several.values()))
        who = "one patient's" if len(several) == 1 else f"{len(several)} patients'"
        notes.append(f"{count} cases are taken for {who} by their names, as {one} and {other}; {EACH_ITS_OWN}")
    if doubtful:
        one, other = doubtful
        way_out = "were they one's, say so with --patient-pattern '^(.*)[_-]'"
        notes.append(f"{one} and {other} are taken for two patients'; {way_out}")
    return Patients(of=patient_of, note="; ".join(notes) or None, grouped=bool(several))


def _by_pattern(case_ids: Sequence[str], pattern: str) -> dict[str, str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--patient-pattern {pattern!r} is not a regular expression ({error})") from None
    patients = {}
    for case_id in case_ids:
        match = regex.search(case_id)
        if not match:
            raise InputError(f"--patient-pattern {pattern!r} does not match case {case_id}; widen the pattern")
        named = match.groupdict().get("patient")
        patient = named or (match[1] if regex.groups else match[0])
        if not patient:
            raise InputError(f"--patient-pattern {pattern!r} finds an empty patient in case {case_id}")
        patients[case_id] = patient
    return patients


def _stem(case_id: str) -> tuple[str, bool]:
    """Return what of a name may be its patient's, else all of it; and whether a patient may have very many of them."""
    if _UNIQUE.search(case_id):
        return case_id, False
    if named := _NAMED.match(case_id):
        return named[1], True
    stem, serial, counted = case_id, False, False
    while match := _LAST_WORD.fullmatch(stem):
        stem, serial, counted = match[1], serial or bool(match[2]), counted or bool(match[2] or match[3])
    # Words before a number name a kind of case, not a person: pancreas_ct_01 and site2_scan_01.
    if counted and (not re.search(r"\d", stem) or _NO_PATIENT.fullmatch(stem)):
        return case_id, False
    return stem, serial


def _put_counted(stem_of: dict[str, tuple[str, bool]]) -> tuple[str, str] | None:
    """Put names together whose last number counts up anew for each stem; return two of those that are left in doubt."""
    numbers: dict[str, dict[str, int]] = {}
    for case_id, (stem, _) in stem_of.items():
        match = _COUNTED.fullmatch(case_id)
        if stem == case_id and match and not _UNIQUE.search(case_id) and not _NO_PATIENT.fullmatch(match[1]):
            numbers.setdefault(match[1], {})[case_id] = int(match[2])
    several = {stem: list(found) for stem, found in numbers.items() if len(found) > 1}
    if not several:
        return None
    first = min(number for found in numbers.values() for number in found.values())
    anew = first <= 1 and all(_counts_up(found, first) for found in numbers.values())
    # Many with few each are patients with their scans; few with many each, sites with their patients.
    if anew and len(numbers) > max(map(len, several.values())):
        stem_of.update({case_id: (stem, False) for stem, cases in several.items() for case_id in cases})
        return None
    one, other, *_ = next(iter(several.values()))
    return (one, other) if len(numbers) > 1 else None


def _counts_up(found: Mapping[str, int], first: int) -> bool:
    return sorted(found.values()) == list(range(first, first + len(found)))
