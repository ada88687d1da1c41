"""Peers that another discovery found are dialled by the same rules as those of the ledger."""

from __future__ import annotations

import trio


def addrs_of(node) -> tuple[str, ...]:
    return (node.addr,)


async def test_two_nodes_without_bootstraps_meet_when_one_finds_the_other(
    make_node, start, wait_until, autojump_clock
):
    a, b = make_node("a"), make_node("b")
    await start(a, b)
    a.peering.found(addrs_of(b))
    assert await wait_until(lambda: a.online() == b.online() == set("ab"), within=5) < 1


async def test_two_that_find_each_other_at_once_and_often_keep_one_link(
    make_node, start, wait_until, autojump_clock
):
    a, b = make_node("a"), make_node("b")
    await start(a, b)
    for _ in range(100):
        a.peering.found(addrs_of(b))
        b.peering.found(addrs_of(a))
    await wait_until(lambda: a.online() == b.online() == set("ab"), within=5)
    await trio.sleep(5)
    assert len(a.mesh.links()) == len(b.mesh.links()) == 1


async def test_a_found_peer_with_another_token_is_refused_and_nobody_ends(
    make_node, start, autojump_clock
):
    a, stranger = make_node("a"), make_node("x", keys=(b"other",))
    await start(a, stranger)
    for _ in range(20):
        a.peering.found(addrs_of(stranger))
        await trio.sleep(1)
    assert a.failure is None and stranger.failure is None
    assert a.linked() == set()


async def test_finding_oneself_or_nobody_home_does_nothing(make_node, start, autojump_clock):
    a = make_node("a")
    await start(a)
    a.peering.found(addrs_of(a))
    a.peering.found((f"/memory/nowhere/p2p/{a.peer_id[:-1]}x",))
    await trio.sleep(10)
    assert a.failure is None
    assert a.linked() == set()
