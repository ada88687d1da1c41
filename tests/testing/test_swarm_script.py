"""A script's words, and the report of a run that followed one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from meshnode.errors import ConfigError
from meshnode.testing.fixtures import OpenSwarm
from meshnode.testing.swarm import open_swarm
from meshnode.testing.swarm_plot import draw
from meshnode.testing.swarm_report import report_of, spread
from meshnode.testing.swarm_script import Action, Step, parse_step, play

STEPS = (
    parse_step("skew", "2:-3600@1"),
    parse_step("kill", "20%@5"),
    parse_step("restart", "all@10"),
    parse_step("cut", "50%@15+10"),
    parse_step("freeze", "#3@30+3"),
    parse_step("stop", "#4@35"),
)


def run_once(seed: int) -> str:
    """Play STEPS on twelve nodes; return the report as it would be written."""
    random.seed()  # nobody's dice but the swarm's own may matter

    async def main() -> str:
        async with open_swarm(12, seed=seed) as swarm:
            await play(swarm, STEPS, duration=45, patience=30)
            return json.dumps(report_of(swarm, seed=seed, steps=[str(s) for s in STEPS]))

    return trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_same_seed_gives_the_same_report_to_the_byte_and_another_seed_another() -> None:
    first = run_once(7)
    assert run_once(7) == first
    assert run_once(8) != first


def test_a_script_does_what_it_says_and_the_report_says_what_it_did() -> None:
    report = json.loads(run_once(7))
    assert report["schema_version"] == 1
    assert (report["nodes"], report["living"]) == (12, 11)  # node 4 was told to stop
    assert report["converged"] is True
    assert report["false_evictions"] == 0
    assert report["evictions"]["by_kind"]["cut"] > 0
    labels = [one["after"] for one in report["convergence"]]
    assert labels == ["start", "restart all@10", "heal 50%@25", "stop #4@35", "end"]
    assert [death["leaving"] for death in report["deaths"]] == [False, False, True]
    assert report["detection"]["count"] == 2 * 10  # two killed at once, noticed by ten each
    assert report["detection"]["max_s"] <= 1
    assert report["per_node"]["cpu_s"] is None  # it would differ from run to run
    assert report["per_node"]["announcements_heard"] > 0


@pytest.mark.parametrize(
    ("action", "text", "step"),
    [
        ("kill", "10%@5", Step("kill", "10%", 5.0)),
        ("kill", "#0@2.5", Step("kill", "#0", 2.5)),
        ("restart", "all@15", Step("restart", "all", 15.0)),
        ("cut", "50%@10+60", Step("cut", "50%", 10.0, 60.0)),
        ("skew", "3:-3600@1", Step("skew", "3", 1.0, 0.0, -3600.0)),
    ],
)
def test_a_step_is_whom_when_and_for_how_long(action: Action, text: str, step: Step) -> None:
    assert parse_step(action, text) == step


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("kill", "ten@5"),
        ("kill", "3"),
        ("kill", "3@5+2"),
        ("kill", "3:1@5"),
        ("cut", "3@5"),
        ("skew", "3@5"),
        ("kill", "3@-5"),
        ("kill", ""),
    ],
)
def test_a_step_that_makes_no_sense_is_answered_with_the_form(action: Action, text: str) -> None:
    with pytest.raises(ConfigError, match=r"e\.g\."):
        parse_step(action, text)


def test_quantiles_are_values_that_occurred() -> None:
    made = spread([float(n) for n in range(1, 101)])
    assert (made.count, made.p50, made.p99, made.max) == (100, 50.0, 99.0, 100.0)
    assert spread([]).max is None
    assert spread([3.0]).p50 == 3.0


async def test_a_swarm_that_fails_to_converge_is_reported_as_such(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(4, seed=1) as swarm:
        await swarm.wait_converged(within=5)
        swarm.nodes[1].member.peering.report_unreachable(swarm.nodes[2].peer_id, "made up")
        with pytest.raises(TimeoutError, match=r"node 1 misses \[2\]"):
            await swarm.wait_converged(within=0.1, label="slander")
        report = report_of(swarm, seed=1)
        assert report["false_evictions"] == 1
        assert report["converged"] is False


def test_a_report_is_drawn_as_a_png(tmp_path: Path) -> None:
    path = tmp_path / "swarm.png"
    draw(json.loads(run_once(7)), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 10_000


def test_a_picture_without_matplotlib_names_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'meshnode\[plot\]'"):
        draw({}, tmp_path / "swarm.png")
