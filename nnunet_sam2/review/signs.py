"""What speaks for looking at each case of a run, from its account and the records of its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_sam2.cohort.cohort import Role
from nnunet_sam2.report.account import CaseAccount, ClassQuality, RunAccount
from nnunet_sam2.report.gather import voxel_size
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.review.order import Signs, unlikeness


def signs_of_run(files: RunFiles, account: RunAccount) -> dict[str, dict[int, Signs]]:
    """Gather the signs of every case that the run labels, by class; one that is neither drawn nor missed is absent."""
    known = _labelled_volumes(files, account)
    found = {}
    for case in account.unlabelled:
        known_case = files.cohort.case(case.case_id)
        record = files.record(known_case) or {}
        size = voxel_size(files.cohort, known_case)
        found[case.case_id] = {
            q.value: Signs(
                doubt=None if q.estimate is None else 1.0 - q.estimate,
                change=q.change,
                disagreement=_disagreement(record, q.value),
                unlike=unlikeness(q.voxels * size, known.get(q.value, [])),
                missing=q.value in case.missing,
            )
            for q in case.classes
            if _is_there(q, case)
        }
    return found


def _is_there(q: ClassQuality, case: CaseAccount) -> bool:
    return bool(q.voxels or q.change or q.value in case.missing)


def _labelled_volumes(files: RunFiles, account: RunAccount) -> dict[int, list[float]]:
    """Return the volumes of each class in the labelled cases, as SAM 2 drew them: their records are there anyway."""
    found: dict[int, list[float]] = {}
    for case in account.cases:
        if case.role is Role.LABELLED:
            size = voxel_size(files.cohort, files.cohort.case(case.case_id))
            for q in case.classes:
                found.setdefault(q.value, []).append(q.voxels * size)
    return found


def _disagreement(record: Mapping[str, Any], value: int) -> float | None:
    """Return how far SAM 2's members disagree; where there is one, those that the single supports would have made."""
    features = ((record.get("quality") or {}).get("features") or {}).get(str(value)) or {}
    single = list((features.get("agreement") or {}).values())
    for agreement in ((record.get("agreement") or {}).get(str(value)), features.get("members")):
        if agreement is not None:
            return 1.0 - float(agreement)
    return 1.0 - sum(single) / len(single) if single else None
