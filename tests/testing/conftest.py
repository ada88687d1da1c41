"""Engines as processes of their own, as a demo or an end-to-end test starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from meshnode.testing.fixtures import real_swarm_of, swarm_of

__all__ = ["real_swarm_of", "swarm_of"]


class StartEngine:
    """start_engine("--name", "x", ...) -> the base URL of a new engine."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "meshnode.testing.engine", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready"
        return f"http://{ready['host']}:{ready['port']}"

    def stop(self) -> None:
        """End all by SIGTERM, and see that each ends well."""
        processes, self._processes = self._processes, []
        for process in processes:
            process.terminate()
        try:
            assert [process.wait(timeout=10) for process in processes] == [0] * len(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    start = StartEngine()
    yield start
    start.stop()
