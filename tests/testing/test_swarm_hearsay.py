"""A newcomer that is told of a peer which has just died: records outlive their owners."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.testing.fixtures import OpenSwarm

GHOST, NEWCOMER, WITNESS = 5, 4, 1


@pytest.mark.parametrize("n", [8, 34])
async def test_a_dead_peer_that_others_told_of_as_alive_is_soon_found_dead(
    swarm_of: OpenSwarm, autojump_clock: MockClock, n: int
) -> None:
    """All reports of its death were out before the newcomer could hear them."""
    async with swarm_of(n, seed=1) as swarm:
        await swarm.wait_converged(within=15)
        await trio.sleep(5)
        told = swarm.nodes[WITNESS].ledger.get(swarm.nodes[GHOST].peer_id)
        assert told is not None
        swarm.kill(GHOST)
        await swarm.wait_gone(GHOST, within=5)
        await trio.sleep(10)
        await swarm.restart(NEWCOMER)
        await trio.sleep(1)  # its first comparison of ledgers is over
        newcomer = swarm.nodes[NEWCOMER]
        newcomer.member.hearer.take_record(told.envelope, 1.0)
        assert GHOST in newcomer.online
        # All of a small mesh are dialled at once; of a large one, ledgers are compared.
        await trio.sleep(2 if n < 30 else 10)
        assert GHOST not in newcomer.online
        await swarm.wait_converged(within=5)
        assert swarm.watch.false_evictions == []


async def test_a_peer_that_cannot_be_dialled_is_believed_once_it_speaks_itself(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(6, seed=2) as swarm:
        await swarm.wait_converged(within=15)
        await trio.sleep(5)
        swarm.kill(NEWCOMER)
        await swarm.wait_gone(NEWCOMER, within=5)
        swarm.cut(NEWCOMER, GHOST)  # others carry what the two say
        await swarm.restart(NEWCOMER)
        await trio.sleep(20)
        online = [GHOST in swarm.nodes[NEWCOMER].online]
        for _ in range(60):
            await trio.sleep(1)
            online.append(GHOST in swarm.nodes[NEWCOMER].online)
        assert all(online)
