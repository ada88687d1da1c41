"""Programs in other languages, built while the tests before these run.

Where nothing is cached, Go's compiler takes two minutes of CPU, and npm a while for its downloads.
Both begin once it is known that a test wants them, at the lowest priority.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# Cold, beside a whole test suite on two busy cores.
PATIENCE = 900  # seconds
# The exit status of a step whose downloads can't be had: then there is nothing to test with.
UNAVAILABLE = 75

_BUILD_GO = f'go mod download || exit {UNAVAILABLE}; exec go build -o "$0" ./meshpeer'


class Build:
    """A program's building, under way."""

    def __init__(self, argv: Sequence[str], cwd: Path) -> None:
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when it is over
        self._child = subprocess.Popen(
            ["nice", "-n", "19", *argv],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that compilers that it started end with it
        )

    def finish(self) -> tuple[int, str]:
        """Wait for its end; return the exit status and what it printed."""
        status = self._child.wait(PATIENCE)
        self._out.seek(0)
        return status, self._out.read().strip()

    def stop(self) -> None:
        if self._child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait(10)
        self._out.close()


class Builds:
    """What was begun for the tests that were collected."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="meshnode-interop-"))
        self.go: Build | None = None
        self.js: Build | None = None

    @property
    def go_program(self) -> Path:
        return self.folder / "meshpeer"

    @property
    def js_folder(self) -> Path:
        return self.folder / "js"

    def begin(self, wanted: set[str]) -> None:
        if "go_program" in wanted and shutil.which("go") is not None:
            self.go = Build(["sh", "-c", _BUILD_GO, str(self.go_program)], HERE / "go")
        if "js_program" in wanted and shutil.which("npm") is not None:
            self.js_folder.mkdir()
            for name in ("package.json", "package-lock.json", ".npmrc", "peer.mjs"):
                shutil.copy(HERE / "js" / name, self.js_folder)
            self.js = Build(["npm", "ci"], self.js_folder)

    def close(self) -> None:
        for build in (self.go, self.js):
            if build is not None:
                build.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


_BUILDS = pytest.StashKey[Builds]()


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    items = (item for item in session.items if isinstance(item, pytest.Function))
    wanted = {name for item in items for name in item.fixturenames}
    session.config.stash[_BUILDS] = builds = Builds()
    session.config.add_cleanup(builds.close)
    builds.begin(wanted)


@pytest.fixture(scope="session")
def go_program(request: pytest.FixtureRequest) -> str:
    builds = request.config.stash[_BUILDS]
    if builds.go is None:
        pytest.skip("no Go toolchain on this machine")
    status, said = builds.go.finish()
    if status == UNAVAILABLE:
        pytest.skip(f"the Go modules can't be had: {said[-200:]}")
    assert status == 0, said
    return str(builds.go_program)


@pytest.fixture(scope="session")
def js_program(request: pytest.FixtureRequest) -> list[str]:
    builds = request.config.stash[_BUILDS]
    if builds.js is None:
        pytest.skip("no npm on this machine")
    status, said = builds.js.finish()
    node = builds.js_folder / "node_modules" / "node" / "bin" / "node"
    if status or not node.exists():
        pytest.skip(f"the npm packages can't be had: {said[-200:]}")
    return [str(node), str(builds.js_folder / "peer.mjs")]
