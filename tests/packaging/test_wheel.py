"""The built wheel, installed in an empty place as a user would, and run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Installing compiles one dependency and reads some sixty others.
INSTALL_TIMEOUT = 600


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


def clean_environment(**more: str) -> dict[str, str]:
    dropped = ("MESHNODE_", "PYTHON", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return kept | more


def run(command: list[object], folder: Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=clean_environment(**env),
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def works_there(command: Path, folder: Path) -> None:
    """It makes a token, reads its settings, and runs a whole mesh."""
    assert run([command, "--version"], folder).startswith("meshnode ")
    assert run([command, "token", "new"], folder).startswith("mesh1")
    assert json.loads(run([command, "config", "check", "--open", "--json"], folder))["ok"] is True
    run([command, "demo", "--once"], folder)


def test_the_wheel_ships_the_package_alone_with_its_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"meshnode"}
    assert "meshnode/py.typed" in names
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "meshnode").rglob("*.*")}
    shipped = {name for name in here if "__pycache__" not in name}
    assert shipped <= set(names)


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_TIMEOUT)
def test_pip_installs_it_with_what_is_locked_and_it_runs(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip", "--quiet", "install"]
    run([*pip, "--require-hashes", "-r", ROOT / "requirements-build.lock"], tmp_path)
    locked = ["--require-hashes", "--no-deps", "--no-build-isolation"]
    run([*pip, *locked, "-r", ROOT / "requirements.lock"], tmp_path)
    run([*pip, "--no-index", wheel], tmp_path)  # so what is locked is all that it needs
    works_there(tmp_path / "env" / "bin" / "meshnode", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_TIMEOUT)
def test_uv_installs_it_as_a_tool_and_it_runs(wheel: Path, tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    folders = {
        "UV_TOOL_DIR": str(tmp_path / "tools"),
        "UV_TOOL_BIN_DIR": str(tmp_path / "bin"),
    }
    run([uv, "tool", "install", "--python", sys.executable, wheel], tmp_path, **folders)
    works_there(tmp_path / "bin" / "meshnode", tmp_path)
