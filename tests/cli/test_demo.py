from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from meshnode.cli.demo_run import can_be_picked

# Two cores shared with other tests; alone it takes 8 s.
LIMIT = 90


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "meshnode", "demo", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "MESHNODE_NAME": "not-for-the-demo"},
    )


def wait_until_it_stays(process: subprocess.Popen[str]) -> list[psutil.Process]:
    for line in process.stdout:
        if "Try:" in line:
            return psutil.Process(process.pid).children()
    raise AssertionError(process.stderr.read())


def test_a_node_whose_engine_was_not_asked_yet_is_waited_for() -> None:
    peer = {"online": True, "connected": True, "services": [{"models": ["demo-model"]}]}
    assert can_be_picked(peer)
    assert not can_be_picked(peer | {"services": [{"models": []}]})
    assert not can_be_picked(peer | {"services": []})
    assert not can_be_picked(peer | {"online": False})
    assert not can_be_picked(peer | {"connected": False})


@pytest.mark.slow
def test_once_shows_the_biggest_first_and_eight_spread_over_all_three(tmp_path):
    with start(tmp_path, "--once", "--json") as process:
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["schema_version"] == 1
    assert told["first"]["served_by"] == "gpu-24"
    assert told["first"]["tier"] == "vram"
    assert "24 GiB" in told["first"]["text"]
    assert sorted(told["at_once"]["served_by"].values()) == [2, 3, 3]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_leaves_no_process_and_no_file_behind(tmp_path, number, code):
    with start(tmp_path) as process:
        nodes = wait_until_it_stays(process)
        assert len(nodes) == 4
        process.send_signal(number)
        process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert not any(node.is_running() for node in nodes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_node_that_dies_ends_the_demo_with_its_name(tmp_path):
    with start(tmp_path) as process:
        nodes = wait_until_it_stays(process)
        nodes[1].kill()
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "ended with exit code -9" in err
    assert err.count("\n") == 1
    assert not any(node.is_running() for node in nodes)
    assert list(tmp_path.iterdir()) == []
