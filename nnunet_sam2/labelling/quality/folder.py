"""Features of label maps that lie in a folder, such as a student's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.class_groups import GroupProbe
from nnunet_sam2.labelling.fusion import as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import of_other_patients
from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.features import CaseFeatures
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import quality_record, read_features
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.storage import file_hash, read_json, value_hash, write_json
from nnunet_sam2.support.library import PROBABILITIES, load_query, load_supports, read_probabilities
from nnunet_sam2.support.showing import Showing, cohort_slice_axis
from nnunet_sam2.volumes import read_label


def measure_folder(
    cohort: Cohort,
    case_ids: Sequence[str],
    *,
    support_ids: Sequence[str],
    backend: Sam2Backend,
    labels: Path,
    out: Path,
    options: QualityOptions | None = None,
) -> tuple[Path, ...]:
    """Write ``OUT/CASE.json`` with the features of ``LABELS/CASE<ending>`` and return the files.

    ``LABELS/probabilities/CASE.npz`` must lie beside. A case that was measured from the same files is not done again.
    """
    options = options or QualityOptions()
    slice_axis, showing = cohort_slice_axis(cohort), Showing(cohort=cohort, support_ids=tuple(support_ids))
    known = [_identity(cohort, cohort.case(case_id)) for case_id in support_ids]
    keys = {}
    for case_id in case_ids:
        made_from = [labels / f"{case_id}{cohort.file_ending}", labels / PROBABILITIES / f"{case_id}.npz"]
        keys[case_id] = value_hash(
            [
                options.looked_at,
                cohort.case(case_id).patient,
                known,
                backend.spec.checkpoint_hash,
                slice_axis,
                showing.identity(cohort.case(case_id)),
                *(file_hash(path) for path in made_from),
            ]
        )
    pending = [case_id for case_id in case_ids if _key(out / f"{case_id}.json") != keys[case_id]]
    if pending:
        supports = load_supports(cohort, support_ids, backend, slice_axis=slice_axis, showing=showing)
        probe = GroupProbe(cohort.class_values, options)
        for case_id in track(pending, what="judging labels", total=len(pending)):
            case = cohort.case(case_id)
            query = load_query(cohort, case, backend, slice_axis=slice_axis, showing=showing)
            label_zyx, _ = read_label(labels / f"{case_id}{cohort.file_ending}")
            prob_czyx = read_probabilities(labels / PROBABILITIES / f"{case_id}.npz")
            turn = showing.turn(case)
            pseudo = PseudoLabel(
                label_zyx=turn.apply(label_zyx),
                confidence_zyx=np.zeros(0, np.float32),
                prob_czyx=normalised(as_probability(turn.apply(prob_czyx))),
            )
            features = probe.measure(query, pseudo, of_other_patients(query, supports) or supports)
            write_json(
                out / f"{case_id}.json",
                {"case": case_id, "input_key": keys[case_id], "quality": quality_record(features, None)},
            )
    return tuple(out / f"{case_id}.json" for case_id in case_ids)


def read_folder(out: Path, case_ids: Sequence[str]) -> dict[str, CaseFeatures]:
    """Read what `measure_folder` wrote."""
    return {case_id: read_features(read_json(out / f"{case_id}.json")) for case_id in case_ids}


def _identity(cohort: Cohort, case: Case) -> list[Any]:
    identity = [case.case_id, case.patient, file_hash(cohort.label_path(case))]
    return identity if case.known_classes is None else [*identity, case.known_classes]


def _key(path: Path) -> Any:
    try:
        return read_json(path).get("input_key") if path.is_file() else None
    except (InputError, AttributeError):
        return None
