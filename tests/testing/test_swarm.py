"""A swarm of members on the virtual clock does to its ledgers what each test says."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from meshnode.testing.fixtures import OpenSwarm
from meshnode.testing.swarm import Swarm

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
