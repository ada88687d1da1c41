"""The graph of links: out of a star, through deaths one by one and many at once."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from meshnode.net.parting import DEFAULT_TARGETS
from meshnode.testing.fixtures import OpenSwarm
from meshnode.testing.swarm import Swarm

HUB = 0
MIN_LINKS = DEFAULT_TARGETS.min_links


def graph_of(swarm: Swarm) -> dict[int, set[int]]:
    """Return whom each living node is linked to, living ones only."""
    numbers = {node.peer_id: node.number for node in swarm.living()}
    return {
        node.number: {numbers[k.peer_id] for k in node.mesh.links() if k.peer_id in numbers}
        for node in swarm.living()
    }


def without(graph: dict[int, set[int]], gone: set[int]) -> dict[int, set[int]]:
    return {number: linked - gone for number, linked in graph.items() if number not in gone}


def is_connected(graph: dict[int, set[int]]) -> bool:
    start = next(iter(graph))
    seen, frontier = {start}, [start]
    while frontier:
        new = graph[frontier.pop()] - seen
        seen |= new
        frontier.extend(new)
    return len(seen) == len(graph)


async def test_leaves_that_know_the_hub_alone_become_a_random_graph_without_it(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(45, seed=1) as swarm:
        await swarm.wait_converged(within=10)
        await trio.sleep(5)
        leaves = without(graph_of(swarm), {HUB})
        assert is_connected(leaves)
        assert min(len(linked) for linked in leaves.values()) >= MIN_LINKS - 1
        # No second hub in place of the first.
        assert max(len(linked) for linked in leaves.values()) < 30


@pytest.mark.parametrize(("n", "seed"), [(20, 1), pytest.param(40, 2, marks=pytest.mark.slow)])
async def test_the_bootstrap_and_then_half_of_the_rest_die_and_no_survivor_is_ever_alone(
    swarm_of: OpenSwarm, autojump_clock: MockClock, n: int, seed: int
) -> None:
    async with swarm_of(n, seed=seed) as swarm:
        await swarm.wait_converged(within=10)
        await trio.sleep(5)
        for victim in [HUB, *swarm.rng.sample(range(1, n), (n - 1) // 2)]:
            swarm.kill(victim)
            await trio.sleep(0.3)
            graph = graph_of(swarm)
            assert all(graph.values()), f"alone after the death of {victim}"
            assert is_connected(graph)
        await swarm.wait_converged(within=10)
        assert swarm.watch.false_evictions == []


@pytest.mark.slow
async def test_fifty_nodes_are_one_graph_when_fifteen_die_at_once(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(50, seed=3) as swarm:
        await swarm.wait_converged(within=10)
        await trio.sleep(2)
        victims = set(swarm.rng.sample(range(1, 50), 14)) | {HUB}
        # Before anybody could mend anything, too.
        assert is_connected(without(graph_of(swarm), victims))
        for victim in victims:
            swarm.kill(victim)
        await trio.sleep(3)
        assert is_connected(graph_of(swarm))
        # Half mended after three seconds; the dead are still among those that it tries.
        assert min(len(linked) for linked in graph_of(swarm).values()) >= MIN_LINKS // 2
        assert swarm.watch.false_evictions == []
