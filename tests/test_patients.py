"""Patients by pattern and by name."""

from __future__ import annotations

import pytest

from nnunet_sam2.cohort.patients import patients_of
from nnunet_sam2.errors import InputError

TOGETHER = {
    "frames": ["patient001_frame01", "patient001_frame12 = patient001", "patient002_frame01 !"],
    "BIDS": ["sub-01_ses-02_T1w", "sub-01_ses-01_T1w = sub-01", "sub-A2_ses-01_T1w !"],
    "BIDS runs": ["sub-OAS30001_run-01_bold", "sub-OAS30001_run-02_bold = sub-OAS30001"],
    "BraTS": ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001 = BraTS-GLI-00001", "BraTS-GLI-00002-000 !"],
    "timepoints": ["P01_T1", "P01_T2 = P01", "P02_T1 !"],
    "time zero": ["A7-t0", "A7-t1 = A7", "B7-t0 !"],
    "phases": ["A0S9V9_sa_ED", "A0S9V9_sa_ES = A0S9V9"],
    "views": ["001_SA_ED", "001_LA_ES = 001", "002_SA_ED !"],
    "names": ["smith_pre", "smith_post = smith", "jones_pre !"],
    "baseline": ["K3_baseline", "K3_followup2 = K3"],
    "visits": ["ID17_visit_1", "ID17_visit_02 = ID17", "ID18_visit_1 !"],
    "months": ["002_S_0295_bl", "002_S_0295_m12 = 002_S_0295", "002_S_0413_bl !"],
    "scanner sessions": ["OAS1_0001_MR1", "OAS1_0001_MR2 = OAS1_0001"],
    "slices": [f"vol12_slice{i:03d}{' = vol12' if i else ''}" for i in range(40)],
    "sides": ["Mass_P_00001_LEFT_CC", "Mass_P_00001_RIGHT_MLO = Mass_P_00001", "Mass_P_00002_LEFT_CC !"],
    "a number counts up anew": ["12_1", "12_2 = 12", "13_1 !", "14_1 !"],
    "the first has no word": ["ID4", "ID4_post = ID4"],
}
"""Names of which the first and those with ``=`` are one patient's, who is then named; those with ``!`` are others."""

APART = {
    "numbers": ["case_001", "case_002", "case0", "case1"],
    "one word": ["img0001", "img0002"],
    "a set's name": ["ABD_LYMPH_001", "ABD_LYMPH_002"],
    "TCIA": ["LUNG1-001", "LUNG1-002", "LUNG1-003"],
    "TCIA with words": ["LIDC-IDRI-0001", "LIDC-IDRI-0002"],
    "organs": ["liver_12", "liver_13", "la_003", "la_004", "prostate_00", "prostate_01"],
    "large sets": ["amos_0001", "amos_0002", "s0011", "s0012", "volume-10", "volume-11"],
    "identifiers": ["1.2.840.113619.2.55.1", "1.2.840.113619.2.55.2"],
    "UUIDs": ["550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440001"],
    "a kind of picture and a number": ["pancreas_ct_001", "pancreas_ct_002", "scan_001", "scan_002", "t1_01", "t1_02"],
    "kinds with few digits": ["prostate_mr_01", "prostate_mr_02", "phase_1", "phase_2"],
    "parts of a set": ["mr_train_1001", "mr_train_1002", "site2_scan_01", "site2_scan_02"],
    "sites and people": ["002_S_0295", "002_S_0413"],
    "more scans than a person has": [f"UCSF1_mr_{i:02d}" for i in range(40)],
    "people of the generated cohort": ["subject_000", "subject_001"],
}


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_scans_of_one_patient_are_known_by_their_names(names: list[str]) -> None:
    ids = [name.split(" ")[0] for name in names]
    (patient,) = {name.split(" = ")[1] for name in names if " = " in name}
    found = patients_of(ids, None)
    assert {case_id for case_id, who in found.of.items() if who == patient} == {
        name.split(" ")[0] for name in names if "!" not in name
    }
    assert len({found.of[name.split(" ")[0]] for name in names if "!" in name}) == sum("!" in name for name in names)
    assert found.grouped
    assert "--patient-pattern" in (found.note or "")


@pytest.mark.parametrize("names", APART.values(), ids=APART)
def test_names_that_only_count_are_a_patient_each(names: list[str]) -> None:
    found = patients_of(names, None)
    assert found.of == {name: name for name in names}
    assert not found.grouped
    assert found.note is None


@pytest.mark.parametrize(
    "names",
    [["TCGA-02-0006", "TCGA-02-0009", "TCGA-06-0001"], ["01_001", "01_002", "01_003", "02_001", "02_002"]],
    ids=["the last number does not count up", "few with many each"],
)
def test_names_in_doubt_stay_apart_and_are_told(names: list[str]) -> None:
    found = patients_of(names, None)
    assert len(set(found.of.values())) == len(names)
    assert f"{names[0]} and {names[1]} are taken for two patients'" in (found.note or "")
    assert "--patient-pattern" in (found.note or "")


def test_a_case_that_shares_its_patient_with_none_keeps_its_name() -> None:
    assert patients_of(["patient001_frame01", "patient002_frame01"], None).of == {
        "patient001_frame01": "patient001_frame01",
        "patient002_frame01": "patient002_frame01",
    }


def test_the_pattern_settles_what_names_suggest() -> None:
    names = ["P01_T1", "P01_T2"]
    apart = patients_of(names, "^(.*)$")
    assert apart.of == {name: name for name in names}
    assert apart.note is None
    assert set(patients_of(["a-1", "a-2"], r"^(?P<patient>\w)").of.values()) == {"a"}
    with pytest.raises(InputError, match="does not match case"):
        patients_of(names, "^X")
