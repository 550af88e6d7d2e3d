"""How stock nnU-Net comes to know the trainer's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.errors import InputError
from nnunet_sam2.trainers import discovery
from nnunet_sam2.trainers.discovery import EXTENSION_VARIABLE, extension_folder


def started_with_hook(site_folder: Path, value: str | None) -> str:
    """Start a bare Python that processes ``site_folder`` as its site-packages and return the variable."""
    environment = {name: text for name, text in os.environ.items() if name != EXTENSION_VARIABLE}
    if value is not None:
        environment[EXTENSION_VARIABLE] = value
    code = f"import site, os; site.addsitedir({str(site_folder)!r}); print(os.environ.get({EXTENSION_VARIABLE!r}, ''))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_extension_folder_holds_the_shim_alone() -> None:
    modules = {path.name for path in extension_folder().glob("*.py")}
    assert modules == {"__init__.py", "nnunet_sam2_trainer_shim.py"}


def test_what_the_user_set_stays_in_front() -> None:
    mine = os.pathsep.join(["/my/trainers", str(extension_folder())])
    assert discovery.environment({EXTENSION_VARIABLE: "/my/trainers"}) == {EXTENSION_VARIABLE: mine}
    assert discovery.environment({EXTENSION_VARIABLE: mine}) == {EXTENSION_VARIABLE: mine}
    assert discovery.environment({}) == {EXTENSION_VARIABLE: str(extension_folder())}


def test_env_prints_a_line_that_a_shell_understands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    line = capsys.readouterr().out
    environment = {name: text for name, text in os.environ.items() if name != EXTENSION_VARIABLE}
    script = f'{line}\nprintf %s "${EXTENSION_VARIABLE}"'
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == str(extension_folder())


def test_the_hook_sets_the_variable_at_start_and_is_gone_when_removed(tmp_path: Path) -> None:
    path = discovery.install_hook(tmp_path)
    assert discovery.install_hook(tmp_path) == path
    folder = str(extension_folder())
    assert started_with_hook(tmp_path, None) == folder
    assert started_with_hook(tmp_path, "/mine") == f"/mine{os.pathsep}{folder}"
    assert started_with_hook(tmp_path, folder) == folder
    assert discovery.remove_hook(tmp_path) == [path]
    assert discovery.remove_hook(tmp_path) == []
    assert started_with_hook(tmp_path, None) == ""


def test_the_hook_is_looked_for_in_the_users_own_folder_where_python_reads_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.setattr(discovery.sys, "prefix", "/environment")
    assert tmp_path not in discovery.hook_places()
    monkeypatch.setattr(discovery.sys, "prefix", discovery.sys.base_prefix)
    assert discovery.hook_places()[1:] == [tmp_path]


def test_the_hook_of_a_package_that_is_gone_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "extension_folder", lambda: tmp_path / "gone")
    discovery.install_hook(tmp_path)
    assert started_with_hook(tmp_path, None) == ""
    assert started_with_hook(tmp_path, "/mine") == "/mine"


def test_hook_commands_say_what_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(discovery.sysconfig, "get_path", lambda name: str(tmp_path))
    assert main(["hook", "install"]) == 0
    assert (tmp_path / discovery.HOOK_FILE).is_file()
    assert main(["hook", "remove"]) == 0
    assert not (tmp_path / discovery.HOOK_FILE).exists()
    assert main(["hook", "remove"]) == 0
    assert "no hook is installed" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["2.7.0", "2.9.0", "3.0", "1.7"])
def test_another_nnunet_version_is_refused_with_the_way_out(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery.importlib.metadata, "version", lambda name: version)
    with pytest.raises(InputError, match=f"nnunetv2 {version} is not supported.*pip install"):
        discovery.require_nnunet()
