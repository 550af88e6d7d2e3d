"""Which case plays which role: held-out test cases and hidden labels are drawn by patient, with a seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunet_sam2.errors import InputError


def choose_cases(
    patient_of: Mapping[str, str], count: int, rng: np.random.Generator, *, what: str, told: str = ""
) -> set[str]:
    """Choose exactly ``count`` cases as whole patients, in random order of the patients.

    A patient that would make the count unreachable is passed over. Raises `InputError` naming the nearest counts where
    no set of whole patients gives ``count``, with what is ``told`` of how the patients were found.
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
            f"choose from; possible next to it: {near or 'nothing'}{told}"
        )
    chosen: set[str] = set()
    left = count
    for i, patient in enumerate(order):
        size = len(cases_of[patient])
        if size <= left and left - size in reachable[i + 1]:
            chosen.update(cases_of[patient])
            left -= size
    return chosen
