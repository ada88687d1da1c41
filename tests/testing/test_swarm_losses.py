"""Losses reported in a mesh too large for everybody to be linked with everybody."""

from __future__ import annotations

import statistics

import trio
from trio.testing import MockClock

from meshnode.core.loss_report import LossReport, LostPeer, encode
from meshnode.net.loss_reports import loss_topic
from meshnode.testing.fixtures import OpenSwarm
from meshnode.testing.swarm import Swarm
from meshnode.testing.swarm_node import SwarmNode

TOPIC = loss_topic("swarm")


async def settle(swarm: Swarm) -> None:
    await swarm.wait_converged(within=15)
    await trio.sleep(5)


def report_of(observer: SwarmNode, *lost: SwarmNode) -> bytes:
    """A report by which ``observer`` says that it lost nodes that it knows."""
    entries = [observer.ledger.get(node.peer_id) for node in lost]
    return encode(
        LossReport(lost=tuple(LostPeer(id=e.peer_id, seq=e.node.seq) for e in entries if e))
    )


def counted(node: SwarmNode, outcome: str) -> float:
    registry = node.metrics.registry
    return registry.get_sample_value("meshnode_loss_reports_total", {"outcome": outcome}) or 0.0


async def test_of_sixty_nodes_all_miss_a_killed_one_within_a_second(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(60, seed=1) as swarm:
        await settle(swarm)
        after: list[float] = []
        for number in (7, 41):
            linked = swarm.nodes[number].links()
            assert linked < 30  # so that most have to be told
            swarm.kill(number)
            missed = await swarm.wait_gone(number, within=5)
            after += missed.values()
            await trio.sleep(5)
        assert len(after) == 59 + 58
        assert statistics.quantiles(after, n=100)[-1] <= 1
        assert swarm.watch.evictions == []
        sent = sum(counted(node, "sent") for node in swarm.living())
        assert sent < 2 * 10  # not every neighbour repeats what others said


async def test_who_lies_that_all_are_lost_evicts_nobody_and_is_soon_heard_no_more(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(34, seed=2) as swarm:
        await settle(swarm)
        liar, *others = swarm.nodes
        links_before = sum(node.links() for node in others)
        for _ in range(10):
            for first in range(0, len(others), 13):
                await liar.mesh.publish(TOPIC, report_of(liar, *others[first : first + 13]))
            await trio.sleep(1)
            assert swarm.awry() == []
        assert swarm.watch.evictions == []
        assert all(counted(node, "ignored") > 10 for node in others)
        # Whoever is reported lost says at once that it lives: few had to look for themselves.
        assert sum(node.links() for node in others) - links_before < 4 * len(others)
        # An honest reporter is heard as before.
        swarm.kill(17)
        assert max((await swarm.wait_gone(17, within=5)).values()) <= 1


async def test_a_report_of_a_node_that_cannot_answer_it_in_time_costs_each_one_dial(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    """Its answer is lost on all links, so everybody has to look: a few dials at a time."""
    async with swarm_of(34, seed=3) as swarm:
        await settle(swarm)
        liar, victim, *others = swarm.nodes
        victim.member.loss_reports._answer = lambda: None
        await liar.mesh.publish(TOPIC, report_of(liar, victim))
        await trio.sleep(3)
        assert swarm.awry() == []
        assert swarm.watch.evictions == []
        assert sum(counted(node, "wrong") for node in others) >= 1


async def test_reports_of_strangers_and_of_old_news_are_passed_on_and_no_more(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(5, seed=1) as swarm:
        await settle(swarm)
        speaker, hearer = swarm.nodes[1], swarm.nodes[2]
        stranger = LossReport(lost=(LostPeer(id="12D3KooWnobody", seq=1),))
        old = LossReport(lost=(LostPeer(id=swarm.nodes[3].peer_id, seq=1),))
        for report in (stranger, old):
            await speaker.mesh.publish(TOPIC, encode(report))
        await trio.sleep(3)
        assert len(hearer.ledger) == 5
        assert counted(hearer, "wrong") == counted(hearer, "confirmed") == 0


async def test_who_is_reported_lost_says_at_once_that_it_lives(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(5, seed=1) as swarm:
        await settle(swarm)
        speaker, victim = swarm.nodes[1], swarm.nodes[2]
        await trio.sleep(3)
        sent = victim.traffic.sent
        for _ in range(20):
            await speaker.mesh.publish(TOPIC, report_of(speaker, victim))
        await trio.sleep(0.2)
        assert victim.traffic.sent == sent + 1
        assert swarm.watch.evictions == []


async def test_a_flood_of_reports_is_cut_off_where_it_is_heard(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(5, seed=1) as swarm:
        await settle(swarm)
        speaker, hearer = swarm.nodes[1], swarm.nodes[2]
        stranger = encode(LossReport(lost=(LostPeer(id="12D3KooWnobody", seq=1),)))
        for _ in range(500):
            await speaker.mesh.publish(TOPIC, stranger)
        await speaker.mesh.publish(TOPIC, b"garbage")
        await trio.sleep(1)
        assert counted(hearer, "ignored") >= 480
        faults = {"protocol": "loss", "code": "bad_msgpack"}
        registry = hearer.metrics.registry
        assert registry.get_sample_value("meshnode_protocol_faults_total", faults) == 1


async def test_a_silent_node_is_missed_by_all_forty_soon_after_its_neighbours(
    swarm_of: OpenSwarm, autojump_clock: MockClock
) -> None:
    async with swarm_of(40, seed=4) as swarm:
        await settle(swarm)
        swarm.freeze(9)
        await trio.sleep(8)
        assert all(9 not in node.online for node in swarm.living() if node.number != 9)
        swarm.thaw(9)
        await swarm.wait_converged(within=10)
        assert swarm.watch.false_evictions == []
