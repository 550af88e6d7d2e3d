"""The cohort: which case plays which role, whose it is, and what exactly its voxels are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.names import checked_case_id, within_root
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
CT = "ct"
"""Name, in any case, of a channel of Hounsfield units, as nnU-Net has it."""
IGNORE = "ignore"
"""Name of nnU-Net's ignore label in the label table."""


_WAY_OUT = "convert the source again"


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
        within_root(value["label"])
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
    placed_hash: str | None = None
    """Hash of the voxels in patient order; None in a cohort of an earlier version."""
    file_hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file as it was written, by its path; empty in a cohort of an earlier version."""
    repairs: Mapping[str, Any] = field(default_factory=dict)
    """What the user had mended in the source's files, by file."""
    annotated: tuple[int, ...] | None = None
    """Class values that the dataset's own label of the case answers for, the others are unknown; None: all."""

    def to_json(self) -> dict[str, Any]:
        """Return the case as a JSON value."""
        optional = {
            "placed_hash": self.placed_hash,
            "file_hashes": dict(self.file_hashes),
            "repairs": dict(self.repairs),
            "annotated": self.annotated and list(self.annotated),
        }
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
            **{key: value for key, value in optional.items() if value},
        }

    @classmethod
    def from_json(cls, value: Any) -> Case:
        """Rebuild a case from `to_json`; raise `InputError` for an id or a path that this package would not write."""
        case_id = checked_case_id(value["id"])
        images = tuple(within_root(name) for name in value["images"])
        label, hidden = (
            None if value.get(key) is None else within_root(value[key]) for key in ("label", "hidden_label")
        )
        if not images:
            raise InputError(f"case {case_id} has no images")
        return cls(
            case_id=case_id,
            role=Role(value["role"]),
            patient=str(value["patient"]),
            images=images,
            label=label,
            hidden_label=hidden,
            geometry=Geometry.from_json(value["geometry"]),
            voxel_hash=str(value["voxel_hash"]),
            added=Addition.from_json(value["added"]) if value.get("added") else None,
            placed_hash=str(value["placed_hash"]) if value.get("placed_hash") else None,
            file_hashes={within_root(name): str(sha) for name, sha in value.get("file_hashes", {}).items()},
            repairs=dict(value.get("repairs", {})),
            annotated=tuple(int(v) for v in value.get("annotated") or ()) or None,
        )

    @property
    def known_classes(self) -> tuple[int, ...] | None:
        """Return the class values that the human label answers for, None for all: labels that came later are whole."""
        return None if self.added else self.annotated

    def answers_for(self, value: int) -> bool:
        """Say whether the human label answers for a class; where not, nobody knows where the class is."""
        return self.known_classes is None or value in self.known_classes

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
    dataset_hash: str | None = None
    """sha256 of ``dataset.json`` as it was written; None in a cohort of an earlier version."""

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
        near = get_close_matches(case_id, [case.case_id for case in self.cases], n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"the first of {len(self.cases)} is {self.cases[0].case_id}"
        )
        raise InputError(f"no case {case_id} in {self.root / COHORT_FILE}; {hint}")

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
                **({"dataset_hash": self.dataset_hash} if self.dataset_hash else {}),
                "cases": [case.to_json() for case in self.cases],
            },
        )

    @classmethod
    def load(cls, root: Path) -> Cohort:
        """Read ``cohort.json`` from a dataset's raw folder; unchanged since the last time, it is the same object."""
        path = root / COHORT_FILE
        if not path.is_file():
            raise InputError(f"{path} is missing; make the dataset with: nnunet_sam2 convert SOURCE -d ID -n NAME")
        stamp = _stamp(path)
        known = _loaded.get(path)
        if known is None or known[0] != stamp:
            # One at a time is enough: a process works on one dataset, and a large cohort is a large object.
            _loaded.clear()
            _loaded[path] = known = stamp, cls._read(path, root)
        return known[1]

    @classmethod
    def _read(cls, path: Path, root: Path) -> Cohort:
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT_VERSION:
            found = value.get("format") if isinstance(value, dict) else None
            raise InputError(f"{path} has format {found!r}, this version reads {FORMAT_VERSION}")
        try:
            cohort = cls(
                name=str(value["name"]),
                root=root,
                channels=tuple(str(name) for name in value["channels"]),
                labels=_checked_labels(value["labels"]),
                regions_class_order=tuple(int(v) for v in value.get("regions_class_order") or ()) or None,
                file_ending=str(value["file_ending"]),
                cases=tuple(Case.from_json(case) for case in value["cases"]),
                provenance=dict(value["provenance"]),
                dataset_hash=str(value["dataset_hash"]) if value.get("dataset_hash") else None,
            )
        except KeyError as error:
            raise InputError(f"{path} lacks the field {error}; {_WAY_OUT}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path} is damaged ({error}); {_WAY_OUT}") from None
        _refuse_leaks(path, cohort.cases)
        return cohort


_loaded: dict[Path, tuple[tuple[int, ...], Cohort]] = {}
"""The cohort that was read last, by its file, with the file's stamp: whoever writes it puts a new file in its place."""


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _checked_labels(value: Any) -> dict[str, int | list[int]]:
    labels = {str(name): entry for name, entry in value.items()}
    for name, entry in labels.items():
        for number in entry if isinstance(entry, list) else [entry]:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 65535:
                raise InputError(f"label {name} has value {entry!r}")
    return labels


def _refuse_leaks(path: Path, cases: Iterable[Case]) -> None:
    """Refuse two cases of one id, and one image or one patient on both sides of the test."""
    role_of_voxels: dict[str, Case] = {}
    folded: set[str] = set()
    tested: dict[str, set[bool]] = {}
    for case in (case.as_planned for case in cases):
        if case.case_id.lower() in folded:
            raise InputError(f"{path} names case {case.case_id} twice; {_WAY_OUT}")
        folded.add(case.case_id.lower())
        for key in filter(None, (case.voxel_hash, case.placed_hash)):
            twin = role_of_voxels.setdefault(key, case)
            if twin.role is not case.role:
                raise InputError(
                    f"{path}: {twin.case_id} ({twin.role.value}) and {case.case_id} ({case.role.value}) hold the same "
                    f"voxels; {_WAY_OUT}"
                )
        tested.setdefault(case.patient, set()).add(case.role is Role.TEST)
    leaked = sorted(patient for patient, sides in tested.items() if len(sides) > 1)
    if leaked:
        raise InputError(f"{path}: patient {leaked[0]} has cases both in test and in training; {_WAY_OUT}")
