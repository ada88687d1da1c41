"""Engines as processes of their own, as a demo or an end-to-end test starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

StartEngine = Callable[..., str]


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    """start_engine("--name", "x", ...) -> its base URL. All must end well on SIGTERM."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "meshnode.testing.engine", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready"
        return f"http://{ready['host']}:{ready['port']}"

    yield start
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
