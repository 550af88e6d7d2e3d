"""A cohort is read when its file has changed, and not before."""

from __future__ import annotations

import json
from dataclasses import replace

from nnunet_sam2.cohort.cohort import COHORT_FILE, Cohort
from nnunet_sam2.folders import DatasetFolders


def test_an_unchanged_cohort_is_read_once(fresh_dataset: DatasetFolders) -> None:
    assert Cohort.load(fresh_dataset.raw) is Cohort.load(fresh_dataset.raw)


def test_what_another_process_writes_is_seen_at_once(fresh_dataset: DatasetFolders) -> None:
    first = Cohort.load(fresh_dataset.raw)
    replace(first, provenance={**first.provenance, "note": "saved"}).save()
    assert Cohort.load(fresh_dataset.raw).provenance["note"] == "saved"
    path = fresh_dataset.raw / COHORT_FILE
    value = json.loads(path.read_text())
    value["provenance"]["note"] = "again"  # as long as before, and in the same file
    path.write_text(json.dumps(value))
    assert Cohort.load(fresh_dataset.raw).provenance["note"] == "again"
