"""What may be mended in an input file, and what was: nothing is, unless the user asks for it by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nnunet_sam2.errors import InputError

ERROR = "error"
NONFINITE_CHOICES = (ERROR, "zero", "min")
FORM_CHOICES = ("sform", "qform")


@dataclass(frozen=True, kw_only=True)
class ReadPolicy:
    """Say what is mended while reading; the default refuses."""

    nonfinite: str = ERROR
    """NaN and infinite voxels of an image: ``error``, or set to ``zero`` or to the file's least finite value (``min``).
    """
    fix_geometry: bool = False
    """Replace axes that are not at right angles by the nearest ones that are."""
    form: str | None = None
    """Which of a NIfTI file's two placements to believe where they contradict each other: ``sform`` or ``qform``."""

    one_hot: bool = False
    """Merge a label's volumes of 0 and 1, one a class, into one label map."""

    def __post_init__(self) -> None:
        if self.nonfinite not in NONFINITE_CHOICES:
            raise InputError(f"--nan {self.nonfinite}: choose one of {', '.join(NONFINITE_CHOICES)}")
        if self.form not in (None, *FORM_CHOICES):
            raise InputError(f"--form {self.form}: choose one of {', '.join(FORM_CHOICES)}")


STRICT = ReadPolicy()


@dataclass(frozen=True, kw_only=True)
class Repairs:
    """Hold what was mended in one file."""

    nonfinite_voxels: int = 0
    nonfinite_set_to: str | None = None
    angle_degrees: float | None = None
    """Largest turn of an axis by which the axes were put at right angles."""
    moved_mm: float | None = None
    """How far a corner of the volume moved by that."""
    form: str | None = None
    form_difference_mm: float | None = None
    rounded_voxels: int = 0
    """Label voxels that were near a whole number, and are that now."""
    renamed_voxels: int = 0
    """Label voxels whose value was taken from the name that the file's own label table gives theirs."""
    renamed: str | None = None
    one_hot: str | None = None
    """Which of a label's volumes became which value."""

    def __bool__(self) -> bool:
        return self != Repairs()

    def to_json(self) -> dict[str, Any]:
        """Return what is not as it would be in a sound file."""
        return {key: value for key, value in asdict(self).items() if value}

    def notes(self, where: object) -> list[str]:
        """Say in a line each what was done to a file."""
        lines = []
        if self.nonfinite_voxels:
            lines.append(
                f"{where}: {self.nonfinite_voxels} NaN or infinite voxels were set to {self.nonfinite_set_to} (--nan)"
            )
        if self.angle_degrees is not None:
            lines.append(
                f"{where}: axes were turned by up to {self.angle_degrees:.3g} degrees to be at right angles, a corner "
                f"moved by {self.moved_mm:.3g} mm (--fix-geometry)"
            )
        if self.form is not None:
            lines.append(
                f"{where}: qform and sform lie {self.form_difference_mm:.1f} mm apart, the {self.form} was taken "
                "(--form)"
            )
        if self.rounded_voxels:
            lines.append(f"{where}: {self.rounded_voxels} label voxels were rounded to the whole number beside them")
        if self.one_hot is not None:
            lines.append(f"{where}: its volumes were merged into one label map (--one-hot: {self.one_hot})")
        if self.renamed is not None:
            lines.append(
                f"{where}: {self.renamed_voxels} label voxels were mapped by the names in its label table "
                f"({self.renamed})"
            )
        return lines
