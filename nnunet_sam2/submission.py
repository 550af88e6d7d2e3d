"""Predicted label files as they are handed in, held against the cases that they are for: all faults in one go."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.archives import is_archive, only_folder, unpack
from nnunet_sam2.files.label_tables import by_names, read_label_table
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.progress import track
from nnunet_sam2.volumes import as_label, read_stored

MISSING, EXTRA, BY_PRODUCT, FOLDER, UNREADABLE, TYPE, VALUES, GEOMETRY = (
    "missing case",
    "extra file",
    "by-product",
    "wrong folder",
    "unreadable file",
    "wrong number type",
    "wrong values",
    "wrong geometry",
)
UNFILTERED = "unfiltered"
"""Folder of what `nnunet_sam2 predict --keep-largest` was given by the network."""

_SOURCES = ("sam2", "student", "confidence", "probabilities")
"""Folders that `nnunet_sam2 predict --with-sam2` writes beside the label files."""

_BY_PRODUCTS = ("predict.log", "quality.json", "dataset.json", "plans.json", "predict_from_raw_data_args.json")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Hold one fault of a submission."""

    kind: str
    file: str
    """Path within the submission."""
    text: str

    def to_json(self) -> dict[str, str]:
        """Return the problem as a JSON value."""
        return asdict(self)


def check_submission(
    submission: Path,
    cases: Mapping[str, Geometry],
    *,
    ending: str,
    root: str = "",
    allowed: Collection[int] | None = None,
    names: Mapping[str, int] | None = None,
) -> list[Problem]:
    """List every fault of a folder or zip of label files: one file a case, called ``root/CASE`` with ``ending``.

    A label file has whole numbers as its number type, holds no value but ``allowed``, lies on its image's grid, and has
    no label table that gives its values other names than ``names`` declares: who reads it may go by the values alone.
    Raises `InputError` where the submission cannot be looked into at all.
    """
    with _opened(submission) as folder:
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_symlink() or not path.is_dir()
        }
        expected = {str(PurePosixPath(root) / f"{case_id}{ending}"): case_id for case_id in sorted(cases)}
        problems = _misplaced(files, expected)
        for name, case_id in track(expected.items(), what="checking", total=len(expected)):
            if name in files:
                problem = _check_file(files[name], name, cases[case_id], allowed, names)
                problems += [problem] if problem else []
            else:
                problems.append(Problem(kind=MISSING, file=name, text=f"case {case_id} has no label file"))
        inside = only_folder(folder)
        if inside != folder and not any(name in files for name in expected):
            there, wanted = inside.relative_to(folder).as_posix(), root or "the top"
            text = f"the label files lie in {there}, wanted is {wanted}"
            problems.insert(0, Problem(kind=FOLDER, file=there, text=text))
    return problems


@contextmanager
def _opened(submission: Path) -> Iterator[Path]:
    if submission.is_dir():
        yield submission
        return
    if not submission.exists():
        raise InputError(f"{submission} does not exist; name the folder or the zip of the label files")
    if not is_archive(submission):
        raise InputError(f"{submission} is neither a folder nor a .zip or .tar; name the one that is handed in")
    with tempfile.TemporaryDirectory(prefix="nnunet_sam2_") as name:
        place = Path(name) / "submission"
        unpack(submission, place, keep_hidden=True)
        yield place


def _is_by_product(name: str) -> bool:
    """Say whether `nnunet_sam2 predict` or nnU-Net itself writes this file beside the label files."""
    path = PurePosixPath(name)
    if path.parts[0] in (UNFILTERED, *_SOURCES):
        return True
    return path.name in _BY_PRODUCTS or (path.suffix == ".json" and path.parent.name == "records")


def _misplaced(files: Mapping[str, Path], expected: Mapping[str, str]) -> list[Problem]:
    file_names = {PurePosixPath(name).name: name for name in expected}
    problems = []
    for name in files:
        path = PurePosixPath(name)
        if name in expected:
            continue
        if "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store":
            text = "macOS put it there; pack without (zip -X, or remove it from the zip)"
            problems.append(Problem(kind=EXTRA, file=name, text=text))
        elif _is_by_product(name):
            problems.append(
                Problem(kind=BY_PRODUCT, file=name, text="written beside the labels; leave it out of the zip")
            )
        elif path.name in file_names:
            wanted = file_names[path.name]
            problems.append(Problem(kind=FOLDER, file=name, text=f"wanted is {wanted}"))
        else:
            problems.append(Problem(kind=EXTRA, file=name, text="no case is called so; remove or rename it"))
    return problems


def _check_file(
    path: Path, name: str, geometry: Geometry, allowed: Collection[int] | None, names: Mapping[str, int] | None
) -> Problem | None:
    try:
        array, own = read_stored(path, indices=True)
    except InputError as error:
        return Problem(kind=UNREADABLE, file=name, text=str(error).replace(str(path), name))
    if array.dtype.kind not in "iu":
        return Problem(kind=TYPE, file=name, text=f"{array.dtype}, wanted are whole numbers (uint8 or uint16)")
    if difference := geometry.mismatch(own):
        return Problem(kind=GEOMETRY, file=name, text=f"its image and it differ in {difference}")
    try:
        if names and (segments := read_label_table(path)):
            _, renamed, _ = by_names(path, array, segments, names)
            if renamed:
                text = f"its label table gives its values other names than declared ({renamed}); save it without one"
                return Problem(kind=VALUES, file=name, text=text)
        as_label(path, array, allowed=allowed)
    except InputError as error:
        return Problem(kind=VALUES, file=name, text=str(error).replace(str(path), name).split(";")[0])
    return None
