"""What the package never does, held against its source; and files that try to lead it astray."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nnunet_sam2
from nnunet_sam2.cohort.cohort import COHORT_FILE, Cohort
from nnunet_sam2.cohort.names import checked_case_id, within_root
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.trainers.checkpoints import read_checkpoint

PACKAGE = Path(nnunet_sam2.__file__).parent

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "joblib.load", "marshal.loads", "shelve.open", "yaml.load", "dill.load", "subprocess.getoutput", "extractall",
    "tempfile.mktemp", "torch.hub.load",
}  # fmt: skip
"""Calls that run what a file says, or a shell."""

WRITERS = {
    "write_text", "write_bytes", "SimpleITK.WriteImage", "sitk.WriteImage", "nibabel.save", "to_filename", "np.save",
    "np.savez", "np.savez_compressed", "torch.save", "save_file", "json.dump", "pickle.dump",
    "imwrite", "blosc2.asarray",
}  # fmt: skip
"""Calls that write a file."""

MAY_WRITE = {
    "storage.py": "the atomic writers themselves",
    "volumes.py": "writes into an atomic path",
    "files/pictures.py": "volumes.py hands it an atomic path",
    "sam2/cache.py": "into an atomic path",
    "sam2/checkpoint.py": "into an atomic path",
    "support/library.py": "into a stream of storage",
    "trainers/checkpoints.py": "into a stream of storage",
    "trainers/dataset.py": "into an atomic path",
    "rounds/nnunet/cases.py": "into a stream of storage",
}
"""Modules with a writer, and why that is no half-written file; every other module goes through these."""


def _calls(*, names: set[str]) -> Iterator[tuple[str, str, ast.Call]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in names or (isinstance(node.func, ast.Attribute) and node.func.attr in names):
                    yield path.relative_to(PACKAGE).as_posix(), called, node


def _keyword(node: ast.Call, name: str) -> Any:
    found = next((keyword.value for keyword in node.keywords if keyword.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else None


def test_nothing_runs_what_a_file_says_or_a_shell() -> None:
    calls = [(where, called, node.lineno) for where, called, node in _calls(names=FORBIDDEN)]
    allowed = {"re.compile", "torch.compile", "environment.compile", "model.eval", "network.eval", "self.network.eval"}
    stray = [call for call in calls if call[1] not in allowed and not call[1].endswith((".eval", "re.compile"))]
    assert stray == []
    shells = [
        (w, n.lineno) for w, _, n in _calls(names={"run", "Popen", "call", "check_output"}) if _keyword(n, "shell")
    ]
    assert shells == []


def test_every_torch_load_takes_weights_only_and_every_numpy_load_no_pickles() -> None:
    loads = list(_calls(names={"torch.load"}))
    assert loads
    assert [(where, node.lineno) for where, _, node in loads if _keyword(node, "weights_only") is not True] == []
    arrays = list(_calls(names={"np.load", "numpy.load"}))
    assert arrays
    assert [(where, node.lineno) for where, _, node in arrays if _keyword(node, "allow_pickle") is not False] == []


def test_every_file_is_written_by_the_atomic_writers() -> None:
    stray = {
        (where, called, node.lineno)
        for where, called, node in _calls(names=WRITERS)
        if where not in MAY_WRITE and not _of_storage(where, called)
    }
    # pickles that nnU-Net wants beside its arrays, the lock's owner: within a folder that is renamed when it is whole
    known = {("rounds/nnunet/configuration.py", "write_bytes"), ("rounds/estimate/nnunet_probe.py", "write_bytes")}
    known |= {("rounds/lock.py", "write_text")}
    assert {entry for entry in stray if (entry[0], entry[1].rpartition(".")[2]) not in known} == set()
    for where, _, node in _calls(names={"open"}):
        mode = next((a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "r")
        if set(mode) & set("wx+") and where not in ("storage.py", "files/archives.py"):
            pytest.fail(f"{where}:{node.lineno} opens a file for writing; go through nnunet_sam2/storage.py")


def _of_storage(where: str, called: str) -> bool:
    tree = ast.parse((PACKAGE / where).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "nnunet_sam2.storage"
        for alias in node.names
    }
    return called in imported


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/nnunet_sam2_payload_ran"),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_code_is_refused_before_nnunet_sees_it(legacy: bool, tmp_path: Path) -> None:
    marker = Path("/tmp/nnunet_sam2_payload_ran")
    marker.unlink(missing_ok=True)
    path = tmp_path / "checkpoint_final.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"network_weights": {}, "x": _Payload()}))
    else:
        torch.save({"network_weights": {}, "x": _Payload()}, path)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth is (refused|not a readable)"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("case_id", ["case_01", "A.b-c", "0", "x" * 120, "console"])
def test_a_plain_case_id_is_taken(case_id: str) -> None:
    assert checked_case_id(case_id) == case_id


@pytest.mark.parametrize(
    "case_id",
    [
        "",
        "..",
        ".hidden",
        "-rf",
        "a b",
        "a/b",
        "a\\b",
        "a\0",
        "a\n",
        "\u00e4",
        "x" * 121,
        "CON",
        "nul.x",
        "a.",
        7,
        None,
    ],
)
def test_a_case_id_that_some_file_system_stumbles_over_is_refused(case_id: Any) -> None:
    with pytest.raises(InputError, match="cannot be a case id"):
        checked_case_id(case_id)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\\..\\b", "C:/x", "", "a\0b", "a\nb", 3, None])
def test_a_path_that_leads_out_of_its_root_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match="no path within"):
        within_root(name)


TAMPERED = {
    "image out of the dataset": (("cases", 0, "images", 0), "../../secret.nii.gz", "no path within"),
    "absolute label": (("cases", 0, "label"), "/etc/passwd", "no path within"),
    "hash of a file elsewhere": (("cases", 0, "file_hashes"), {"../x": "0"}, "no path within"),
    "an id that is a path": (("cases", 0, "id"), "../x", "cannot be a case id"),
    "an id twice": (("cases", 0, "id"), "SUBJECT_001", "twice"),
    "an unknown role": (("cases", 0, "role"), "teacher", "teacher"),
    "no geometry": (("cases", 0, "geometry"), {"shape_zyx": [0, 1, 1]}, "spacing"),
    "no images": (("cases", 0, "images"), [], "no images"),
    "a label value that is text": (("labels", "large_organ"), "one", "large_organ"),
    "cases that are no list": (("cases",), 3, "damaged"),
    "no name": (("name",), None, "lacks the field"),
    "another format": (("format",), 99, "format 99"),
    "a patient on both sides": (("cases", 0, "patient"), "subject_005", "patient subject_005"),
    "a test image to learn from": (("cases", 0, "voxel_hash"), "of subject_005", "hold the same voxels"),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_cohort_file_that_was_tampered_with_is_refused_with_the_field(
    change: str, tiny_dataset: DatasetFolders, tmp_path: Path
) -> None:
    where, value, said = TAMPERED[change]
    whole = json.loads((tiny_dataset.raw / COHORT_FILE).read_text())
    if value == "of subject_005":
        value = next(case["voxel_hash"] for case in whole["cases"] if case["id"] == "subject_005")
    part = whole
    for key in where[:-1]:
        part = part[key]
    if value is None:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    (tmp_path / COHORT_FILE).write_text(json.dumps(whole))
    with pytest.raises(InputError, match=said) as caught:
        Cohort.load(tmp_path)
    assert str(tmp_path / COHORT_FILE) in str(caught.value)
