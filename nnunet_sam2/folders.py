"""nnU-Net's three folders and the dataset folders in them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nnunet_sam2.errors import InputError

MOST_LETTERS = 120
"""Letters of a dataset's name: file systems take 255 bytes, and names of temporary files are longer than ours."""

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True, kw_only=True)
class DatasetFolders:
    """Name one dataset's folders under ``nnUNet_raw``, ``nnUNet_preprocessed`` and ``nnUNet_results``."""

    name: str
    raw: Path
    preprocessed: Path
    results: Path

    @property
    def dataset_id(self) -> int:
        """Return the number in ``DatasetXXX_Name``."""
        return int(self.name[7:10])


def nnunet_roots() -> tuple[Path, Path, Path]:
    """Read the folders from the environment; raise `InputError` with the export lines where one is missing."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        lines = "; ".join(f"export {name}=/path/to/{name}" for name in missing)
        raise InputError(f"the environment does not say where nnU-Net keeps its data. Set: {lines}")
    raw, preprocessed, results = (Path(os.environ[name]).expanduser() for name in VARIABLES)
    for name, path in zip(VARIABLES, (raw, preprocessed, results), strict=True):
        if not path.is_absolute():
            raise InputError(f"{name}={path} is a relative path; set it to an absolute one")
    return raw, preprocessed, results


def new_dataset_folders(dataset_id: int, name: str) -> DatasetFolders:
    """Name the folders of a dataset that need not exist yet."""
    if not 1 <= dataset_id <= 999:
        raise InputError(f"dataset id {dataset_id} is out of range; nnU-Net takes 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or "__" in name:
        raise InputError(f"dataset name {name!r}: use letters, digits, single '_' and '-'")
    if len(name) > MOST_LETTERS:
        raise InputError(f"dataset name {name[:20]}... has {len(name)} letters; at most {MOST_LETTERS} are taken")
    raw, preprocessed, results = nnunet_roots()
    full = f"Dataset{dataset_id:03d}_{name}"
    return DatasetFolders(name=full, raw=raw / full, preprocessed=preprocessed / full, results=results / full)


def find_dataset(dataset: str | int) -> DatasetFolders:
    """Find a dataset in ``nnUNet_raw`` by its id or its name ``DatasetXXX_Name``."""
    raw, preprocessed, results = nnunet_roots()
    text = str(dataset)
    if not re.fullmatch(r"[0-9]{1,3}|Dataset[0-9]{3}_[A-Za-z0-9_.-]+", text):
        raise InputError(f"dataset {text!r} is neither an id, 1 to 999, nor a name such as Dataset501_Liver")
    pattern = f"Dataset{int(text):03d}_*" if text.isdecimal() else text
    found = sorted(p.name for p in raw.glob(pattern) if p.is_dir()) if raw.is_dir() else []
    if not found:
        raise InputError(f"no dataset {text} in {raw}; make one with: nnunet_sam2 convert SOURCE -d ID -n NAME")
    if len(found) > 1:
        raise InputError(f"dataset {text} is not unique in {raw}: {', '.join(found)}; remove or renumber one")
    return DatasetFolders(
        name=found[0], raw=raw / found[0], preprocessed=preprocessed / found[0], results=results / found[0]
    )
