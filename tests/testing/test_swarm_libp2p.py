"""The same swarm on real sockets: joining, a death, a return, an orderly end."""

from __future__ import annotations

import pytest
import trio

from meshnode.errors import ConfigError
from meshnode.testing.fixtures import OpenSwarm


async def test_eight_on_sockets_meet_miss_a_killed_one_and_take_it_back(
    real_swarm_of: OpenSwarm,
) -> None:
    with trio.fail_after(60):
        async with real_swarm_of(8) as swarm:
            await swarm.wait_converged(within=20)
            await swarm.wait_linked(7, within=20)
            addr = swarm.nodes[5].addr
            swarm.kill(5)
            missed_after = await swarm.wait_gone(5, within=10)
            assert set(missed_after) == {0, 1, 2, 3, 4, 6, 7}
            await swarm.restart(5, clock_offset=-3600.0)
            await swarm.wait_converged(within=20)
            assert swarm.nodes[5].addr == addr
            assert swarm.watch.false_evictions == []
        for node in swarm.nodes:
            with pytest.raises(OSError, match="all attempts"):
                await trio.open_tcp_stream("127.0.0.1", int(addr_port(node.addr)))


async def test_links_that_form_all_at_once_on_one_core_wrong_nobody(
    real_swarm_of: OpenSwarm,
) -> None:
    # Dials cross, and some connections are closed as second ones; one failed redial is no death.
    with trio.fail_after(100):
        async with real_swarm_of(20) as swarm:
            await swarm.wait_converged(within=60)
            await swarm.wait_linked(19, within=60)
            assert swarm.watch.false_evictions == []


def addr_port(addr: str) -> str:
    return addr.split("/")[4]


async def test_links_on_real_sockets_cannot_be_cut_from_within(real_swarm_of: OpenSwarm) -> None:
    with trio.fail_after(30):
        async with real_swarm_of(1) as swarm:
            with pytest.raises(ConfigError, match="mesh=memory"):
                swarm.partition([[0]])
            with pytest.raises(ConfigError, match="mesh=memory"):
                swarm.freeze(0)
        with pytest.raises(ConfigError, match="mesh=memory"):
            async with real_swarm_of(1, loss=0.5):
                pass
