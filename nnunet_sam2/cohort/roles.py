"""Which case plays which role: held-out test cases and hidden labels are drawn by patient, with a seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_sam2.errors import InputError

_SEVERAL_A_PATIENT = re.compile(
    r"(.+?)[_-](?:frame|ed|es|time|visit|session|ses|scan|slice|tp|run|t|s)[_-]?\d*", re.IGNORECASE
)


def patients_of(case_ids: Sequence[str], pattern: str | None) -> dict[str, str]:
    """Name each case's patient: the pattern's group ``patient``, its first group, or its match; else the case's id."""
    if pattern is None:
        return {case_id: case_id for case_id in case_ids}
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


def suspect_patients(case_ids: Sequence[str]) -> tuple[str, str] | None:
    """Return two cases whose names look like one patient's (``p1_frame01``, ``p1_frame12``), or None."""
    seen: dict[str, str] = {}
    for case_id in sorted(case_ids):
        match = _SEVERAL_A_PATIENT.fullmatch(case_id)
        if match:
            if match[1] in seen:
                return seen[match[1]], case_id
            seen[match[1]] = case_id
    return None


def choose_cases(patient_of: Mapping[str, str], count: int, rng: np.random.Generator, *, what: str) -> set[str]:
    """Choose exactly ``count`` cases as whole patients, in random order of the patients.

    A patient that would make the count unreachable is passed over. Raises `InputError` naming the nearest counts where
    no set of whole patients gives ``count``.
    """
    cases_of: dict[str, list[str]] = {}
    for case_id, patient in sorted(patient_of.items()):
        cases_of.setdefault(patient, []).append(case_id)
    order = [sorted(cases_of)[i] for i in rng.permutation(len(cases_of))]
    # reachable[i]: the counts that whole patients from position i on can add up to.
    reachable: list[set[int]] = [set() for _ in order] + [{0}]
    for i in range(len(order) - 1, -1, -1):
        reachable[i] = reachable[i + 1] | {n + len(cases_of[order[i]]) for n in reachable[i + 1]}
    if count not in reachable[0]:
        lower = max((n for n in reachable[0] if n < count), default=None)
        upper = min((n for n in reachable[0] if n > count), default=None)
        near = " or ".join(str(n) for n in (lower, upper) if n)
        raise InputError(
            f"{what} {count} cannot be met with whole patients: {len(patient_of)} cases of {len(order)} patients to "
            f"choose from; possible next to it: {near or 'nothing'}"
        )
    chosen: set[str] = set()
    left = count
    for i, patient in enumerate(order):
        size = len(cases_of[patient])
        if size <= left and left - size in reachable[i + 1]:
            chosen.update(cases_of[patient])
            left -= size
    return chosen
