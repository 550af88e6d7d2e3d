"""An archive is unpacked whole and into its own folder, or refused with the target untouched."""

from __future__ import annotations

import gzip
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.files.archives import Limits, only_folder, unpack
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import write_image, write_label


def _zip(path: Path, files: dict[str, bytes], **changes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (changes.get("mode", stat.S_IFREG | 0o644)) << 16
            archive.writestr(info, content)
    return path


def _tar(path: Path, files: dict[str, bytes], **changes: object) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


GOOD = {"Task/a.txt": b"one", "Task/sub/b.txt": b"two" * 500, "__MACOSX/._a.txt": b"x", "Task/._a.txt": b"x"}
MAKERS = [(_zip, "x.zip"), (_tar, "x.tar"), (_tar, "x.tar.gz"), (_tar, "x.tgz")]


@pytest.mark.parametrize(("make", "name"), MAKERS)
def test_an_archive_is_unpacked_without_what_macos_puts_into_it(
    make: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    archive = make(tmp_path / name, GOOD)
    assert unpack(archive, tmp_path / "out") == 2
    assert only_folder(tmp_path / "out") == tmp_path / "out" / "Task"
    assert (tmp_path / "out/Task/sub/b.txt").read_bytes() == b"two" * 500
    assert unpack(archive, tmp_path / "all", keep_hidden=True) == 4
    with pytest.raises(InputError, match="out exists"):
        unpack(archive, tmp_path / "out")


NAMES = {
    "out of the folder": "../evil.txt",
    "out of the folder, deep": "a/../../evil.txt",
    "absolute": "/tmp/evil.txt",
    "backslashes": "..\\evil.txt",
    "a drive": "C:evil.txt",
    "an ending blank": "good.txt ",
    "a long name": "x" * 256,
    "nested": "inner.tar.gz",
    "nested zip": "inner.ZIP",
}


@pytest.mark.parametrize("fault", NAMES)
@pytest.mark.parametrize(("make", "name"), MAKERS[:2])
def test_an_entry_that_does_not_name_a_file_within_is_refused(
    make: Callable[..., Path], name: str, fault: str, tmp_path: Path
) -> None:
    _refused(make(tmp_path / name, {"good.txt": b"1", NAMES[fault]: b"2"}), tmp_path, "not name a file|an archive it")


def test_a_zero_byte_does_not_hide_the_rest_of_a_name(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "x.zip", {"image_.exe": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"image_.exe", b"image\0.exe"))
    _refused(archive, tmp_path, "does not name a file")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_a_link_or_device_in_a_tar_is_refused(kind: bytes, tmp_path: Path) -> None:
    _refused(
        _tar(tmp_path / "x.tar", {"a": b""}, type=kind, linkname="/etc/passwd"), tmp_path, "link or device|damaged"
    )


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_a_link_or_device_in_a_zip_is_refused(kind: int, tmp_path: Path) -> None:
    _refused(_zip(tmp_path / "x.zip", {"a": b"/etc/passwd"}, mode=kind | 0o777), tmp_path, "link or device")


@pytest.mark.parametrize(("make", "name"), MAKERS[:2])
@pytest.mark.parametrize(
    "twins", [("a/x", "a/x"), ("a/x", "A/x"), ("a/x", "a/X"), ("a", "a/x"), ("\u00e9", "e\u0301"), ("a/x", "a//x")]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_a_file_system_may_not_tell_apart_are_refused(
    make: Callable[..., Path], name: str, twins: tuple[str, str], tmp_path: Path
) -> None:
    archive = tmp_path / name
    if make is _zip:
        with zipfile.ZipFile(archive, "w") as opened:
            for twin in twins:
                opened.writestr(twin, b"1")
    else:
        with tarfile.open(archive, "w") as opened:
            for twin in twins:
                opened.addfile(tarfile.TarInfo(twin))
    _refused(archive, tmp_path, "one name twice")


def test_a_million_entries_and_a_thousandfold_bomb_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    many = _zip(tmp_path / "many.zip", {f"{i}": b"" for i in range(40)})
    _refused(many, tmp_path, "more than 30 entries", limits=Limits(files=30))
    _refused(_tar(tmp_path / "many.tar", {f"{i}": b"" for i in range(40)}), tmp_path, "30 entries", Limits(files=30))
    bomb = _zip(tmp_path / "bomb.zip", {"zeros": bytes(100 << 20)})
    assert bomb.stat().st_size * 900 < 100 << 20
    _refused(bomb, tmp_path, "200 times its size")
    _refused(bomb, tmp_path, "there is room for 1 MB", limits=Limits(bytes=1_000_000))


def test_a_size_that_is_announced_too_small_is_found_while_unpacking(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "x.zip", {"a": bytes(5000)})
    raw = bytearray(archive.read_bytes())
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = raw.index(mark) + at
        raw[start : start + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(bytes(raw))
    _refused(archive, tmp_path, "announced|damaged")


@pytest.mark.parametrize(("make", "name"), MAKERS[:3])
def test_a_damaged_archive_is_refused(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, {f"f{i}": np.random.default_rng(i).bytes(3000) for i in range(5)})
    raw = archive.read_bytes()
    for kept in (len(raw) - 20, len(raw) // 2, 600, 0):
        archive.write_bytes(raw[:kept] if name != "x.tar" or kept != len(raw) - 20 else raw[: 5 * 3584])
        _refused(archive, tmp_path, "damaged|cut off")
    if name != "x.tar":  # has no checksum of its content
        changed = bytearray(raw)
        changed[len(raw) // 2] ^= 1
        archive.write_bytes(bytes(changed))
        _refused(archive, tmp_path, "damaged")


def test_a_damaged_header_within_a_tar_does_not_hide_the_entries_behind_it(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.tar", {f"f{i}": b"1" * 300 for i in range(5)})
    changed = bytearray(archive.read_bytes())
    changed[2 * 1024 + 10] ^= 1
    archive.write_bytes(bytes(changed))
    _refused(archive, tmp_path, "x.tar is damaged")


def test_a_tar_whose_first_name_begins_like_a_zip_is_a_tar(tmp_path: Path) -> None:
    assert unpack(_tar(tmp_path / "x.tar", {"PKD/a.txt": b"1"}), tmp_path / "out") == 1


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "x.zip", {"a": b"1"})
    raw = bytearray(archive.read_bytes())
    raw[raw.index(b"PK\x03\x04") + 6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(bytes(raw))
    _refused(archive, tmp_path, "encrypted")


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnunet_sam2.files.archives as archives

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "_write_entry", full)
    archive = _zip(tmp_path / "x.zip", {"a": b"1"})
    with pytest.raises(StageError, match="No space left"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def _refused(archive: Path, folder: Path, said: str, limits: Limits | None = None) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=said) as caught:
        unpack(archive, folder / "out", limits=limits)
    assert archive.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_convert_takes_a_task_as_it_is_downloaded(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    geometry = Geometry(shape_zyx=(4, 10, 12))
    task = tmp_path / "made" / "Task09_Tiny"
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 200, (1, 4, 10, 12)).astype(np.int16)
        write_image(task / "imagesTr" / f"c{i}.nii.gz", values, geometry)
        write_label(task / "labelsTr" / f"c{i}.nii.gz", (values[0] > 100).astype(np.uint8), geometry)
    value = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": []}
    (task / "dataset.json").write_text(json.dumps(value))
    (task / "._dataset.json").write_bytes(b"\0\5\x16\7")
    archive = tmp_path / "Task09_Tiny.tar"
    with tarfile.open(archive, "w") as opened:
        opened.add(task, arcname="Task09_Tiny")

    raw = fresh_roots / "nnUNet_raw"
    assert main(["convert", str(archive), "-d", "9", "-n", "T", "--labelled", "2"]) == 0
    assert [path.name for path in raw.iterdir()] == ["Dataset009_T"]
    cohort = Cohort.load(raw / "Dataset009_T")
    assert len(cohort.cases) == 3
    assert cohort.provenance["archive_sha256"] == file_hash(archive)

    kept = tmp_path / "kept"
    again = ["convert", str(archive), "-d", "9", "-n", "T", "--labelled", "2", "--overwrite"]
    assert main([*again, "--unpack-to", str(kept)]) == 0
    assert (kept / "Task09_Tiny" / "dataset.json").is_file()
    assert Cohort.load(raw / "Dataset009_T").cases == cohort.cases

    image = gzip.decompress((task / "imagesTr/c1.nii.gz").read_bytes())
    for name in ("c1", "c2"):
        (task / "imagesTr" / f"{name}.nii.gz").write_bytes(gzip.compress(image[:-5]))
    with tarfile.open(archive, "w") as opened:
        opened.add(task, arcname="Task09_Tiny")
    capsys.readouterr()
    assert main(again) == 2
    told = capsys.readouterr()
    assert "Task09_Tiny.tar/Task09_Tiny/imagesTr/c1.nii.gz is cut off" in told.err
    assert "refused 2: " in told.out
    assert f"{archive}/Task09_Tiny/imagesTr/c2.nii.gz is cut off" in told.out
    assert [path.name for path in raw.iterdir()] == ["Dataset009_T"]
    assert main(["convert", str(task), "-d", "8", "-n", "T", "--unpack-to", str(tmp_path / "z")]) == 2
