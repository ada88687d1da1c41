"""Peers of earlier lives bring a node back though every bootstrap is gone."""

from __future__ import annotations

import pytest
import trio

from meshnode.core.known_peers import KnownPeers

OTHER_KEY = (b"of another network",)


def ids(known: KnownPeers) -> set[str]:
    return {peer.peer_id for peer in known.latest_first()}


async def test_a_node_comes_back_to_peers_it_was_linked_to_without_any_bootstrap(
    make_node, start, wait_until, autojump_clock
):
    known = KnownPeers()
    boot = make_node("boot")
    a = make_node("a", bootstraps=[boot.addr])
    b = make_node("b", bootstraps=[boot.addr], known=known)
    await start(boot, a, b)
    await wait_until(lambda: len(b.linked()) == 2, within=5)
    boot.kill()
    b.kill()
    await trio.sleep(60)

    again = make_node("b", known=known, start_seq=100)
    await start(again)

    assert await wait_until(lambda: again.online() == a.online() == set("ab"), within=5) < 1


async def test_who_only_took_calls_remembers_where_the_callers_say_they_are(
    make_node, start, wait_until, autojump_clock
):
    known = KnownPeers()
    boot = make_node("boot", known=known)
    a = make_node("a", bootstraps=[boot.addr])
    await start(boot, a)
    await wait_until(lambda: ids(known) == {a.peer_id}, within=10)
    assert known.addrs_of(a.peer_id) == (a.addr,)


async def test_after_a_power_cut_a_mesh_is_one_again_in_whatever_order_it_comes_up(
    make_node, start, wait_until, autojump_clock
):
    names = "abcdefgh"
    known = {name: KnownPeers() for name in names}
    nodes = [make_node("a", known=known["a"])]
    nodes += [make_node(n, bootstraps=[nodes[0].addr], known=known[n]) for n in names[1:]]
    await start(*nodes)
    await wait_until(lambda: all(len(n.linked()) == 7 for n in nodes), within=20)
    await trio.sleep(10)
    for node in nodes:
        node.kill()
    await trio.sleep(3600)

    nodes = []
    for name in "hcfbeg":  # two never come back
        nodes.append(make_node(name, known=known[name], start_seq=10**6))
        await start(nodes[-1])
        await trio.sleep(7)

    assert all(node.online() == set("bcefgh") for node in nodes)


async def test_two_parts_that_came_back_apart_meet_once_they_can(
    make_node, start, wait_until, network, autojump_clock
):
    names = "abcdef"
    known = {name: KnownPeers() for name in names}
    nodes = [make_node("a", known=known["a"])]
    nodes += [make_node(n, bootstraps=[nodes[0].addr], known=known[n]) for n in names[1:]]
    await start(*nodes)
    await wait_until(lambda: all(len(n.linked()) == 5 for n in nodes), within=20)
    await trio.sleep(10)
    for node in nodes:
        node.kill()
    await trio.sleep(10)

    nodes = [make_node(name, known=known[name], start_seq=10**6) for name in names]
    network.partition([[n.mesh for n in nodes[:3]], [n.mesh for n in nodes[3:]]])
    await start(*nodes)
    await trio.sleep(120)
    assert nodes[0].online() == set("abc") and nodes[5].online() == set("def")
    network.heal_all()

    assert await wait_until(lambda: all(n.online() == set(names) for n in nodes), within=60) <= 45


async def test_one_living_peer_is_found_among_two_hundred_that_are_gone(
    make_node, start, wait_until, autojump_clock
):
    known = KnownPeers()
    alive = make_node("alive")
    known.note(alive.peer_id, (alive.addr,))
    for number in range(200):
        gone = make_node(f"gone{number}")
        known.note(gone.peer_id, (gone.addr,))
    node = make_node("node", known=known)
    await start(alive, node)

    await wait_until(lambda: node.online() == {"alive", "node"}, within=120)


async def test_a_peer_that_is_of_another_network_now_is_forgotten_and_ends_nobody(
    make_node, start, autojump_clock
):
    known = KnownPeers()
    stranger = make_node("x", keys=OTHER_KEY)
    known.note(stranger.peer_id, (stranger.addr,))
    node = make_node("a", known=known)
    await start(stranger, node)
    await trio.sleep(10)
    assert node.failure is None
    assert ids(known) == set()


@pytest.mark.parametrize("moved", [True, False])
async def test_an_address_that_worked_goes_first_while_the_peer_still_tells_it(
    make_node, start, wait_until, autojump_clock, moved
):
    known = KnownPeers()
    a = make_node("a", known=known)
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await wait_until(lambda: a.ledger.get(b.peer_id) is not None, within=5)
    old = f"/ip4/10.9.9.9/tcp/1/p2p/{b.peer_id}"
    known.note(b.peer_id, (old,) if moved else (b.addr,))

    assert a.peering._dialler.addrs_of(b.peer_id) == ((b.addr, old) if moved else (b.addr,))
