"""A swarm of members on the virtual clock does to its ledgers what each test says."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from meshnode.errors import ConfigError
from meshnode.testing.fixtures import OpenSwarm
from meshnode.testing.swarm import MeshKind, Swarm

SETTLED = 5.0  # seconds after convergence: every link stands
HOUR = 3600.0


async def settle(swarm: Swarm) -> None:
    await swarm.wait_converged(within=10)
    await trio.sleep(SETTLED)


async def test_all_know_all_within_two_seconds_of_starting_at_once(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        assert await swarm.wait_converged(within=2) <= 2
        assert all(node.online == set(range(20)) for node in swarm.nodes)


async def test_a_killed_node_is_missed_by_all_within_a_second(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        await settle(swarm)
        swarm.kill(7)
        missed_after = await swarm.wait_gone(7, within=5)
        assert set(missed_after) == set(range(20)) - {7}
        assert max(missed_after.values()) <= 1
        assert swarm.watch.evictions == []


async def test_three_in_ten_killed_at_once_leave_the_rest_agreed_and_nobody_wronged(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
) -> None:
    async with swarm_of(20, seed=2) as swarm:
        await settle(swarm)
        for number in swarm.choose(6):
            swarm.kill(number)
        assert await swarm.wait_converged(within=6) <= 6
        assert len(swarm.living()) == 14
        assert swarm.watch.false_evictions == []


async def test_the_bootstrap_is_not_needed_once_all_have_met(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(12, seed=3) as swarm:
        await settle(swarm)
        swarm.kill(0)
        await swarm.wait_converged(within=5)
        for number in range(1, 6):
            swarm.kill(number)
            await swarm.wait_converged(within=5)
            await trio.sleep(2)
        assert all(node.links() == 5 for node in swarm.living())


async def test_a_node_that_says_goodbye_is_gone_at_once_and_by_its_word(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
) -> None:
    async with swarm_of(10, seed=1) as swarm:
        await settle(swarm)
        await swarm.stop(4)
        await swarm.wait_gone(4, within=1)
        entry = swarm.nodes[5].ledger.get(swarm.nodes[4].peer_id)
        assert entry is not None and entry.state == "left"


async def test_a_node_restarted_with_its_clock_an_hour_back_is_heard_again(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        await settle(swarm)
        swarm.kill(3)
        await swarm.wait_gone(3, within=5)
        await swarm.restart(3, clock_offset=-HOUR)
        assert await swarm.wait_converged(within=10) <= 10
        before = {n.number: seq_of(swarm, n.number, 3) for n in swarm.living() if n.number != 3}
        await trio.sleep(25)
        # Heard, not merely believed alive: its news gets through.
        assert all(seq_of(swarm, number, 3) > seq for number, seq in before.items())


def seq_of(swarm: Swarm, observer: int, target: int) -> int:
    entry = swarm.nodes[observer].ledger.get(swarm.nodes[target].peer_id)
    assert entry is not None
    return entry.node.seq


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
async def test_clocks_an_hour_off_evict_nobody(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
    seconds: float,
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        await settle(swarm)
        for number in swarm.choose(5):
            swarm.skew(number, seconds)
        await trio.sleep(60)
        assert swarm.watch.evictions == []
        assert swarm.awry() == []


async def test_both_sides_of_a_partition_lose_each_other_and_are_one_again_when_it_heals(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        await settle(swarm)
        swarm.partition([range(10)])
        await swarm.wait_converged(within=20)
        assert swarm.nodes[3].online == set(range(10))
        assert swarm.nodes[13].online == set(range(10, 20))
        await trio.sleep(60)
        swarm.heal()
        assert await swarm.wait_converged(within=10) <= 10
        assert {one.kind for one in swarm.watch.evictions} == {"cut"}


async def test_a_stop_of_three_seconds_evicts_nobody(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        await settle(swarm)
        for number in swarm.choose(3):
            swarm.freeze(number)
        await trio.sleep(3)
        for node in swarm.nodes:
            if node.is_frozen:
                swarm.thaw(node.number)
        await trio.sleep(10)
        assert swarm.watch.evictions == []


async def test_a_node_that_stays_stopped_is_missed_within_five_seconds_and_returns(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
) -> None:
    async with swarm_of(20, seed=1) as swarm:
        await settle(swarm)
        swarm.freeze(5)
        await trio.sleep(5)
        assert all(5 not in node.online for node in swarm.living() if node.number != 5)
        # It stood still itself, and knows that this proves nothing against the others.
        assert swarm.nodes[5].online == set(range(20))
        swarm.thaw(5)
        assert await swarm.wait_converged(within=10) <= 10
        assert swarm.watch.false_evictions == []


async def test_minutes_of_lost_announcements_wrongs_nobody(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(10, seed=1, loss=0.05) as swarm:
        await settle(swarm)
        await trio.sleep(300)
        assert swarm.watch.evictions == []
        assert swarm.awry() == []


async def test_pretended_memory_differs_and_its_change_is_heard(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(8, seed=1) as swarm:
        await settle(swarm)
        assert len({node.gpu.total for node in swarm.nodes}) == 7
        swarm.nodes[2].set_vram(123)
        await trio.sleep(1.1)
        told = [node.ledger.get(swarm.nodes[2].peer_id) for node in swarm.nodes]
        assert [entry.node.available_vram for entry in told if entry] == [123] * 8


async def test_a_false_eviction_does_not_go_unnoticed(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(3, seed=1) as swarm:
        await settle(swarm)
        victim = swarm.nodes[2].peer_id
        swarm.nodes[1].member.peering.report_unreachable(victim, "made up by this test")
        (eviction,) = swarm.watch.false_evictions
        assert (eviction.observer, eviction.target) == (1, 2)
        assert "made up by this test" in eviction.reason


async def test_the_end_of_a_swarm_is_nobodys_eviction(
    swarm_of: OpenSwarm,
    autojump_clock: MockClock,
) -> None:
    async with swarm_of(12, seed=1) as swarm:
        await settle(swarm)
    assert swarm.watch.evictions == []


async def test_what_a_swarm_cannot_do_is_said(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    with pytest.raises(ConfigError, match="at least one node"):
        async with swarm_of(0):
            pass
    async with swarm_of(2) as swarm:
        swarm.kill(1)
        with pytest.raises(ConfigError, match="node 1 of this swarm is not running"):
            swarm.kill(1)
        with pytest.raises(ConfigError, match="has not died"):
            await swarm.wait_gone(0, within=1)


def test_many_nodes_of_one_process_may_say_less_than_one_core_can_hear() -> None:
    def budget_of(mesh: MeshKind, n: int) -> float:
        settings = {"announce_interval": 10.0, "online_window": 40.0, "loss": 0.0}
        return Swarm(mesh, n, random.Random(0), vram=(1,), **settings).announce_budget

    assert budget_of("libp2p", 20) == 20  # as anywhere
    assert budget_of("libp2p", 200) == 3  # 600 each second in all
    assert budget_of("memory", 200) == 20  # time waits for it
