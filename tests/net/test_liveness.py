"""Who is taken for dead, and what this node holds against itself first; on the virtual clock."""

from __future__ import annotations

import pytest
import trio

from meshnode.errors import PeerLate, PeerUnreachable

BOTH = 2.0  # seconds: links stand and announcements went round


def state_of(observer, target):
    """What ``observer`` says of ``target``: (state, reason)."""
    entry = observer.ledger.get(target.peer_id)
    return entry.state_at(trio.current_time()), entry.reason_at(trio.current_time())


# Each test asks for the clock itself: pytest-trio overlooks one that only a fixture asks for.


@pytest.fixture
async def trio_of_nodes(make_node, start, wait_until, autojump_clock):
    a = make_node("a")
    b, c = (make_node(name, bootstraps=[a.addr]) for name in "bc")
    await start(a, b, c)
    await wait_until(lambda: all(n.online() == set("abc") for n in (a, b, c)), within=5)
    await wait_until(lambda: all(len(n.linked()) == 2 for n in (a, b, c)), within=5)
    await trio.sleep(10)
    return a, b, c


@pytest.fixture
async def five_nodes(make_node, start, wait_until, autojump_clock):
    boot = make_node("n0")
    nodes = [boot, *(make_node(f"n{i}", bootstraps=[boot.addr]) for i in range(1, 5))]
    await start(*nodes)
    everybody = {node.name for node in nodes}
    await wait_until(lambda: all(n.online() == everybody for n in nodes), within=5)
    await wait_until(lambda: all(len(n.linked()) == 4 for n in nodes), within=5)
    await trio.sleep(10)
    return nodes


async def test_a_late_answer_makes_suspect_and_the_answer_clears(
    make_node, start, wait_until, network, autojump_clock
):
    a = make_node("a")
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await wait_until(lambda: a.online() == b.online() == set("ab"), within=5)
    await trio.sleep(10)
    network.cut(a.mesh, b.mesh)
    await trio.sleep(2.9)
    state, reason = state_of(a, b)
    assert state == "suspect"
    assert reason.startswith("no answer to a ping for 1.")
    assert a.online() == set("ab")
    network.heal_all()
    await trio.sleep(1)
    assert state_of(a, b)[0] == "up"


async def test_a_busy_peer_that_answers_no_ping_is_not_evicted(
    trio_of_nodes, monkeypatch, autojump_clock
):
    """It streams: bytes come, but its answer is stuck behind megabytes of them."""
    a, b, _ = trio_of_nodes

    async def unanswered(peer_id, *, timeout):
        await trio.sleep(timeout)
        raise PeerUnreachable("no answer to a ping")

    monkeypatch.setattr(a.mesh, "ping", unanswered)
    end = a.memory_mesh.link_end(b.peer_id)
    for _ in range(40):  # a byte every 1.5 s: idle enough to be asked each time
        await trio.sleep(1.5)
        end.last_received = trio.current_time()
        assert "b" in a.online()
    assert a.counted("ejections_total", reason="ping_timeout") <= 1  # c, which does not stream
    assert state_of(a, b)[0] == "up"


async def test_a_question_that_was_open_while_this_node_stood_still_is_asked_again(
    trio_of_nodes, network, autojump_clock
):
    """The answer to the late ping comes half a second after the loop runs again."""
    a, b, c = trio_of_nodes
    network.cut(a.mesh, b.mesh)
    await trio.sleep(3.2)
    network.delay(a.mesh, b.mesh, 0.3)
    autojump_clock.jump(10)  # nothing runs meanwhile: the loop stands still
    network.heal_all()
    await trio.sleep(3)
    assert a.online() == b.online() == c.online() == set("abc")
    assert state_of(a, b)[0] == state_of(b, a)[0] == "up"
    for node in (a, b, c):
        assert node.counted("ejections_total", reason="ping_timeout") == 0


@pytest.fixture
def redials_fail(monkeypatch):
    """Make every dial of a node fail as told after a while; end that by calling what it returns."""

    def fail(node, failure, *, after):
        dial = node.mesh.dial

        async def fail_to_dial(addr, *, timeout, patience=0.0):
            await trio.sleep(min(after, timeout))
            raise failure

        monkeypatch.setattr(node.mesh, "dial", fail_to_dial)
        return lambda: monkeypatch.setattr(node.mesh, "dial", dial)

    return fail


async def test_one_that_takes_connections_but_is_too_busy_to_answer_is_suspect_first(
    trio_of_nodes, network, redials_fail, wait_until, autojump_clock
):
    a, b, _ = trio_of_nodes
    restore = redials_fail(a, PeerLate("did not answer within 2 s"), after=2)
    redials_fail(b, PeerLate("did not answer within 2 s"), after=2)
    network.sever(a.mesh, b.mesh)
    await trio.sleep(6)
    assert state_of(a, b)[0] == "suspect"
    restore()
    await wait_until(lambda: state_of(a, b)[0] == "up", within=4)
    assert a.counted("ejections_total", reason="link_lost") == 0


async def test_one_that_takes_connections_and_never_answers_is_out_in_the_end(
    make_node, start, wait_until, network, redials_fail, autojump_clock
):
    a = make_node("a")
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await wait_until(lambda: a.online() == b.online() == set("ab"), within=5)
    for node in (a, b):
        redials_fail(node, PeerLate("did not answer within 2 s"), after=2)
    await trio.sleep(10)
    network.sever(a.mesh, b.mesh)
    assert 8 <= await wait_until(lambda: a.online() == {"a"}, within=15) <= 11
    assert "did not answer within 2 s" in state_of(a, b)[1]


async def test_one_that_is_heard_meanwhile_is_not_lost_for_being_late(
    trio_of_nodes, network, redials_fail, autojump_clock
):
    """It is too busy for a handshake, and others pass on what it announces."""
    a, b, _ = trio_of_nodes
    for node in (a, b):
        redials_fail(node, PeerLate("did not answer within 2 s"), after=2)
    network.sever(a.mesh, b.mesh)
    await trio.sleep(1)
    b.announcer.say_now()
    await trio.sleep(20)
    assert a.counted("ejections_total", reason="link_lost") == 0
    assert "b" in a.online()


async def test_one_that_refuses_is_out_at_once_whatever_is_still_heard_of_it(
    trio_of_nodes, network, redials_fail, autojump_clock
):
    a, b, _ = trio_of_nodes
    for node in (a, b):
        redials_fail(node, PeerUnreachable("connection refused"), after=0.01)
    network.sever(a.mesh, b.mesh)
    b.announcer.say_now()
    await trio.sleep(0.5)
    assert a.counted("ejections_total", reason="link_lost") == 1


async def test_a_dead_peer_is_out_before_its_link_has_been_closed(
    trio_of_nodes, network, monkeypatch, autojump_clock
):
    """What was still to be sent, and a goodbye, wait a while on a link that takes nothing."""
    a, b, _ = trio_of_nodes
    close = a.mesh.disconnect

    async def close_slowly(peer_id, reason):
        await trio.sleep(2)
        await close(peer_id, reason)

    monkeypatch.setattr(a.mesh, "disconnect", close_slowly)
    network.cut(a.mesh, b.mesh)
    await trio.sleep(5)
    assert state_of(a, b)[0] == "offline"


async def test_a_stall_longer_than_the_window_evicts_nobody(trio_of_nodes, autojump_clock):
    a, b, c = trio_of_nodes
    autojump_clock.jump(300)
    await trio.sleep(20)
    assert a.online() == b.online() == c.online() == set("abc")
    assert a.counted("ejections_total", reason="silent") == 0


async def test_when_all_fall_silent_at_once_this_node_suspects_itself_first(
    five_nodes, network, autojump_clock
):
    """Its cable is out: nobody is evicted for some seconds, and then for an honest reason."""
    one, *others = five_nodes
    network.isolate(one.mesh)
    await trio.sleep(6)
    for other in others:
        state, reason = state_of(one, other)
        assert (state, reason) == (
            "suspect",
            "this node may be cut off itself: 4 of 4 links fell silent at once",
        )
    assert one.online() == {node.name for node in five_nodes}
    assert all(one.name not in other.online() for other in others)  # they lost only one

    await trio.sleep(5)
    for other in others:
        state, reason = state_of(one, other)
        assert state == "offline"
        assert reason.startswith("ping_timeout: ")
        assert "this node may be cut off itself" in reason
    assert one.online() == {one.name}


async def test_a_cable_that_is_back_in_time_costs_nothing(five_nodes, network, autojump_clock):
    one, *others = five_nodes
    network.isolate(one.mesh)
    await trio.sleep(4.8)  # all pings of this node have failed by now
    assert {state_of(one, other)[0] for other in others} == {"suspect"}
    network.heal_all()
    await trio.sleep(1)
    assert {state_of(one, other)[0] for other in others} == {"up"}
    assert one.counted("ejections_total", reason="ping_timeout") == 0


async def test_a_cable_that_is_back_late_heals_without_a_restart(
    five_nodes, network, wait_until, autojump_clock
):
    one, *others = five_nodes
    everybody = {node.name for node in five_nodes}
    network.isolate(one.mesh)
    await trio.sleep(90)
    assert one.online() == {one.name}
    network.heal_all()
    assert (
        await wait_until(lambda: all(node.online() == everybody for node in five_nodes), within=20)
        <= 10
    )
    assert state_of(one, others[0])[0] == "up"


async def test_one_of_many_that_falls_silent_is_judged_without_self_suspicion(
    five_nodes, network, wait_until, autojump_clock
):
    one, *others = five_nodes
    network.isolate(others[0].mesh)
    assert await wait_until(lambda: others[0].name not in one.online(), within=6) <= 5
    assert "cut off" not in state_of(one, others[0])[1]


async def test_of_two_nodes_each_judges_the_other_at_once(
    make_node, start, wait_until, network, autojump_clock
):
    a = make_node("a")
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await wait_until(lambda: a.online() == b.online() == set("ab"), within=5)
    await trio.sleep(BOTH)
    network.cut(a.mesh, b.mesh)
    assert await wait_until(lambda: a.online() == {"a"}, within=6) <= 5


async def test_one_whom_nobody_left_was_linked_to_is_missed_before_its_window_ends(
    make_node, start, wait_until, network, autojump_clock
):
    """A network parts right after its nodes joined: each side knew the other through one hub."""
    hub = make_node("hub")
    left, right = (make_node(name, bootstraps=[hub.addr]) for name in ("left", "right"))
    network.cut(left.mesh, right.mesh)
    await start(hub, left, right)
    await wait_until(lambda: left.online() == right.online() == {"hub", "left", "right"}, within=5)
    await trio.sleep(10)
    hub.kill()
    assert await wait_until(lambda: left.online() == {"left"}, within=30) < 20
    state, reason = state_of(left, right)
    assert state == "offline"
    assert reason.startswith("silent: it is not heard any more; ")


async def test_one_that_can_not_be_dialled_and_is_heard_is_there(
    make_node, start, wait_until, network, autojump_clock
):
    """It is behind a NAT, and this node dials it in vain now and then."""
    hubs = [make_node("one"), make_node("two")]
    left, right = (
        make_node(name, bootstraps=[hub.addr for hub in hubs]) for name in ("left", "right")
    )
    network.cut(left.mesh, right.mesh)
    await start(*hubs, left, right)
    everybody = {"one", "two", "left", "right"}
    await wait_until(lambda: left.online() == right.online() == everybody, within=5)
    seen: set[str] = set()
    for second in range(120):
        if second == 30:
            hubs[0].kill()
        await trio.sleep(1)
        seen.add(state_of(left, right)[0])
    assert seen == {"up"}
