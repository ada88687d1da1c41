from __future__ import annotations

import pytest
import trio
import trio.lowlevel

from meshnode.errors import TokenRefused
from meshnode.net.parting import DEFAULT_TARGETS


async def test_twelve_nodes_that_know_one_bootstrap_all_learn_all(
    make_node, start, wait_until, autojump_clock
):
    boot = make_node("n0")
    nodes = [boot, *(make_node(f"n{i}", bootstraps=(boot.addr,)) for i in range(1, 12))]
    everybody = {node.name for node in nodes}

    await start(*nodes)
    took = await wait_until(lambda: all(n.online() == everybody for n in nodes), within=15)

    assert took < 3
    assert all(node.peering.joined.is_set() for node in nodes)


async def test_the_mesh_stays_fresh_a_minute_after_its_bootstrap_died(
    make_node, start, wait_until, autojump_clock
):
    boot = make_node("n0")
    nodes = [make_node(f"n{i}", bootstraps=(boot.addr,)) for i in range(1, 12)]
    await start(boot, *nodes)
    everybody = {"n0", *(node.name for node in nodes)}
    await wait_until(lambda: all(n.online() == everybody for n in nodes), within=15)
    await trio.sleep(10)

    boot.kill()
    gone_after = await wait_until(
        lambda: all(n.online() == everybody - {"n0"} for n in nodes), within=5
    )
    await trio.sleep(60)

    assert gone_after < 1.5
    assert all(n.online() == everybody - {"n0"} for n in nodes)
    assert all(len(n.mesh.links()) == 10 for n in nodes)


async def test_a_joiner_whom_every_bootstrap_refuses_stops_within_3_s(
    make_node, start, wait_until, autojump_clock
):
    boots = [make_node("a"), make_node("b")]
    await start(*boots)
    stranger = make_node("x", keys=(b"wrong",), bootstraps=[boot.addr for boot in boots])

    await start(stranger)
    took = await wait_until(lambda: stranger.failure is not None, within=3)

    assert isinstance(stranger.failure, TokenRefused)
    assert took < 1


async def test_a_joiner_whom_one_of_two_bootstraps_refuses_goes_on(
    make_node, start, wait_until, autojump_clock
):
    stranger, friend = make_node("a", keys=(b"other",)), make_node("b")
    await start(stranger)
    joiner = make_node("c", bootstraps=[stranger.addr, friend.addr])

    await start(joiner)
    await trio.sleep(20)
    assert joiner.failure is None
    await start(friend)

    assert await wait_until(joiner.peering.joined.is_set, within=5) <= 2
    await trio.sleep(60)
    assert joiner.failure is None


async def test_a_refused_stranger_does_not_end_a_node_that_listens(
    make_node, start, wait_until, autojump_clock
):
    node = make_node("a")
    await start(node)
    await start(make_node("x", keys=(b"wrong",), bootstraps=[node.addr]))
    await trio.sleep(30)
    assert node.failure is None
    assert node.linked() == set()


async def test_a_bootstrap_that_comes_late_is_joined_within_two_seconds(
    make_node, start, wait_until, autojump_clock
):
    boot = make_node("late")
    node = make_node("early", bootstraps=[boot.addr])
    await start(node)
    await trio.sleep(600)
    assert not node.peering.joined.is_set()

    await start(boot)

    assert await wait_until(node.peering.joined.is_set, within=5) <= 2


async def test_a_killed_peer_is_no_candidate_within_a_second(
    make_node, start, wait_until, autojump_clock
):
    a = make_node("a")
    b, c = (make_node(name, bootstraps=[a.addr]) for name in "bc")
    await start(a, b, c)
    await wait_until(lambda: all(n.online() == set("abc") for n in (a, b, c)), within=5)
    await wait_until(lambda: len(b.linked()) == 2, within=5)

    b.kill()

    assert await wait_until(lambda: a.online() == c.online() == set("ac"), within=5) <= 1
    assert a.counted("ejections_total", reason="link_lost") == 1


async def test_a_severed_link_that_is_redialled_evicts_nobody(
    make_node, start, wait_until, network, autojump_clock
):
    a = make_node("a")
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await wait_until(lambda: a.online() == b.online() == set("ab"), within=5)

    network.sever(a.mesh, b.mesh)
    for _ in range(100):
        assert a.online() == b.online() == set("ab")
        await trio.sleep(0.05)

    assert a.linked() == {b.peer_id}


@pytest.mark.parametrize("silence", [3.0, 5.0])
async def test_a_silent_peer_is_found_within_5_s_but_a_stop_of_3_s_evicts_nobody(
    make_node, start, wait_until, network, silence, autojump_clock
):
    a = make_node("a")
    b, c = (make_node(name, bootstraps=[a.addr]) for name in "bc")
    await start(a, b, c)
    await wait_until(lambda: all(n.online() == set("abc") for n in (a, b, c)), within=5)
    await trio.sleep(10)

    network.isolate(b.mesh)
    await trio.sleep(silence)

    found = silence > 4.5
    assert a.online() == c.online() == (set("ac") if found else set("abc"))
    network.heal_all()
    await trio.sleep(6)
    assert a.online() == b.online() == c.online() == set("abc")


async def test_a_peer_that_left_is_not_dialled_and_not_brought_back(
    make_node, start, wait_until, autojump_clock
):
    a = make_node("a")
    b, c = (make_node(name, bootstraps=[a.addr]) for name in "bc")
    await start(a, b, c)
    await wait_until(lambda: all(n.online() == set("abc") for n in (a, b, c)), within=5)

    await b.announcer.say_leaving()
    assert await wait_until(lambda: a.online() == c.online() == set("ac"), within=5) < 0.2
    b.kill()
    await trio.sleep(120)

    assert a.online() == c.online() == set("ac")
    assert a.ledger.get(b.peer_id).state == "left"


async def test_two_halves_find_each_other_after_a_minute_apart(
    make_node, start, wait_until, network, autojump_clock
):
    boot = make_node("n0")
    nodes = [boot, *(make_node(f"n{i}", bootstraps=[boot.addr]) for i in range(1, 8))]
    await start(*nodes)
    everybody = {node.name for node in nodes}
    await wait_until(lambda: all(n.online() == everybody for n in nodes), within=15)
    await trio.sleep(10)

    halves = [nodes[:4], nodes[4:]]
    network.partition([[n.mesh for n in half] for half in halves])
    await trio.sleep(60)
    for half in halves:
        assert all(n.online() == {m.name for m in half} for n in half)
    network.heal_all()

    assert await wait_until(lambda: all(n.online() == everybody for n in nodes), within=20) <= 10


async def test_links_to_all_wait_until_nobody_joins_any_more(
    make_node, start, wait_until, autojump_clock
):
    """Fifty that start at once on a small machine need its time for the links that join them."""
    boot = make_node("n0")
    nodes = [boot, *(make_node(f"n{i}", bootstraps=(boot.addr,)) for i in range(1, 20))]
    for node in nodes:
        await start(node)
        await trio.sleep(0.7)

    def links():
        return sum(len(node.mesh.links()) for node in nodes) / 2

    assert links() <= 5 * (len(nodes) - 1)
    took = await wait_until(lambda: all(len(n.mesh.links()) == 19 for n in nodes), within=15)
    assert took < 5


async def test_a_mesh_that_never_stops_growing_becomes_whole_all_the_same(
    make_node, start, autojump_clock
):
    boot = make_node("n0")
    nodes = [boot, *(make_node(f"n{i}", bootstraps=(boot.addr,)) for i in range(1, 60))]
    for node in nodes:
        await start(node)
        await trio.sleep(0.7)

    joined_18_s_ago = nodes[:-26]
    assert min(len(n.mesh.links()) for n in joined_18_s_ago) >= DEFAULT_TARGETS.min_links
    assert min(len(n.mesh.links()) for n in nodes) < DEFAULT_TARGETS.min_links


async def test_beyond_thirty_nodes_each_keeps_some_links_and_all_hear_all(
    make_node, start, wait_until, autojump_clock
):
    boot = make_node("n0")
    nodes = [boot, *(make_node(f"n{i}", bootstraps=[boot.addr]) for i in range(1, 50))]
    await start(*nodes)
    everybody = {node.name for node in nodes}
    await wait_until(lambda: all(n.online() == everybody for n in nodes), within=15, step=0.5)
    await trio.sleep(45)

    assert all(n.online() == everybody for n in nodes)
    assert min(len(n.mesh.links()) for n in nodes) >= 6


async def test_a_node_alone_has_joined(make_node, start, autojump_clock):
    node = make_node("a")
    await start(node)
    await trio.lowlevel.checkpoint()
    assert node.peering.joined.is_set()
    assert node.online() == {"a"}


async def test_a_node_killed_and_started_again_is_heard_at_once(
    make_node, start, wait_until, autojump_clock
):
    a = make_node("a")
    b = make_node("b", bootstraps=[a.addr], start_seq=5000)
    await start(a, b)
    await wait_until(lambda: a.online() == b.online() == set("ab"), within=5)
    b.kill()
    await wait_until(lambda: a.online() == {"a"}, within=5)

    # Its clock was set back, so its Seq starts below what it said before.
    again = make_node("b", bootstraps=[a.addr], start_seq=10)
    await start(again)

    assert await wait_until(lambda: a.online() == again.online() == set("ab"), within=30) < 2
    await trio.sleep(60)
    assert a.online() == set("ab")
