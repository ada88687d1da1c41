"""``meshnode swarm``: a report on stdout, repeatable, and a verdict as exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def swarm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshnode", "swarm", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_two_processes_with_one_seed_print_the_same_bytes(tmp_path: Path) -> None:
    order = ("-n", "12", "--seed", "5", "--json", "--duration", "10", "--kill", "10%@3")
    first = swarm(*order)
    again = swarm(*order, "--plot", str(tmp_path / "swarm.png"))
    assert (first.returncode, first.stderr) == (0, "")
    assert again.stdout == first.stdout
    report = json.loads(first.stdout)
    assert (report["schema_version"], report["nodes"], report["living"]) == (1, 12, 11)
    assert (tmp_path / "swarm.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_script_a_tenth_dies_and_returns() -> None:
    result = swarm("-n", "10", "--loss", "0.05")
    assert result.returncode == 0, result.stderr
    assert "10 nodes on memory, seed 0" in result.stdout
    assert "right after restart all@15" in result.stdout
    assert "false evictions" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--mesh", "carrier-pigeon"), "choose memory or libp2p"),
        (("-n", "0"), "give a number"),
        (("--kill", "some@5"), "say WHO@AT"),
        (("--kill", "#20@5", "-n", "20"), "there is no node 20"),
        (("--mesh", "libp2p", "--cut", "50%@1+5"), "needs --mesh memory"),
        (("--mesh", "libp2p", "--loss", "0.1"), "needs --mesh memory"),
        (("--loss", "1"), "below 1"),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_refused_at_once(
    arguments: tuple[str, ...], complaint: str
) -> None:
    result = swarm(*arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert result.stdout == ""


def test_an_interrupt_gives_the_report_so_far() -> None:
    order = ["-n", "4", "--mesh", "libp2p", "--json", "--kill", "1@600", "--log-level", "info"]
    child = subprocess.Popen(
        [sys.executable, "-m", "meshnode", "swarm", *order],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if "link_up" in line:
                break
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=30)
    finally:
        child.kill()
        child.communicate()
    report = json.loads(out)
    assert child.returncode == 130
    assert (report["complete"], report["nodes"], report["mesh"]) == (False, 4, "libp2p")
    assert report["run"]["cpu_s"] > 0
