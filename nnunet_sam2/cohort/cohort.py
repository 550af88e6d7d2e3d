"""The cohort: which case plays which role, whose it is, and what exactly its voxels are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.storage import read_json, write_json

FORMAT_VERSION = 1
COHORT_FILE = "cohort.json"
LABELLED_IMAGES, LABELS = "imagesTr", "labelsTr"
UNLABELLED_IMAGES, HIDDEN_LABELS = "imagesUn", "labelsHidden"
TEST_IMAGES, TEST_LABELS = "imagesTs", "labelsTs"
ADDED_LABELS = "labelsAdded"
"""Folder of human labels that came after the dataset was made; no file in it is ever changed."""
IGNORE = "ignore"
"""Name of nnU-Net's ignore label in the label table."""


class Role(str, Enum):
    """Say what a case may be used for."""

    LABELLED = "labelled"
    UNLABELLED = "unlabelled"
    TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Record a human label that came after the dataset was made (``nnunet_sam2 review --import``)."""

    label: str
    """Its file, relative to the dataset's raw folder; the name carries the hash."""
    sha256: str
    """Hash of that file."""
    time: str
    """When it came, ISO 8601, UTC."""
    source: str
    """Name of the file that was given."""
    classes: tuple[int, ...] | None = None
    """The classes that it answers for; None where it answers for every voxel."""

    def to_json(self) -> dict[str, Any]:
        """Return the addition as a JSON value."""
        return {
            "label": self.label,
            "sha256": self.sha256,
            "time": self.time,
            "source": self.source,
            "classes": None if self.classes is None else list(self.classes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Addition:
        """Rebuild an addition from `to_json`."""
        classes = value["classes"]
        return cls(**{**value, "classes": None if classes is None else tuple(classes)})


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describe one case; paths are relative to the dataset's raw folder."""

    case_id: str
    role: Role
    patient: str
    images: tuple[str, ...]
    label: str | None
    hidden_label: str | None = None
    """Label that exists but was hidden to make a benchmark; nothing but evaluation reads it."""
    geometry: Geometry
    voxel_hash: str
    added: Addition | None = None
    """The human label that came later; the case was unlabelled before, and plans and validation do not know it."""

    def to_json(self) -> dict[str, Any]:
        """Return the case as a JSON value."""
        return {
            "id": self.case_id,
            "role": self.role.value,
            "patient": self.patient,
            "images": list(self.images),
            "label": self.label,
            "hidden_label": self.hidden_label,
            "geometry": self.geometry.to_json(),
            "voxel_hash": self.voxel_hash,
            **({"added": self.added.to_json()} if self.added else {}),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Case:
        """Rebuild a case from `to_json`."""
        return cls(
            case_id=value["id"],
            role=Role(value["role"]),
            patient=value["patient"],
            images=tuple(value["images"]),
            label=value["label"],
            hidden_label=value.get("hidden_label"),
            geometry=Geometry.from_json(value["geometry"]),
            voxel_hash=value["voxel_hash"],
            added=Addition.from_json(value["added"]) if value.get("added") else None,
        )

    @property
    def as_planned(self) -> Case:
        """Return the case as it was when the dataset was made."""
        if self.added is None or self.role is not Role.LABELLED:
            return self
        return replace(self, role=Role.UNLABELLED, label=None)


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Hold all cases of a dataset with its channels and label table."""

    name: str
    root: Path
    channels: tuple[str, ...]
    labels: dict[str, int | list[int]]
    """nnU-Net's label table: name to value, or to the list of values of a region."""
    regions_class_order: tuple[int, ...] | None = None
    file_ending: str
    cases: tuple[Case, ...]
    provenance: dict[str, Any]
    """How the cohort was made: source, layout, options, seed."""

    def with_role(self, role: Role) -> tuple[Case, ...]:
        """Return the cases of one role, in cohort order."""
        return tuple(case for case in self.cases if case.role is role)

    @property
    def labelled(self) -> tuple[Case, ...]:
        """Return the cases with human labels that may be learned from."""
        return self.with_role(Role.LABELLED)

    @property
    def unlabelled(self) -> tuple[Case, ...]:
        """Return the cases that want pseudo-labels."""
        return self.with_role(Role.UNLABELLED)

    @property
    def test(self) -> tuple[Case, ...]:
        """Return the cases that nothing may learn from."""
        return self.with_role(Role.TEST)

    def as_planned(self) -> Cohort:
        """Return the cohort as it was when the dataset was made: human labels that came later are unlabelled cases.

        Plans, folds and the stages of a run follow this one, so that what was done before stays valid; a run learns the
        labels that came later from its next round on.
        """
        return replace(self, cases=tuple(case.as_planned for case in self.cases))

    @property
    def ignore_value(self) -> int | None:
        """Return the value of nnU-Net's ignore label, or None."""
        value = self.labels.get(IGNORE)
        return value if isinstance(value, int) else None

    @property
    def class_values(self) -> tuple[int, ...]:
        """Return the integer values that stand for an object in a label map: neither background nor ignore."""
        values: set[int] = set()
        for name, value in self.labels.items():
            if name != IGNORE:
                values.update(value if isinstance(value, list) else [value])
        return tuple(sorted(values - {0}))

    def case(self, case_id: str) -> Case:
        """Return one case by its id."""
        for case in self.cases:
            if case.case_id == case_id:
                return case
        raise InputError(f"no case {case_id} in {self.root / COHORT_FILE}")

    def image_paths(self, case: Case) -> tuple[Path, ...]:
        """Return the absolute image files of a case, one a channel (a 2D RGB image is one file)."""
        return tuple(self.root / image for image in case.images)

    def label_path(self, case: Case) -> Path:
        """Return the human label file of a labelled or test case."""
        if case.label is None:
            raise InputError(f"case {case.case_id} of {self.name} has no label")
        return self.root / case.label

    def save(self) -> None:
        """Write ``cohort.json`` into the dataset's raw folder."""
        write_json(
            self.root / COHORT_FILE,
            {
                "format": FORMAT_VERSION,
                "name": self.name,
                "channels": list(self.channels),
                "labels": self.labels,
                "regions_class_order": self.regions_class_order and list(self.regions_class_order),
                "file_ending": self.file_ending,
                "provenance": self.provenance,
                "cases": [case.to_json() for case in self.cases],
            },
        )

    @classmethod
    def load(cls, root: Path) -> Cohort:
        """Read ``cohort.json`` from a dataset's raw folder."""
        path = root / COHORT_FILE
        if not path.is_file():
            raise InputError(f"{path} is missing; make the dataset with: nnunet_sam2 convert SOURCE -d ID -n NAME")
        value = read_json(path)
        if value.get("format") != FORMAT_VERSION:
            raise InputError(f"{path} has format {value.get('format')!r}, this version reads {FORMAT_VERSION}")
        order = value.get("regions_class_order")
        return cls(
            name=value["name"],
            root=root,
            channels=tuple(value["channels"]),
            labels=value["labels"],
            regions_class_order=tuple(order) if order else None,
            file_ending=value["file_ending"],
            cases=tuple(Case.from_json(case) for case in value["cases"]),
            provenance=value["provenance"],
        )
