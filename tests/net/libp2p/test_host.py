"""The mesh on real loopback sockets: links, streams, and the faults of peers and handlers."""

from __future__ import annotations

import gc
import random

import pytest
import trio
from libp2p import new_host
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from meshnode.errors import (
    ConfigError,
    ListenFailed,
    PeerLate,
    PeerRefused,
    PeerUnreachable,
    StreamReset,
)
from meshnode.net.libp2p.gate import Gate
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.muxer import YamuxStream
from meshnode.net.mesh import LinkState, MeshStream, Verdict
from support.pubsub_nodes import until

ECHO = "/test/echo/1.0.0"


async def echo(stream: MeshStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def raw_stream(node, peer_id: str) -> YamuxStream:
    """Open a stream on which no protocol has been chosen."""
    return await node._links.get(peer_id).muxed_conn.open_stream()


async def ask(node, peer_id: str, question: bytes) -> bytes:
    stream = await node.open_stream(peer_id, ECHO, timeout=3)
    await stream.send_all(question)
    await stream.send_eof()
    answer = await read_to_end(stream)
    await stream.aclose()
    return answer


async def read_to_end(stream) -> bytes:
    answer = b""
    while data := await stream.receive_some():
        answer += data
    return answer


def streams_left(node, peer_id: str) -> int:
    """How many streams are open, pubsub's own apart."""
    conn = node._links.get(peer_id)
    return conn.muxed_conn.stream_count - len(conn.streams)


async def test_two_nodes_link_and_open_streams_both_ways(make_node, run_nodes):
    one, two = make_node(), make_node()
    one.serve(ECHO, echo)
    two.serve(ECHO, echo)
    with trio.fail_after(5):
        async with run_nodes(one, two):
            assert [link.peer_id for link in one.links()] == [two.peer_id]
            assert [link.peer_id for link in two.links()] == [one.peer_id]
            assert (one.links()[0].dialled, two.links()[0].dialled) == (False, True)
            assert await ask(one, two.peer_id, b"to the dialler") == b"to the dialler"
            assert await ask(two, one.peer_id, b"to the listener") == b"to the listener"
    assert [event.state for event in one.events] == [LinkState.UP, LinkState.DOWN]
    assert [event.state for event in two.events] == [LinkState.UP, LinkState.DOWN]


async def test_a_stream_knows_its_peer_and_protocol_on_both_sides(make_node, run_nodes):
    one, two = make_node(), make_node()
    seen = []

    async def note(stream: MeshStream) -> None:
        seen.append((stream.peer_id, stream.protocol_id))

    one.serve(ECHO, note)
    with trio.fail_after(5):
        async with run_nodes(one, two):
            stream = await two.open_stream(one.peer_id, ECHO, timeout=3)
            assert await stream.receive_some() == b""  # the handler returned: a clean end
            assert (stream.peer_id, stream.protocol_id) == (one.peer_id, ECHO)
            await stream.aclose()
    assert seen == [(two.peer_id, ECHO)]


async def test_dialling_a_linked_peer_makes_no_second_connection(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two):
            assert await two.dial(one.addrs[0], timeout=1) == one.peer_id
            assert await one.dial(two.addrs[0], timeout=1) == two.peer_id
            assert len(one._swarm.all_conns) == 1


async def test_a_link_takes_milliseconds(make_node, run_nodes):
    nodes = [make_node() for _ in range(4)]
    with trio.fail_after(5):
        async with run_nodes(*nodes, linked=False):
            await nodes[1].dial(nodes[0].addrs[0], timeout=1)
            took = []
            for node in nodes[2:]:
                began = trio.current_time()
                await node.dial(nodes[0].addrs[0], timeout=1)
                took.append(trio.current_time() - began)
            assert min(took) < 0.1  # about 0.01; the library's connect takes 0.25 at least


@pytest.mark.stock
async def test_the_librarys_connect_waits_a_quarter_of_a_second():
    with trio.fail_after(10):
        one, two = new_host(), new_host()
        listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
        async with one.run(listen), two.run(listen):
            began = trio.current_time()
            await two.connect(PeerInfo(one.get_id(), one.get_addrs()))
            assert trio.current_time() - began > 0.24
            await two.close()
            await one.close()


async def test_concurrent_dials_to_one_peer_make_one_connection(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(lambda: two.dial(one.addrs[0], timeout=3))
            assert len(one._swarm.all_conns) == len(two._swarm.all_conns) == 1
            assert not two._gate._dial_locks


async def test_simultaneous_dials_leave_the_same_one_connection_on_both_sides(make_node, run_nodes):
    with trio.fail_after(20):
        for _ in range(10):
            one, two = make_node(), make_node()
            one.serve(ECHO, echo)
            async with run_nodes(one, two, linked=False):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lambda a=one, b=two: a.dial(b.addrs[0], timeout=3))
                    nursery.start_soon(lambda a=one, b=two: b.dial(a.addrs[0], timeout=3))
                assert len(one.links()) == len(two.links()) == 1
                assert one.links()[0].dialled != two.links()[0].dialled
                assert await ask(two, one.peer_id, b"over the one") == b"over the one"
            assert [event.state for event in one.events] == [LinkState.UP, LinkState.DOWN]
            assert [event.state for event in two.events] == [LinkState.UP, LinkState.DOWN]


async def test_fifty_times_two_dials_that_cross_in_every_way_leave_exactly_one_connection(
    make_node, run_nodes
):
    rng = random.Random(1)
    one, two = make_node(), make_node()
    one.serve(ECHO, echo)

    async def dial_after(pause: float, node, other) -> None:
        await trio.sleep(pause)
        await node.dial(other.addrs[0], timeout=3)

    with trio.fail_after(60):
        async with run_nodes(one, two, linked=False):
            for _ in range(50):
                # A handshake takes some 10 ms: the second meets the first in each of its steps.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(dial_after, rng.uniform(0, 0.01), one, two)
                    nursery.start_soon(dial_after, rng.uniform(0, 0.01), two, one)
                # The loser may still be closing; none is ever a link.
                await until(lambda: {len(n._swarm.all_conns) for n in (one, two)} == {1})
                assert len(one.links()) == len(two.links()) == 1
                assert one.links()[0].dialled != two.links()[0].dialled
                assert await ask(two, one.peer_id, b"over the one") == b"over the one"
                await one.disconnect(two.peer_id, "once more")
                await until(lambda: not two.links())
    assert [event.state for event in one.events] == [LinkState.UP, LinkState.DOWN] * 50
    assert [event.state for event in two.events] == [LinkState.UP, LinkState.DOWN] * 50


@pytest.mark.parametrize("hub_decides", [True, False])
async def test_a_peer_that_came_back_is_let_in_though_its_old_link_never_ended(
    make_node, run_nodes, hub_decides
):
    seeds = sorted((b"a" * 32, b"b" * 32), key=lambda seed: ephemeral_identity(seed).peer_id)
    hub_seed, seed = seeds if hub_decides else reversed(seeds)
    hub, before, after = make_node(seed=hub_seed), make_node(seed=seed), make_node(seed=seed)
    with trio.fail_after(10):
        async with run_nodes(hub, before):
            # As after a power cut: its end is silent, and no RST tells the hub.
            before._links.get(hub.peer_id).muxed_conn._channel.receive = trio.sleep_forever
            await hub.ping(before.peer_id, timeout=1)  # the last that it hears
            async with run_nodes(after, linked=False):
                await after.dial(hub.addrs[0], timeout=3)
                assert len(hub.links()) == 1
                assert await hub.ping(after.peer_id, timeout=1) < 1
    assert [event.state for event in hub.events] == [LinkState.UP, LinkState.DOWN]


@pytest.mark.parametrize(
    "addr",
    ["nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/udp/1/quic-v1"],
)
async def test_an_address_that_names_no_tcp_peer_is_a_mistake_of_the_caller(
    make_node, run_nodes, addr
):
    node = make_node()
    with trio.fail_after(5):
        async with run_nodes(node):
            with pytest.raises(ConfigError):
                await node.dial(addr, timeout=1)


async def test_a_refused_dial_says_who_and_where(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, linked=False):
            nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{two.peer_id}"
            with pytest.raises(PeerUnreachable, match=two.peer_id) as caught:
                await one.dial(nobody, timeout=2)
            assert "/ip4/127.0.0.1/tcp/1" in str(caught.value)


async def test_a_peer_with_another_id_than_dialled_is_not_taken(make_node, run_nodes):
    one, two, other = make_node(), make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            wrong = one.addrs[0].replace(one.peer_id, other.peer_id)
            with pytest.raises(PeerUnreachable):
                await two.dial(wrong, timeout=2)
            assert not two.links()
            # The failure is not remembered against the right address.
            await two.dial(one.addrs[0], timeout=2)


async def test_who_takes_a_connection_and_says_nothing_is_late_and_who_refuses_is_not(
    make_node, run_nodes
):
    """The one is stopped or busy and may answer yet, the other is gone."""
    one, other = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one):
            (mute,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = mute.socket.getsockname()[1]
            addr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{other.peer_id}"
            async with mute:
                with pytest.raises(PeerLate, match=r"within 0.3 s"):
                    await one.dial(addr, timeout=0.3)
            with pytest.raises(PeerUnreachable) as refused:
                await one.dial(addr, timeout=2)
            assert not isinstance(refused.value, PeerLate)


async def test_patience_is_for_who_took_the_connection(make_node, run_nodes, monkeypatch):
    """A bootstrap that all dial at once is slow; one whose host is off is not worth the wait."""
    one, slow = make_node(), make_node()
    take = Gate.bring_in

    async def take_late(gate, stream):
        await trio.sleep(0.6)
        return await take(gate, stream)

    async def reach_nobody(endpoint):
        await trio.sleep_forever()

    with trio.fail_after(10):
        async with run_nodes(one, slow, linked=False):
            monkeypatch.setattr(Gate, "bring_in", take_late)
            with pytest.raises(PeerLate, match=r"within 0.3 s"):
                await one.dial(slow.addrs[0], timeout=0.3)
            assert await one.dial(slow.addrs[0], timeout=0.3, patience=5) == slow.peer_id
            (mute,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = mute.socket.getsockname()[1]
            addr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{make_node().peer_id}"
            async with mute:
                with pytest.raises(PeerLate, match=r"within 0.8 s"):
                    await one.dial(addr, timeout=0.3, patience=0.8)
            monkeypatch.setattr(one, "_open_tcp", reach_nobody)
            with pytest.raises(PeerUnreachable, match=r"within 0.3 s") as nobody:
                await one.dial(addr, timeout=0.3, patience=5)
            assert not isinstance(nobody.value, PeerLate)


async def test_a_restarted_peer_is_reached_at_once(make_node, run_nodes):
    listen = ("/ip4/127.0.0.1/tcp/0",)
    one = make_node()
    with trio.fail_after(10):
        async with run_nodes(one):
            first = make_node(seed=b"s" * 32, listen=listen)
            async with run_nodes(first):
                addr = first.addrs[0]
                await one.dial(addr, timeout=2)
            with pytest.raises(PeerUnreachable):
                await one.dial(addr, timeout=2)
            port = addr.split("/")[4]
            second = make_node(seed=b"s" * 32, listen=(f"/ip4/127.0.0.1/tcp/{port}",))
            async with run_nodes(second):
                await one.dial(addr, timeout=2)
                assert [link.peer_id for link in one.links()] == [second.peer_id]


async def test_a_node_does_not_dial_itself(make_node, run_nodes):
    node = make_node()
    with trio.fail_after(5):
        async with run_nodes(node):
            with pytest.raises(PeerUnreachable, match="own"):
                await node.dial(node.addrs[0], timeout=1)


async def test_a_protocol_that_is_not_served_is_refused(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two):
            with pytest.raises(PeerRefused, match="/test/none"):
                await two.open_stream(one.peer_id, "/test/none/1.0.0", timeout=2)
            await until_no_streams(one, two)


async def test_a_stream_to_a_stranger_is_unreachable(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two, linked=False):
            with pytest.raises(PeerUnreachable, match="no live link"):
                await two.open_stream(one.peer_id, ECHO, timeout=2)
            with pytest.raises(PeerUnreachable, match="no live link"):
                await two.ping(one.peer_id, timeout=2)


async def test_a_peer_that_does_not_answer_costs_no_more_than_the_timeout(make_node, run_nodes):
    one, two = make_node(), make_node()
    serve = one._serving.serve

    async def stall(conn, stream) -> None:
        if conn.is_member:
            await trio.sleep_forever()
        await serve(conn, stream)

    one._swarm._serve = stall
    with trio.fail_after(5):
        async with run_nodes(one, two):
            with pytest.raises(PeerUnreachable, match=r"within 0.1 s"):
                await two.open_stream(one.peer_id, ECHO, timeout=0.1)


async def test_cancelled_opens_leave_no_stream_and_no_broken_connection(make_node, run_nodes):
    one, two = make_node(), make_node()
    one.serve(ECHO, echo)
    with trio.fail_after(20):
        async with run_nodes(one, two):
            for number in range(300):
                with trio.move_on_after(number * 0.000_005):
                    stream = await two.open_stream(one.peer_id, ECHO, timeout=3)
                    stream.reset()
            assert await ask(two, one.peer_id, b"still there") == b"still there"
            await until_no_streams(one, two)


async def until_no_streams(one, two) -> None:
    """Wait until every stream between the two is over: a ping comes after what was sent."""
    while streams_left(one, two.peer_id) or streams_left(two, one.peer_id):
        await two.ping(one.peer_id, timeout=1)


async def test_a_handler_that_raises_resets_its_stream_and_harms_nothing_else(
    make_node, run_nodes, logged
):
    one, two = make_node(), make_node()

    async def fail(stream: MeshStream) -> None:
        await stream.receive_some()
        raise RuntimeError("a bug in a handler")

    one.serve("/test/fail/1.0.0", fail)
    one.serve(ECHO, echo)
    with trio.fail_after(5):
        async with run_nodes(one, two):
            stream = await two.open_stream(one.peer_id, "/test/fail/1.0.0", timeout=2)
            await stream.send_all(b"x")
            with pytest.raises(StreamReset):
                await stream.receive_some()
            assert await ask(two, one.peer_id, b"alive") == b"alive"
    assert one.faults("/test/fail/1.0.0") == 1
    assert [entry["event"] for entry in logged] == ["stream_handler_failed"]
    assert "a bug in a handler" in logged[0]["error"]


async def test_a_handler_whose_peer_left_is_no_fault(make_node, run_nodes, logged):
    one, two = make_node(), make_node()
    one.serve(ECHO, echo)
    with trio.fail_after(5):
        async with run_nodes(one, two):
            stream = await two.open_stream(one.peer_id, ECHO, timeout=2)
            stream.reset()
            await until_no_streams(one, two)
    assert one.faults(ECHO) == 0
    assert not logged


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x13/multistream/1.0.0\n\x04\xff\xfe\xfd\n",  # no UTF-8
        b"\x04\xff\xfe\xfd\n",
        b"\xff\xff\xff\xff\x7f",  # a line of 34 GB
        b"\x00\x00\x00\x00",
        b"\x13/multistream/1.0.0\n\x05/none",  # a line without its end
        b"\x13/multistream/2.0.0\n",
        b"\x13/multistream/1.0.0\n" + b"\x03ls\n" * 40,
    ],
)
async def test_garbage_in_the_place_of_a_protocol_resets_the_stream_alone(
    make_node, run_nodes, garbage
):
    one, two = make_node(), make_node()
    one.serve(ECHO, echo)
    with trio.fail_after(5):
        async with run_nodes(one, two):
            stream = await raw_stream(two, one.peer_id)
            await stream.send_all(garbage)
            with pytest.raises(StreamReset):
                await read_to_end(stream)
            assert await ask(two, one.peer_id, b"alive") == b"alive"
    assert one.faults("multistream") == 1


@pytest.mark.stock
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_library_dies_of_a_protocol_name_that_is_no_utf8():
    async def attack() -> None:
        one, two = new_host(), new_host()
        listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
        async with two.run(listen), one.run(listen):
            network = two.get_network()
            conn = await network.dial_addr(one.get_transport_addrs()[0], one.get_id())
            stream = await conn.new_stream()
            await stream.write(b"\x13/multistream/1.0.0\n\x04\xff\xfe\xfd\n")
            await trio.sleep_forever()

    with trio.fail_after(10), pytest.raises(BaseExceptionGroup) as caught:
        await attack()
    assert caught.group_contains(UnicodeDecodeError)
    del caught
    gc.collect()  # it leaves sockets open, which would be found in some later test


async def test_a_silent_stream_is_let_go(make_node, run_nodes):
    one, two = make_node(limits=Limits(negotiate_timeout=0.1)), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two):
            stream = await raw_stream(two, one.peer_id)
            await stream.send_all(b"\x13")
            with pytest.raises(StreamReset):
                await read_to_end(stream)
    assert one.faults("multistream") == 1


async def test_disconnecting_is_told_once_on_both_sides_with_the_reason(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two):
            gone = trio.Event()
            two.watch_links(lambda event: gone.set() if event.state is LinkState.DOWN else None)
            await one.disconnect(two.peer_id, "ping timed out")
            await gone.wait()
            assert not one.links()
            assert not two.links()
    assert [(e.state, e.reason) for e in one.events][1:] == [(LinkState.DOWN, "ping timed out")]
    assert [(e.state, e.reason) for e in two.events][1:] == [(LinkState.DOWN, "closed by the peer")]


async def test_a_stream_is_cut_when_its_link_goes(make_node, run_nodes):
    one, two = make_node(), make_node()
    one.serve(ECHO, echo)
    with trio.fail_after(5):
        async with run_nodes(one, two):
            stream = await two.open_stream(one.peer_id, ECHO, timeout=2)
            await stream.send_all(b"half of it")
            assert await stream.receive_some() == b"half of it"
            await one.disconnect(two.peer_id, "test")
            with pytest.raises(StreamReset):
                await stream.receive_some()


async def test_a_ping_is_measured_and_kept(make_node, run_nodes):
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(one, two):
            assert two.links()[0].rtt is None
            rtt = await two.ping(one.peer_id, timeout=1)
            assert 0 < rtt < 1
            assert two.links()[0].rtt == rtt
            assert one.links()[0].last_received >= one.links()[0].since


async def test_every_subscriber_hears_a_message_once_and_its_sender_never(make_node, run_nodes):
    nodes = [make_node() for _ in range(3)]
    heard: list[tuple[int, str, bytes]] = []
    everybody = trio.Event()

    def listener(number: int):
        def hear(sender: str, data: bytes) -> Verdict:
            heard.append((number, sender, data))
            if len(heard) == 2:
                everybody.set()
            return Verdict.ACCEPT

        return hear

    for number, node in enumerate(nodes):
        node.subscribe("/test/topic", listener(number))
    with trio.fail_after(10):
        async with run_nodes(*nodes):
            while not everybody.is_set():
                await nodes[0].publish("/test/topic", b"news")
                with trio.move_on_after(0.2):
                    await everybody.wait()
            await nodes[1].ping(nodes[2].peer_id, timeout=1)
    assert {(number, sender) for number, sender, _ in heard} == {
        (1, nodes[0].peer_id),
        (2, nodes[0].peer_id),
    }


async def test_a_taken_port_fails_before_the_node_counts_as_started(make_node, run_nodes):
    one = make_node()
    with trio.fail_after(5):
        async with run_nodes(one):
            port = one.addrs[0].split("/")[4]
            two = make_node(listen=(f"/ip4/127.0.0.1/tcp/{port}",))
            with pytest.raises(ListenFailed, match=port):
                await two.run_forever()


async def test_a_full_node_refuses_further_links(make_node, run_nodes):
    hub = make_node(limits=Limits(max_links=1))
    one, two = make_node(), make_node()
    with trio.fail_after(5):
        async with run_nodes(hub, one, two, linked=False):
            await one.dial(hub.addrs[0], timeout=2)
            with pytest.raises(PeerUnreachable, match="all the links it can have"):
                await two.dial(hub.addrs[0], timeout=2)
            await one.dial(hub.addrs[0], timeout=2)


async def test_what_one_node_seals_another_opens(make_node):
    one, two = make_node(), make_node()
    assert two.open_sealed(one.seal(b"words")) == (one.peer_id, b"words")


async def test_a_host_without_proof_of_membership_is_served_nothing_and_let_go(
    make_node, run_nodes
):
    node = make_node(limits=Limits(membership_timeout=0.3))
    with trio.fail_after(10):
        async with run_nodes(node):
            stranger = new_host()
            async with stranger.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
                network = stranger.get_network()
                addr = Multiaddr(node.addrs[0])
                conn = await network.dial_addr(addr, ID.from_base58(node.peer_id))
                for protocol in ("/ipfs/id/1.0.0", "/meshsub/1.1.0", ECHO):
                    stream = await conn.new_stream()
                    await stream.write(b"\x13/multistream/1.0.0\n")
                    line = protocol.encode() + b"\n"
                    await stream.write(bytes([len(line)]) + line)
                    assert await stream.read(20) == b"\x13/multistream/1.0.0\n"
                await conn.event_closed.wait()
                await stranger.close()
    assert node.memberships("timeout") == 1
    assert [event.state for event in node.events] == [LinkState.REFUSED]
