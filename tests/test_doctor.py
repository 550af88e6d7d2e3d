"""Each of the doctor's checks notices what it is there for, and says how to mend it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nnunet_sam2.cli.doctor import line
from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.doctor import checkpoints, computer, packages, storage_places, trainer
from nnunet_sam2.doctor.computer import Accelerator
from nnunet_sam2.doctor.dataset import check_dataset, check_images, check_labels, check_plans, check_run
from nnunet_sam2.doctor.finding import Finding, Level, ok, warn
from nnunet_sam2.folders import VARIABLES, DatasetFolders
from nnunet_sam2.machine import Memory, limit_files, memory_limit
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.sam2.weights.cache import WeightsRecord, write_record
from nnunet_sam2.storage import file_hash
from nnunet_sam2.trainers.discovery import EXTENSION_VARIABLE, HOOK_FILE, hook_line, search_path

GB = 10**9
NO_ACCELERATOR = Accelerator(cuda=False, mps=False, built_for_cuda=False)


def level(finding: Finding) -> str:
    return finding.level.value


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}  # type: ignore[attr-defined]


def test_whatever_is_not_ok_has_to_say_how_to_mend_it() -> None:
    with pytest.raises(ValueError, match="mend"):
        Finding(check="disk", level=Level.FAIL, message="full")
    assert line(warn("disk", "4 GB free", "make room")).endswith("4 GB free; mend: make room")
    assert line(ok("disk", "4 TB free")).startswith("ok   disk ")


def test_an_old_python_fails() -> None:
    assert level(packages.check_python("3.9.2", ">=3.10")) == "fail"
    assert level(packages.check_python("3.12.0", ">=3.10")) == "ok"
    assert level(packages.check_python("3.12.0+", ">=3.10")) == "ok"


def test_missing_and_foreign_versions_fail_with_the_line_to_type() -> None:
    asked = ["nnunetv2<2.9,>=2.8", "torch<2.15,>=2.14", "numpy>=1.26", "scipy>=1.11", "tomli; python_version<'3'"]
    found = {"nnunetv2": "2.7.1", "torch": None, "numpy": "1.26.4", "scipy": "1.12"}
    findings = by_name(packages.check_packages(asked, found.get))
    assert (level(findings["nnunetv2"]), findings["nnunetv2"].mend) == ("fail", "pip install 'nnunetv2<2.9,>=2.8'")
    assert (level(findings["torch"]), findings["torch"].message) == ("fail", "not installed")
    assert findings["other packages"].message == "2 within their ranges"
    assert "tomli" not in findings


def test_a_missing_extra_is_no_fault_and_one_of_another_version_is_warned_of() -> None:
    asked = ['faiss-cpu<2,>=1.9; extra == "index"', 'peft<0.22,>=0.21; extra == "lora"', 'pytest>=8; extra == "test"']
    findings = by_name(packages.check_extras(asked, {"peft": "0.20.0"}.get))
    assert level(findings["extra index"]) == "ok"
    assert "pip install 'nnunet_sam2[index]'" in findings["extra index"].message
    assert level(findings["extra lora"]) == "warn"
    assert "extra test" not in findings


def test_an_nvidia_device_that_torch_cannot_use_is_warned_of() -> None:
    without = computer.check_accelerator(NO_ACCELERATOR, has_nvidia=False)
    built = Accelerator(cuda=False, mps=False, built_for_cuda=True)
    broken = Accelerator(cuda=False, mps=False, built_for_cuda=False, problem="OSError: libc10.so")
    assert level(without) == "ok"
    assert "driver" in computer.check_accelerator(built, has_nvidia=True).mend
    assert "torch for CPUs" in computer.check_accelerator(NO_ACCELERATOR, has_nvidia=True).message
    assert level(computer.check_accelerator(broken, has_nvidia=False)) == "fail"


def test_more_threads_than_cores_and_nonsense_are_noticed() -> None:
    assert level(computer.check_threads({"OMP_NUM_THREADS": "8"}, 2)) == "warn"
    assert computer.check_threads({"OMP_NUM_THREADS": "many"}, 2).mend == "unset OMP_NUM_THREADS"
    assert level(computer.check_threads({}, 2)) == "ok"


def test_a_jobs_limit_is_found_at_every_level_of_its_control_group(tmp_path: Path) -> None:
    (tmp_path / "two").write_text("0::/slurm/job_7/step_0\n")
    (tmp_path / "slurm/job_7/step_0").mkdir(parents=True)
    (tmp_path / "slurm/job_7/memory.max").write_text(f"{8 * GB}\n")
    (tmp_path / "slurm/job_7/step_0/memory.max").write_text("max\n")
    assert memory_limit(limit_files(tmp_path / "two", tmp_path), 64 * GB) == 8 * GB
    (tmp_path / "one").write_text("12:cpu,cpuacct:/slurm/job_8\n9:memory:/slurm/job_8\n1:name=systemd:/x\n")
    (tmp_path / "memory/slurm/job_8").mkdir(parents=True)
    (tmp_path / "memory/slurm/job_8/memory.limit_in_bytes").write_text(f"{4 * GB}\n")
    assert memory_limit(limit_files(tmp_path / "one", tmp_path), 64 * GB) == 4 * GB
    assert memory_limit(limit_files(tmp_path / "absent", tmp_path), 64 * GB) is None


def test_a_containers_limit_counts_and_not_the_machines_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{2 * GB}\n")
    (tmp_path / "none").write_text("max\n")
    limit = memory_limit((tmp_path / "memory.max", tmp_path / "none", tmp_path / "absent"), 64 * GB)
    assert limit == 2 * GB
    assert memory_limit((tmp_path / "none",), 64 * GB) is None
    finding = computer.check_memory(Memory(total=64 * GB, available=60 * GB, limit=limit))
    assert level(finding) == "fail"
    assert "limit of this container" in finding.message
    assert level(computer.check_memory(Memory(total=64 * GB, available=4 * GB, limit=None))) == "warn"
    assert level(computer.check_memory(Memory(total=64 * GB, available=60 * GB, limit=None))) == "ok"


def test_little_shared_memory_matters_to_an_accelerators_training() -> None:
    docker = 64 * 2**20
    assert "--shm-size" in computer.check_shared_memory(docker, accelerator=True).mend
    assert level(computer.check_shared_memory(docker, accelerator=False)) == "ok"


def test_a_locale_other_than_utf8_is_warned_of() -> None:
    assert computer.check_locale("ANSI_X3.4-1968", utf8_mode=False).mend == "export PYTHONUTF8=1"
    assert level(computer.check_locale("ANSI_X3.4-1968", utf8_mode=True)) == "ok"
    assert level(computer.check_locale("utf_8", utf8_mode=False)) == "ok"


def test_nnunets_eight_workers_are_too_many_for_two_cores() -> None:
    assert computer.check_workers({}, cores=2, memory=32 * GB).mend == "export nnUNet_def_n_proc=2"
    assert computer.check_workers({}, cores=16, memory=4 * GB).mend == "export nnUNet_def_n_proc=2"
    assert level(computer.check_workers({"nnUNet_def_n_proc": "two"}, cores=2, memory=32 * GB)) == "fail"
    assert level(computer.check_workers({"nnUNet_def_n_proc": "2"}, cores=2, memory=32 * GB)) == "ok"


def test_variables_that_are_unset_relative_files_or_missing_folders_are_named(tmp_path: Path) -> None:
    name, file = VARIABLES[1], tmp_path / "file"
    file.write_text("")
    assert storage_places.check_root(name, None).mend == f"export {name}=/path/to/{name}"
    assert level(storage_places.check_root(name, "data/pre")) == "fail"
    assert level(storage_places.check_root(name, str(file))) == "fail"
    assert (
        storage_places.check_root(name, str(tmp_path / "new")).message == f"{tmp_path / 'new'}, made when it is needed"
    )
    assert level(storage_places.check_root(name, str(tmp_path))) == "ok"


def test_a_folder_that_cannot_be_written_to_fails_but_raw_data_may_be_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_places, "write_problem", lambda folder: "Read-only file system")
    assert level(storage_places.check_root(VARIABLES[0], str(tmp_path))) == "warn"
    assert level(storage_places.check_root(VARIABLES[2], str(tmp_path))) == "fail"
    assert level(storage_places.check_root(VARIABLES[2], str(tmp_path / "new"))) == "fail"
    assert level(storage_places.check_cache("cache", tmp_path / "new", variable="X")) == "warn"


def test_a_place_that_nobody_may_look_at_is_named_and_the_other_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(storage_places, "write_problem", lambda folder: "Permission denied")
    value = "/a folder of others/data"
    finding = storage_places.check_root(VARIABLES[2], value)
    assert (level(finding), "Permission denied" in finding.message) == ("fail", True)
    assert len(list(storage_places.check_room({VARIABLES[2]: value}))) == 1


def test_a_folder_is_tried_by_making_a_file_that_does_not_stay(tmp_path: Path) -> None:
    assert storage_places.write_problem(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert storage_places.write_problem(tmp_path / "absent") != ""


def test_one_folder_under_two_variables_fails_and_one_within_another_is_warned_of(tmp_path: Path) -> None:
    same = {VARIABLES[0]: tmp_path, VARIABLES[1]: tmp_path}
    assert level(storage_places.check_apart(same)) == "fail"
    within = {VARIABLES[0]: tmp_path / "raw" / "results", VARIABLES[1]: tmp_path / "raw"}
    assert level(storage_places.check_apart(within)) == "warn"
    assert level(storage_places.check_apart({name: tmp_path / name for name in VARIABLES})) == "ok"


def test_a_disk_that_is_nearly_full_fails() -> None:
    levels = [level(storage_places.check_free("disk", size)) for size in (GB // 2, 5 * GB, 500 * GB)]
    assert levels == ["fail", "warn", "ok"]


def test_a_trainer_that_only_loops_find_is_warned_of_and_one_that_nobody_finds_fails() -> None:
    assert level(trainer.check_trainer("", "")) == "ok"
    assert "nnunet_sam2 hook install" in trainer.check_trainer("RuntimeError: not found", "").mend
    finding = trainer.check_trainer("RuntimeError: not found", "ImportError: no torch")
    assert (level(finding), "no torch" in finding.message) == ("fail", True)


def test_without_a_trial_the_trainer_is_looked_for_where_nnunet_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ask_nnunet", lambda variables: pytest.fail("a process was started"))
    found = trainer.look_for_trainer({EXTENSION_VARIABLE: search_path("/elsewhere")})
    assert (level(found), "doctor --trial" in found.message) == ("ok", True)
    assert "nnunet_sam2 hook install" in trainer.look_for_trainer({EXTENSION_VARIABLE: "/elsewhere"}).mend
    monkeypatch.setattr(trainer, "extension_folder", lambda: Path("/nowhere"))
    assert level(trainer.look_for_trainer({})) == "fail"


def test_the_hook_of_another_installation_is_noticed(tmp_path: Path) -> None:
    assert "not installed" in trainer.check_hook([tmp_path]).message
    (tmp_path / HOOK_FILE).write_text(hook_line())
    assert level(trainer.check_hook([tmp_path])) == "ok"
    (tmp_path / HOOK_FILE).write_text("import os\n")
    assert trainer.check_hook([tmp_path]).mend == "nnunet_sam2 hook install"


def test_weights_that_changed_or_are_gone_fail_and_half_a_download_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNUNET_SAM2_WEIGHTS_CACHE", str(tmp_path))
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"weights")
    record = WeightsRecord(
        name="mine",
        config="embedded",
        file=file.name,
        size=7,
        sha256=file_hash(file),
        tensors_sha256="0",
        source="/a/file",
        source_size=7,
        source_sha256="0",
        published_sha256=None,
        etag=None,
        commit=None,
        origin="mine",
        licence="none",
        native_size=256,
        recorded="2026-01-01T00:00:00",
    )
    write_record(record)
    assert [level(finding) for finding in checkpoints.check_kept()] == ["ok"]
    file.write_bytes(b"weightS")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "sam2.1_hiera_tiny-abc.part").write_bytes(b"half")
    findings = by_name(checkpoints.check_kept())
    assert level(findings["weights mine"]) == "fail"
    assert findings["weights mine"].mend == "nnunet_sam2 weights add mine FILE"
    half = [finding for finding in findings.values() if "not finished" in finding.message]
    assert [finding.level for finding in half] == [Level.WARN]
    file.unlink()
    assert "missing" in checkpoints.check_record("mine").message
    assert level(checkpoints.judge_embedded("changed: not as installed; install nnunet_sam2 anew")) == "fail"


def test_a_dataset_whose_files_are_those_that_were_converted_is_ok(tiny_dataset: DatasetFolders) -> None:
    findings = by_name(check_dataset(tiny_dataset))
    assert {name: level(finding) for name, finding in findings.items()} == dict.fromkeys(findings, "ok")
    assert {"cohort", "images", "labels", "plans"} <= set(findings)


def test_exchanged_and_cut_files_of_a_dataset_are_named(fresh_dataset: DatasetFolders) -> None:
    cohort = Cohort.load(fresh_dataset.raw)
    first, second = (cohort.image_paths(case)[0] for case in cohort.unlabelled)
    shutil.copyfile(second, first)
    label = cohort.label_path(cohort.labelled[0])
    label.write_bytes(label.read_bytes()[:-20])
    images, labels = check_images(cohort), check_labels(cohort)
    assert (level(images), level(labels)) == ("fail", "fail")
    assert first.name in images.message
    assert label.name in labels.message
    assert images.message.startswith("1 of ")


def test_a_dataset_without_a_cohort_and_damaged_plans_are_named(fresh_dataset: DatasetFolders) -> None:
    fresh_dataset.preprocessed.mkdir(parents=True)
    (fresh_dataset.preprocessed / "nnUNetPlans.json").write_text('{"configurations": ')
    assert level(check_plans(fresh_dataset)) == "fail"
    (fresh_dataset.raw / "cohort.json").unlink()
    assert [(f.check, level(f)) for f in check_dataset(fresh_dataset)] == [("cohort", "fail")]


def test_a_runs_changed_artefact_is_named_with_its_stage(tmp_path: Path) -> None:
    ledger, artefact = Ledger(tmp_path / "run"), tmp_path / "run" / "labels.nii.gz"

    def work() -> StageResult:
        artefact.write_bytes(b"labels")
        return StageResult(files=(artefact,))

    ledger.run_stage("r01/fuse", {}, work, what="fuse")
    assert level(check_run(tmp_path / "run")) == "ok"
    artefact.write_bytes(b"others")
    finding = check_run(tmp_path / "run")
    assert (level(finding), "labels.nii.gz (r01/fuse)" in finding.message) == ("warn", True)


def test_the_command_checks_this_machine_and_exits_with_zero_where_nothing_fails(
    fresh_roots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(EXTENSION_VARIABLE, search_path(None))
    assert main(["doctor", "--trial", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fail"] == 0
    assert len(report["findings"]) == report["ok"] + report["warn"]
    found = {finding["check"]: finding for finding in report["findings"]}
    assert {"python", "nnunetv2", "torch", "accelerator", "memory", *VARIABLES, "weights embedded"} <= set(found)
    assert found["trainer"]["message"] == "stock nnU-Net finds nnUNetTrainerSAM2"


def test_a_broken_package_is_a_finding_and_does_not_end_the_examination(
    fresh_roots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Finding:
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(checkpoints, "check_embedded", broken)
    monkeypatch.setattr(trainer, "look_for_trainer", lambda trial: trainer.check_trainer("", ""))
    assert main(["doctor", "--json"]) == 1
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    text = "cannot be looked at: OSError: libtorch_cpu.so: cannot open shared object file"
    assert (found["weights"]["level"], found["weights"]["message"]) == ("fail", text)
    assert found["trainer"]["level"] == "ok"


def test_the_command_exits_with_one_where_something_fails(
    fresh_roots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "look_for_trainer", lambda trial: trainer.check_trainer("", ""))
    monkeypatch.delenv(VARIABLES[0])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"fail {VARIABLES[0]}" in out
    assert f"mend: export {VARIABLES[0]}=" in out
    assert out.splitlines()[-1].endswith("1 fail")
