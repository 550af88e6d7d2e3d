"""Cases as few-shot labelling sees them: the query that wants a label, the support that has one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.sam2.protocol import Embeddings


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """Hold the volume that wants a label."""

    case_id: str
    frames: Frames
    embeddings: Embeddings
    geometry: Geometry
    student_prob_czyx: np.ndarray | None = None
    """The student's probabilities on the query's grid, background first, where a round has a student."""
    patient: str | None = None
    """Whose scan it is; None where the case is all there is of its patient."""

    @property
    def patient_id(self) -> str:
        """Return whose scan it is, by a name that no other patient has."""
        return self.patient or self.case_id


@dataclass(frozen=True, kw_only=True, eq=False)
class Support:
    """Hold a labelled volume that a strategy may learn from."""

    case_id: str
    frames: Frames
    embeddings: Embeddings
    label_zyx: np.ndarray
    """The human label map, unsigned integers, on the volume's own grid."""
    geometry: Geometry
    ignore_value: int | None = None
    """Value of voxels that nobody has judged: they are evidence neither for a class nor for the background."""
    student_prob_czyx: np.ndarray | None = None
    """The student's probabilities for this case, where there are some: lets prompting be checked on it."""
    annotated: tuple[int, ...] | None = None
    """Class values that the label answers for; of the others it says nothing. None: all. Strategies are never given
    a support that is annotated in part; see `labelling.class_groups`."""
    patient: str | None = None
    """Whose scan it is; None where the case is all there is of its patient."""

    def __post_init__(self) -> None:
        if self.label_zyx.shape != self.geometry.shape_zyx:
            raise ValueError(
                f"support {self.case_id}: label shape {self.label_zyx.shape} against {self.geometry.shape_zyx}"
            )

    def answers_for(self, value: int) -> bool:
        """Say whether the label was annotated for a class."""
        return self.annotated is None or value in self.annotated

    @property
    def patient_id(self) -> str:
        """Return whose scan it is, by a name that no other patient has."""
        return self.patient or self.case_id

    def as_query(self) -> Query:
        """Return the case as a query, for checks that leave its patient out of the supports."""
        return Query(
            case_id=self.case_id,
            frames=self.frames,
            embeddings=self.embeddings,
            geometry=self.geometry,
            student_prob_czyx=self.student_prob_czyx,
            patient=self.patient,
        )
