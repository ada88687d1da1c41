"""A fake driver library, compiled once, and child processes that load it by the real pynvml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the fake libnvidia-ml.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to test against the fake NVML library")
    if not sys.platform.startswith("linux"):
        pytest.skip("pynvml loads libnvidia-ml.so.1 by LD_LIBRARY_PATH on Linux alone")
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    source = HERE / "fake_nvml.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, source],
        check=True,
        timeout=60,
    )
    return folder


class Child:
    """A process whose pynvml found the fake library; it answers one JSON line per command."""

    def __init__(self, script: str, library_folder: Path, scenario_file: Path) -> None:
        self._scenario_file = scenario_file
        environ = {
            **os.environ,
            "LD_LIBRARY_PATH": str(library_folder),
            "FAKE_NVML_SCENARIO_FILE": str(scenario_file),
        }
        self._process = subprocess.Popen(
            [sys.executable, HERE / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
        )

    def set_scenario(self, scenario: str) -> None:
        # Renamed into place, so that the library never reads half a word.
        temporary = self._scenario_file.with_suffix(".new")
        temporary.write_text(scenario)
        temporary.replace(self._scenario_file)

    def ask(self, command: str = "read") -> dict[str, object]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def close(self) -> int:
        """End the process as a service would end; return its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            return self._process.wait(timeout=10)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


StartChild = Callable[[str, str], Child]


@pytest.fixture
def start_child(fake_nvml: Path, tmp_path: Path) -> Iterator[StartChild]:
    """start_child(script, scenario) -> Child"""
    children: list[Child] = []

    def start(script: str, scenario: str) -> Child:
        scenario_file = tmp_path / "scenario"
        scenario_file.write_text(scenario)
        child = Child(script, fake_nvml, scenario_file)
        children.append(child)
        return child

    yield start
    for child in children:
        child.close()
