"""Whatever became of a label file's own table, its values get the right names or it is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from small_source import GRID
from test_label_tables import AFNI, DECLARED, WORKBENCH, drawn, swapped, write_segments

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.repairs import STRICT
from nnunet_sam2.volumes import read_label_as, write_label

ITKSNAP = '# a description\n0 0 0 0 0 0 0 "Clear Label"\n1 255 0 0 1 1 1 "spleen"\n2 0 255 0 1 1 1 "liver"\n'
JSON = ['{"1": "spleen", "2": "liver"}', '{"labels": {"spleen": 1, "liver": 2}}']
ODD = [b"", b"\0", b'"', b"<", b">", b"=", b"\n", b"\xff", b"1", b"2", b"3", b"-", b"9" * 23, b"}", b" "]
MUTATIONS = 150


def _nrrd(path: Path) -> tuple[int, int]:
    write_segments(path, [swapped(drawn())], [("spleen", 1, 0), ("liver", 2, 0)])
    data = path.read_bytes()
    begin, end = data.index(b"Segment"), data.index(b"\n\n")
    # In the table alone: what else a header says is held by the fuzzers of volumes.
    return begin, end


def _nifti(text: str) -> Callable[[Path], tuple[int, int]]:
    def write(path: Path) -> tuple[int, int]:
        plain = path.with_name("plain.nii")
        write_label(plain, swapped(drawn()), GRID)
        image = nibabel.load(plain)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, text.encode()))
        nibabel.save(image, path)
        plain.unlink()
        begin = path.read_bytes().index(text.encode())
        return begin - 8, begin + len(text.encode())

    return write


def _described(path: Path) -> tuple[int, int]:
    write_label(path.with_name("x.nii.gz"), swapped(drawn()), GRID)
    path.write_text(ITKSNAP)
    return ITKSNAP.index("1 255"), len(ITKSNAP)


CARRIERS: dict[str, tuple[str, Callable[[Path], tuple[int, int]]]] = {
    "3D Slicer": ("x.nrrd", _nrrd),
    "Workbench": ("x.nii", _nifti(WORKBENCH)),
    "AFNI": ("x.nii", _nifti(AFNI)),
    "JSON, value to name": ("x.nii", _nifti(JSON[0])),
    "JSON, name to value": ("x.nii", _nifti(JSON[1])),
    "ITK-SNAP": ("x.txt", _described),
}


def _mutated(data: bytes, begin: int, end: int, rng: np.random.Generator, *, same_length: bool) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(begin, end))
        what = int(rng.integers(3))
        if what == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif what == 1 or same_length:
            new = ODD[int(rng.integers(len(ODD)))]
            changed[at : at + len(new)] = new[: max(0, min(len(new), end - at))]
        else:
            lines = bytes(changed[begin:end]).split(b"\n")
            picked = int(rng.integers(len(lines)))
            lines[picked : picked + 1] = [[], [lines[picked]] * 2, [ODD[int(rng.integers(len(ODD)))]]][at % 3]
            changed[begin:end] = b"\n".join(lines)
            end = min(end, len(changed))
    return bytes(changed)


def _names_something(path: Path) -> bool:
    """Ask other readers whether there is anything left of a table."""
    if path.suffix == ".nrrd":
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return any("_Name" in key or "_LabelValue" in key for key in reader.GetMetaDataKeys())
    if path.suffix == ".nii":
        held = nibabel.load(path).header.extensions
        text = held[0].get_content().rstrip(b"\0").decode("utf-8", "replace") if held else ""
        # JSON of another kind is no table.
        return bool(text) and not (text.startswith('{"') and "labels" not in json.loads(text))
    return '"' in path.read_bytes().decode("utf-8", "replace").replace('"Clear Label"', "").replace('Label"', "")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_damaged_label_table_gives_the_right_labels_or_is_refused(carrier: str, tmp_path: Path) -> None:
    name, write = CARRIERS[carrier]
    path = tmp_path / name
    begin, end = write(path)
    label = path.with_name("x.nii.gz") if path.suffix == ".txt" else path
    data = path.read_bytes()
    rng = np.random.default_rng([3, *carrier.encode()])
    seen: Counter[str] = Counter()
    for number in range(MUTATIONS):
        path.unlink(missing_ok=True)  # so that the folder's time changes, as with any new file
        path.write_bytes(_mutated(data, begin, end, rng, same_length=path.suffix == ".nii") if number else data)
        try:
            label_zyx = read_label_as(label, STRICT, allowed=(1, 2), names=DECLARED)[0]
        except InputError:
            seen["refused"] += 1
            continue
        if np.array_equal(label_zyx, drawn()):
            seen["right"] += 1
            continue
        assert not _names_something(path), (number, path.read_bytes()[begin - 8 : end + 8])
        seen["no table left"] += 1
    print(carrier, dict(seen))
    assert seen["right"] > 5, seen
    assert seen["refused"] > MUTATIONS // 5, seen
