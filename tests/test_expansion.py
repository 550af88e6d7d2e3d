"""What a compressed image may open to, and what a look at its grid may hold."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnunet_sam2.errors import InputError
from nnunet_sam2.files import expansion
from nnunet_sam2.machine import Memory
from nnunet_sam2.volumes import read_geometry, read_stored

CUBE = 400
PEAK = """
import resource, sys
from pathlib import Path
import SimpleITK, nibabel, numpy
from nnunet_sam2.volumes import read_geometry
read_geometry(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    assert read_geometry(Path(name)).shape_zyx == (400, 400, 400)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _zeros(path: Path, shape: tuple[int, int, int], dtype: str) -> None:
    """Write an honest gzipped NIfTI file of zeros, of any size, in no time: gzip may have many members."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.dtype(dtype))
    header.set_data_shape(shape)
    header["pixdim"][1:4], header["vox_offset"], header["magic"] = 1, 352, b"n+1"
    total, member = int(np.prod(shape)) * np.dtype(dtype).itemsize, 1 << 26
    whole, rest = divmod(total, member)
    path.write_bytes(
        gzip.compress(header.binaryblock + bytes(4)) + gzip.compress(bytes(member)) * whole + gzip.compress(bytes(rest))
    )


def test_four_gigabytes_of_zeros_in_four_megabytes_are_refused_by_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    _zeros(path, (1300, 1300, 1200), "int16")
    assert path.stat().st_size < 5e6
    begin = time.process_time()
    for read in (read_stored, read_geometry):
        with pytest.raises(InputError, match=r"opens to 4\.1 GB from 3\.9 MB, more than 500 times its size"):
            read(path)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_what_this_machine_has_no_memory_for_is_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x{ending}"
    SimpleITK.WriteImage(SimpleITK.Image(64, 64, 8, SimpleITK.sitkInt16), str(path), True)
    assert read_stored(path)[0].shape == (1, 8, 64, 64)
    monkeypatch.setattr(expansion, "_ROOM_FROM_BYTES", 1)
    monkeypatch.setattr(expansion, "read_memory", lambda: Memory(total=1 << 40, available=100_000, limit=None))
    with pytest.raises(InputError, match="crop or resample it, or use a machine with more memory"):
        read_stored(path)


@pytest.mark.parametrize("change", ["longer", "shorter", "damaged"])
def test_a_compressed_nrrd_holds_what_its_header_says(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    SimpleITK.WriteImage(SimpleITK.GaussianSource(SimpleITK.sitkUInt8, [20, 20, 20]), str(path), True)
    data = path.read_bytes()
    head, body = data[: data.index(b"\n\n") + 2], data[data.index(b"\n\n") + 2 :]
    voxels = zlib.decompress(body, 31)
    changed = {
        "longer": gzip.compress(voxels + bytes(1000)),
        "shorter": gzip.compress(voxels[:-1]),
        "damaged": body[:-6] + bytes([body[-6] ^ 1]) + body[-5:],
    }[change]
    path.write_bytes(head + changed)
    for read in (read_stored, read_geometry):
        with pytest.raises(InputError, match=r"is (damaged or )?cut off"):
            read(path)


def test_a_look_at_the_grid_holds_no_voxels(tmp_path: Path) -> None:
    files = [tmp_path / f"x{ending}" for ending in (".nii.gz", ".mha", ".nrrd")]
    small = tmp_path / "small.nii.gz"
    _zeros(small, (4, 4, 4), "int16")
    _zeros(files[0], (CUBE,) * 3, "int16")
    body = bytes(CUBE**3 * 2)
    packed = zlib.compress(body, 1)
    files[1].write_bytes(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nCompressedDataSize = {len(packed)}\n"
        f"DimSize = {CUBE} {CUBE} {CUBE}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode()
        + packed
    )
    files[2].write_bytes(
        f"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {CUBE} {CUBE} {CUBE}\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nendian: little\nencoding: gzip\n"
        "space origin: (0,0,0)\n\n".encode()
        + gzip.compress(body, 1)
    )
    done = subprocess.run(
        [sys.executable, "-c", PEAK, small, *files], capture_output=True, text=True, check=True, timeout=300
    )
    peaks = [int(line) for line in done.stdout.split()]
    print("megabytes of 128 held by a look at the grid:", peaks)
    assert len(peaks) == 3
    assert max(peaks) < 40, peaks
