"""How a case's labels came about, in words, from the records that lie where a run puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case
from nnunet_sam2.labelling.explain.cases import Found, as_text
from nnunet_sam2.labelling.records import find_rounds, record_path
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.storage import read_json

_MOST_CHARACTERS = 8_000


class Stories:
    """Tell of each case which supports, prompts and members made its labels; the rounds' records are read once."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files
        self._rounds: tuple[tuple[Path, Any], ...] = tuple(
            (path, read_json(path)) for path in find_rounds(files.folder)
        )

    def of(self, case: Case) -> str:
        """Return the story of a case, at most a few thousand characters; empty where it has no record."""
        prompted = sorted(self._files.folder.glob("r[0-9]*/prompted"))
        records = (self._files.record_file(case), *(record_path(folder, case.case_id) for folder in prompted))
        paths = [path for path in records if path is not None and path.is_file()]
        if not paths:
            return ""
        found = Found(
            case_id=case.case_id,
            folder=self._files.folder,
            records=tuple((path, read_json(path)) for path in paths),
            rounds=tuple((path, fused) for path, fused in self._rounds if case.case_id in fused.get("voxels", {})),
        )
        text = as_text(found, self._files.cohort)
        if len(text) <= _MOST_CHARACTERS:
            return text
        return text[:_MOST_CHARACTERS].rsplit("\n", 1)[0] + (
            f"\n... the rest: nnunet_sam2 label -d {self._files.folders.dataset_id} --explain {case.case_id}"
        )
