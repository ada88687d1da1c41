"""Circuit relay on real loopback sockets: a relay, a host behind it, and who wants to reach it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Status, StopMessage

from meshnode.errors import PeerRefused, PeerUnreachable, StreamReset, TokenRefused, WireError
from meshnode.net.libp2p.autonat import AUTONAT
from meshnode.net.libp2p.delimited import encode_message, read_message
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.relay import hop as hop_module
from meshnode.net.libp2p.relay.addrs import id_bytes
from meshnode.net.libp2p.relay.limits import RelayLimits
from meshnode.net.libp2p.relay.messages import HOP, STOP
from meshnode.net.libp2p.swarm import open_negotiated
from meshnode.net.libp2p.tcp import bind_listeners, parse_tcp_addr
from meshnode.net.mesh import LinkState, Verdict

ECHO = "/test/echo/1.0.0"
RELAY = RelayLimits()
RESERVE = HopMessage(type=HopMessage.RESERVE)


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def read_to_end(stream):
    answer = b""
    while data := await stream.receive_some():
        answer += data
    return answer


async def ask(node, peer_id, question, *, half_close=True):
    stream = await node.open_stream(peer_id, ECHO, timeout=3)
    await stream.send_all(question)
    if half_close:
        await stream.send_eof()
    answer = await read_to_end(stream)
    await stream.aclose()
    return answer


async def hop(node, relay, *requests: bytes):
    """Send bytes on a hop stream; return the status of the answer."""
    stream = await node.open_stream(relay.peer_id, HOP, timeout=3)
    for request in requests:
        await stream.send_all(request)
    answer = await read_message(stream, HopMessage)
    assert answer.type == HopMessage.STATUS
    stream.reset()
    return Status.Name(answer.status)


def connect_to(peer_id: str) -> bytes:
    return encode_message(HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=id_bytes(peer_id))))


def via(relay, host) -> str:
    return f"{relay.addrs[0]}/p2p-circuit/p2p/{host.peer_id}"


async def until(check):
    while not check():  # noqa: ASYNC110
        await trio.sleep(0.01)


def link(node, other):
    return next((k for k in node.links() if k.peer_id == other.peer_id), None)


@pytest.fixture
def trio_of(make_node):
    """Build a relay, a host and a client, the latter two linked to the relay alone."""

    @asynccontextmanager
    async def run(relay=RELAY, *, reserve=True, host_keys=None):
        nodes = [
            make_node(relay=relay),
            make_node(**({} if host_keys is None else {"keys": host_keys})),
            make_node(),
        ]
        nodes[1].serve(ECHO, echo)
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.run_forever)
            for node in nodes[1:]:
                await node.dial(nodes[0].addrs[0], timeout=3)
            if reserve:
                await nodes[1].reserve(nodes[0].peer_id, timeout=3)
            yield nodes
            nursery.cancel_scope.cancel()

    return run


# What it is for


async def test_a_host_with_a_reservation_is_reached_through_its_relay(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            assert host.addrs[-1] == via(relay, host)
            assert await client.dial(host.addrs[-1], timeout=3) == host.peer_id
            for one, other in ((client, host), (host, client)):
                assert link(one, other).via == relay.peer_id
                assert link(one, other).addr.endswith(f"/p2p/{relay.peer_id}/p2p-circuit")
                assert link(one, relay).via is None
            assert await ask(client, host.peer_id, b"hello" * 100_000) == b"hello" * 100_000
            assert await client.ping(host.peer_id, timeout=3) > 0


async def test_the_relay_sees_nothing_of_what_it_carries(trio_of, monkeypatch):
    secret = b"the prompt, word for word"
    seen = []

    class Tap:
        """The relay's own stream, as it reads it."""

        def __init__(self, stream):
            self._stream = stream

        def __getattr__(self, name):
            return getattr(self._stream, name)

        async def receive_some(self, max_bytes=65536):
            data = await self._stream.receive_some(max_bytes)
            seen.append(data)
            return data

    async def tapped_splice(client, upstream, **more):
        return await splice(Tap(client), Tap(upstream), **more)

    splice = hop_module.splice
    monkeypatch.setattr(hop_module, "splice", tapped_splice)
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            await client.dial(via(relay, host), timeout=3)
            assert await ask(client, host.peer_id, secret) == secret
    carried = b"".join(seen)
    assert len(carried) > 2 * len(secret)
    assert secret not in carried
    assert b"/test/echo" not in carried


async def test_a_half_close_goes_through_a_relay_and_a_cut_stays_a_cut(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            await client.dial(via(relay, host), timeout=3)
            stream = await client.open_stream(host.peer_id, ECHO, timeout=3)
            await stream.send_all(b"one")
            assert await stream.receive_some() == b"one"
            await stream.send_eof()
            assert await stream.receive_some() == b""
            cut = await client.open_stream(host.peer_id, ECHO, timeout=3)
            await cut.send_all(b"two")
            assert await cut.receive_some() == b"two"
            await relay.disconnect(host.peer_id, "test")
            with pytest.raises(StreamReset):
                await cut.receive_some()
            await until(lambda: link(client, host) is None and link(host, client) is None)


async def test_gossip_flows_over_a_relayed_link(make_node, trio_of):
    heard = []

    def listen(sender, data):
        heard.append((sender, data))
        return Verdict.ACCEPT

    relay, host, client = make_node(relay=RELAY), make_node(), make_node()
    host.subscribe("/t", listen)
    client.subscribe("/t", lambda *_: Verdict.ACCEPT)  # the relay does not subscribe
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for node in (relay, host, client):
                await nursery.start(node.run_forever)
            for node in (host, client):
                await node.dial(relay.addrs[0], timeout=3)
            await host.reserve(relay.peer_id, timeout=3)
            await client.dial(via(relay, host), timeout=3)
            while not heard:
                await client.publish("/t", b"news")
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    assert heard[0] == (client.peer_id, b"news")


async def test_a_circuit_makes_the_link_to_its_relay_where_there_is_none(make_node):
    relay, host, client = make_node(relay=RELAY), make_node(), make_node()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for node in (relay, host, client):
                await nursery.start(node.run_forever)
            await host.dial(relay.addrs[0], timeout=3)
            await host.reserve(relay.peer_id, timeout=3)
            await client.dial(host.addrs[-1], timeout=3)
            assert link(client, host).via == relay.peer_id
            assert link(client, relay).via is None
            nursery.cancel_scope.cancel()


# Direct and relayed


async def test_a_direct_link_replaces_a_relayed_one_and_its_streams_are_finished(trio_of):
    with trio.fail_after(20):
        async with trio_of() as (relay, host, client):
            await client.dial(via(relay, host), timeout=3)
            running = await client.open_stream(host.peer_id, ECHO, timeout=3)
            await running.send_all(b"before")
            assert await running.receive_some() == b"before"
            await client.dial(host.addrs[0], timeout=3)
            assert link(client, host).via is None
            await until(lambda: link(host, client).via is None)
            await trio.sleep(5)  # longer than what looks for idle ones takes twice
            await running.send_all(b"after")
            assert await running.receive_some() == b"after"
            assert relay.metrics.relay_circuits._value.get() == 1
            await running.send_eof()
            assert await running.receive_some() == b""
            await running.aclose()
            await until(lambda: relay.metrics.relay_circuits._value.get() == 0)
            assert await ask(client, host.peer_id, b"direct") == b"direct"
            for node, other in ((client, host), (host, client)):
                told = [e.state for e in node.events if e.peer_id == other.peer_id]
                assert told == [LinkState.UP]


@pytest.mark.parametrize("smaller_dials", [True, False])
async def test_either_side_may_replace_the_relayed_link(trio_of, smaller_dials):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            await client.dial(via(relay, host), timeout=3)
            one, other = sorted((host, client), key=lambda n: n.peer_id, reverse=not smaller_dials)
            await one.dial(other.addrs[0], timeout=3)
            await until(lambda: link(one, other).via is None and link(other, one).via is None)


async def test_a_relayed_link_comes_back_to_use_when_the_direct_one_dies_first(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            await client.dial(via(relay, host), timeout=3)
            running = await client.open_stream(host.peer_id, ECHO, timeout=3)
            await client.dial(host.addrs[0], timeout=3)
            direct = client._links.get(host.peer_id)
            await direct.close("test")
            assert link(client, host).via == relay.peer_id
            await until(lambda: link(host, client).via == relay.peer_id)
            assert await ask(client, host.peer_id, b"again") == b"again"
            running.reset()
            await trio.sleep(2.5)  # the one who retires looks again
            assert link(client, host).via == relay.peer_id
            assert [e.state for e in client.events if e.peer_id == host.peer_id] == [LinkState.UP]


async def test_a_direct_link_is_never_replaced_by_a_relayed_one(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            await client.dial(host.addrs[0], timeout=3)
            await client.dial(via(relay, host), timeout=3)
            assert link(client, host).via is None
            assert relay.metrics.relay_circuits._value.get() == 0


async def test_two_that_dial_each_other_through_a_relay_at_once_end_up_with_one_link(trio_of):
    with trio.fail_after(20):
        async with trio_of() as (relay, host, client):
            await client.reserve(relay.peer_id, timeout=3)
            async with trio.open_nursery() as nursery:
                for one, other in ((client, host), (host, client)):
                    nursery.start_soon(lambda a, b: a.dial(via(relay, b), timeout=5), one, other)
            await until(lambda: relay.metrics.relay_circuits._value.get() == 1)
            assert await ask(client, host.peer_id, b"x") == b"x"


# Reservations


async def test_a_host_without_a_reservation_is_not_reached(trio_of):
    with trio.fail_after(10):
        async with trio_of(reserve=False) as (relay, host, client):
            with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
                await client.dial(via(relay, host), timeout=3)


async def test_a_reservation_ends_by_itself(trio_of):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(reservation_ttl=0.2)) as (relay, host, client):
            await trio.sleep(0.3)
            with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
                await client.dial(via(relay, host), timeout=3)
            await host.reserve(relay.peer_id, timeout=3)
            await client.dial(via(relay, host), timeout=3)


async def test_a_reservation_ends_with_the_link_on_both_sides(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            assert host.reserved == (relay.peer_id,)
            await host.disconnect(relay.peer_id, "test")
            assert host.reserved == ()
            assert all("p2p-circuit" not in addr for addr in host.addrs)
            await until(lambda: link(relay, host) is None)
            assert await hop(client, relay, connect_to(host.peer_id)) == "NO_RESERVATION"


async def test_a_relay_has_room_for_so_many_and_the_ones_it_has_may_renew(trio_of):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(max_reservations=1)) as (relay, host, client):
            with pytest.raises(PeerRefused, match="RESERVATION_REFUSED"):
                await client.reserve(relay.peer_id, timeout=3)
            await host.reserve(relay.peer_id, timeout=3)
            await host.disconnect(relay.peer_id, "test")
            await until(lambda: link(relay, host) is None)
            await client.reserve(relay.peer_id, timeout=3)


async def test_a_node_that_is_no_relay_serves_no_hop(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, _client):
            with pytest.raises(PeerRefused):
                await relay.open_stream(host.peer_id, HOP, timeout=3)
            with pytest.raises(PeerRefused):
                await relay.reserve(host.peer_id, timeout=3)


async def test_no_reservation_and_no_circuit_is_had_over_a_relayed_link(trio_of, make_node):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            second = make_node(relay=RELAY)
            async with trio.open_nursery() as nursery:
                await nursery.start(second.run_forever)
                await second.dial(relay.addrs[0], timeout=3)
                await second.reserve(relay.peer_id, timeout=3)
                await client.dial(via(relay, second), timeout=3)
                request = encode_message(RESERVE)
                assert await hop(client, second, request) == "PERMISSION_DENIED"
                request = connect_to(host.peer_id)
                assert await hop(client, second, request) == "PERMISSION_DENIED"
                with pytest.raises(PeerUnreachable, match="no direct link"):
                    await client.reserve(second.peer_id, timeout=3)
                nursery.cancel_scope.cancel()


# Limits on circuits


async def test_a_peer_has_so_many_circuits_and_no_more(trio_of, make_node):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(max_circuits_per_peer=1)) as (relay, host, client):
            await client.dial(via(relay, host), timeout=3)
            third = make_node()
            async with trio.open_nursery() as nursery:
                await nursery.start(third.run_forever)
                await third.dial(relay.addrs[0], timeout=3)
                with pytest.raises(PeerUnreachable, match="RESOURCE_LIMIT_EXCEEDED"):
                    await third.dial(via(relay, host), timeout=3)
                await client.disconnect(host.peer_id, "test")
                await until(lambda: relay.metrics.relay_circuits._value.get() == 0)
                await third.dial(via(relay, host), timeout=3)
                nursery.cancel_scope.cancel()


async def test_a_relay_carries_so_many_circuits_in_all(trio_of):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(max_circuits=0)) as (relay, host, client):
            with pytest.raises(PeerUnreachable, match="RESOURCE_LIMIT_EXCEEDED"):
                await client.dial(via(relay, host), timeout=3)
            refused = relay.metrics.relay_refusals.labels(status="RESOURCE_LIMIT_EXCEEDED")
            assert refused._value.get() == 1


async def test_a_peer_that_asks_too_often_is_put_off(trio_of):
    limits = RelayLimits(requests_per_s=0.01, requests_burst=2)
    with trio.fail_after(10):
        async with trio_of(limits) as (relay, host, client):
            for expected in ("NO_RESERVATION", "NO_RESERVATION", "RESOURCE_LIMIT_EXCEEDED"):
                assert await hop(client, relay, connect_to(client.peer_id)) == expected
            # Others are not.
            await host.reserve(relay.peer_id, timeout=3)


async def test_a_limit_is_told_and_kept_and_what_it_cuts_is_seen_as_cut(trio_of):
    limits = RelayLimits(circuit_duration=1.5, circuit_bytes=1_000_000)
    with trio.fail_after(10):
        async with trio_of(limits) as (relay, host, client):
            stream = await client.open_stream(relay.peer_id, HOP, timeout=3)
            await stream.send_all(connect_to(host.peer_id))
            answer = await read_message(stream, HopMessage)
            assert (answer.limit.duration, answer.limit.data) == (2, 1_000_000)
            stream.reset()
            took = []
            for question in (b"x" * 2_000_000, b"x"):
                await client.dial(via(relay, host), timeout=3)
                began = trio.current_time()
                with pytest.raises(StreamReset):
                    await ask(client, host.peer_id, question, half_close=False)
                took.append(trio.current_time() - began)
                await until(lambda: link(client, host) is None)
            assert took[0] < 1.2 < took[1]  # by its bytes, and by its time


async def test_without_a_limit_none_is_told(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            stream = await client.open_stream(relay.peer_id, HOP, timeout=3)
            await stream.send_all(connect_to(host.peer_id))
            answer = await read_message(stream, HopMessage)
            assert answer.status == Status.Value("OK")
            assert not answer.HasField("limit")
            stream.reset()


async def test_a_circuit_on_which_nothing_moves_is_let_go(trio_of):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(circuit_idle=0.3)) as (relay, host, client):
            stream = await client.open_stream(relay.peer_id, HOP, timeout=3)
            await stream.send_all(connect_to(host.peer_id))
            await read_message(stream, HopMessage)
            with pytest.raises(StreamReset):
                await read_to_end(stream)  # the host's greeting, then the cut
            await until(lambda: relay.metrics.relay_circuits._value.get() == 0)


# Strangers, and members that break the protocol


async def test_a_stranger_gets_no_hop_and_no_stop(make_node, run_nodes):
    relay = make_node(relay=RELAY, limits=Limits(membership_timeout=0.3))
    stranger = make_node(keys=(b"z" * 32,))
    with trio.fail_after(10):
        async with run_nodes(relay, stranger, linked=False):
            with pytest.raises(TokenRefused):
                await stranger.dial(via(relay, make_node()), timeout=3)
            for protocol_id in (HOP, STOP, AUTONAT):
                raw = await stranger._open_tcp(parse_tcp_addr(relay.addrs[0]))
                conn = await stranger._swarm.upgrade(raw, relay.peer_id)
                with pytest.raises((StreamReset, PeerUnreachable)):
                    await open_negotiated(conn, (protocol_id,))
                await conn.close("test")


async def test_membership_is_proven_end_to_end_whatever_the_relay_says(make_node):
    """A relay of two networks carries no stranger into either."""
    theirs, ours = b"t" * 32, b"o" * 32
    relay = make_node(relay=RELAY, keys=(ours, theirs))
    host, stranger = make_node(keys=(ours,)), make_node(keys=(theirs,))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for node in (relay, host, stranger):
                await nursery.start(node.run_forever)
            for node in (host, stranger):
                await node.dial(relay.addrs[0], timeout=3)
            await host.reserve(relay.peer_id, timeout=3)
            with pytest.raises(TokenRefused):
                await stranger.dial(via(relay, host), timeout=3)
            assert link(host, stranger) is None
            assert [e.state for e in host.events if e.peer_id == stranger.peer_id] == [
                LinkState.REFUSED
            ]
            nursery.cancel_scope.cancel()


async def test_a_relay_can_not_pass_somebody_else_off_as_the_host(trio_of, make_node, monkeypatch):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            victim = make_node()
            await relay.dial(host.addrs[0], timeout=3)
            admit = relay._hop._admit
            monkeypatch.setattr(relay._hop, "_admit", lambda *a: (admit, host.peer_id)[1])
            addr = f"{relay.addrs[0]}/p2p-circuit/p2p/{victim.peer_id}"
            with pytest.raises(PeerUnreachable):
                await client.dial(addr, timeout=3)
            assert link(client, host) is None


@pytest.mark.parametrize(
    ("name", "sent", "status"),
    [
        ("garbage", b"\x04\xff\xff\xff\xff", "MALFORMED_MESSAGE"),
        ("a length of 4,097", b"\x81\x20", "MALFORMED_MESSAGE"),
        ("a length of four bytes", b"\xff\xff\xff\x01", "MALFORMED_MESSAGE"),
        ("an empty message", b"\x00", "UNEXPECTED_MESSAGE"),
        (
            "a status",
            encode_message(HopMessage(type=HopMessage.STATUS, status=100)),
            "UNEXPECTED_MESSAGE",
        ),
        ("an unknown type", b"\x02\x08\x07", "UNEXPECTED_MESSAGE"),
        ("no peer", b"\x02\x08\x01", "MALFORMED_MESSAGE"),
        (
            "a long peer ID",
            encode_message(HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"x" * 65))),
            "MALFORMED_MESSAGE",
        ),
        (
            "a peer ID of noise",
            encode_message(HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"\xff" * 38))),
            "NO_RESERVATION",
        ),
    ],
)
async def test_what_breaks_the_protocol_is_answered_by_its_name(trio_of, name, sent, status):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            assert await hop(client, relay, sent) == status, name
            # And the link, and the relay, live on.
            await client.dial(via(relay, host), timeout=3)


async def test_a_silent_hop_is_let_go(trio_of):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(message_timeout=0.2)) as (relay, _host, client):
            stream = await client.open_stream(relay.peer_id, HOP, timeout=3)
            await stream.send_all(b"\x10")  # a length, and nothing behind it
            with pytest.raises(StreamReset):
                await stream.receive_some()


async def stop(node, host, *requests: bytes):
    stream = await node.open_stream(host.peer_id, STOP, timeout=3)
    for request in requests:
        await stream.send_all(request)
    answer = await read_message(stream, StopMessage)
    stream.reset()
    return Status.Name(answer.status)


async def test_a_stop_from_whoever_is_no_relay_of_ours_is_denied(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, host, client):
            await client.dial(host.addrs[0], timeout=3)
            peer = PeerId(id=id_bytes(relay.peer_id))
            offer = encode_message(StopMessage(type=StopMessage.CONNECT, peer=peer))
            assert await stop(client, host, offer) == "PERMISSION_DENIED"
            assert await stop(relay, host, offer) == "OK"
            assert await stop(relay, host, b"\x02\xff\xff") == "MALFORMED_MESSAGE"
            assert await stop(relay, host, b"\x00") == "MALFORMED_MESSAGE"
            status = encode_message(StopMessage(type=StopMessage.STATUS, peer=peer))
            assert await stop(relay, host, status) == "UNEXPECTED_MESSAGE"


async def test_a_host_has_few_circuits_that_prove_nothing(make_node):
    relay = make_node(relay=RELAY)
    host = make_node()
    host._circuits._limits = RelayLimits(max_pending_circuits=2)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for node in (relay, host):
                await nursery.start(node.run_forever)
            await host.dial(relay.addrs[0], timeout=3)
            await host.reserve(relay.peer_id, timeout=3)
            peer = PeerId(id=id_bytes(relay.peer_id))
            offer = encode_message(StopMessage(type=StopMessage.CONNECT, peer=peer))
            silent = []
            for _ in range(2):
                stream = await relay.open_stream(host.peer_id, STOP, timeout=3)
                await stream.send_all(offer)
                assert (await read_message(stream, StopMessage)).status == Status.Value("OK")
                silent.append(stream)
            assert await stop(relay, host, offer) == "RESOURCE_LIMIT_EXCEEDED"
            for stream in silent:
                stream.reset()
            await until(lambda: host._circuits._pending == 0)
            assert await stop(relay, host, offer) == "OK"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "answer",
    [
        HopMessage(type=HopMessage.STATUS, status=Status.Value("OK")),  # no address to be had
        HopMessage(type=HopMessage.RESERVE),
        HopMessage(type=HopMessage.STATUS, status=7, limit=Limit(duration=1)),
        b"\x05junk!",
        b"\x90",
    ],
    ids=["no reservation", "no status", "an unknown status", "garbage", "half a length"],
)
async def test_a_relay_that_answers_badly_is_none(make_node, run_nodes, answer):
    fake, host = make_node(announce_addrs=("/ip4/192.0.2.9/tcp/1",)), make_node()
    told = encode_message(answer) if isinstance(answer, HopMessage) else answer

    async def answer_badly(stream):
        await stream.receive_some()
        await stream.send_all(told)

    fake.serve(HOP, answer_badly)
    with trio.fail_after(10):
        async with run_nodes(fake, host, linked=False):
            # The relay dialled: no address of it is known to work.
            await fake.dial(host.addrs[0], timeout=3)
            with pytest.raises((PeerRefused, PeerUnreachable)):
                await host.reserve(fake.peer_id, timeout=3)
            assert host.reserved == ()
            with pytest.raises(PeerUnreachable):
                await host.dial(f"{fake.addrs[0]}/p2p-circuit/p2p/{make_node().peer_id}", timeout=3)


async def test_a_host_that_is_stopped_lets_a_circuit_fail_in_time(trio_of):
    with trio.fail_after(10):
        async with trio_of(RelayLimits(stop_timeout=0.3)) as (relay, host, client):

            async def say_nothing(conn, stream):
                await trio.sleep_forever()

            host._serving.add_for_conns(STOP, say_nothing)
            with pytest.raises(PeerUnreachable, match="CONNECTION_FAILED"):
                await client.dial(via(relay, host), timeout=3)
            assert relay.metrics.relay_circuits._value.get() == 0


async def test_an_address_through_this_node_itself_leads_nowhere(trio_of):
    with trio.fail_after(10):
        async with trio_of() as (relay, _host, client):
            await relay.disconnect(client.peer_id, "test")
            with pytest.raises(PeerUnreachable, match="back through this node"):
                await relay.dial(via(relay, client), timeout=3)


# Dialling back


async def test_a_member_learns_whether_it_can_be_dialled(make_node, run_nodes):
    asked, open_host = make_node(), make_node()
    # Bound, so that nobody else has the port, and never accepted from.
    with trio.fail_after(15):
        [dead] = await bind_listeners(("/ip4/127.0.0.1/tcp/0",))
        port = dead.socket.getsockname()[1]
        dead.socket.close()
        closed_host = make_node(announce_addrs=(f"/ip4/127.0.0.1/tcp/{port}",))
        async with run_nodes(asked, open_host, closed_host, linked=False):
            for host in (open_host, closed_host):
                await host.dial(asked.addrs[0], timeout=3)
            assert await open_host.is_dialable_from(asked.peer_id, timeout=5)
            assert not await closed_host.is_dialable_from(asked.peer_id, timeout=5)
            # A dial-back is no refusal, and leaves nothing.
            assert [e.state for e in open_host.events] == [LinkState.UP]
            await until(lambda: len(open_host._swarm.all_conns) == 1)


async def test_somebody_else_at_the_address_is_not_this_node(make_node, run_nodes):
    asked, other = make_node(), make_node()
    with trio.fail_after(10):
        async with run_nodes(asked, other, linked=False):
            theirs = other.addrs[0].partition("/p2p/")[0]
            liar = make_node(announce_addrs=(theirs,))
            async with run_nodes(liar, linked=False):
                await liar.dial(asked.addrs[0], timeout=3)
                assert not await liar.is_dialable_from(asked.peer_id, timeout=5)


async def test_who_asks_to_be_dialled_back_too_often_is_refused(make_node, run_nodes):
    asked, host = make_node(), make_node()
    with trio.fail_after(10):
        async with run_nodes(asked, host):
            for _ in range(8):
                assert await host.is_dialable_from(asked.peer_id, timeout=5)
            with pytest.raises(PeerRefused):
                await host.is_dialable_from(asked.peer_id, timeout=5)


@pytest.mark.parametrize("sent", [b"\x04\xff\xff\xff\xff", b"\x00", b"\x02\x08\x01"])
async def test_a_bad_request_to_dial_back_is_called_so(make_node, run_nodes, sent):
    asked, host = make_node(), make_node()
    with trio.fail_after(10):
        async with run_nodes(asked, host):
            stream = await host.open_stream(asked.peer_id, AUTONAT, timeout=3)
            await stream.send_all(sent)
            answer = await read_message(stream, Message)
            assert answer.dialResponse.status == Message.E_BAD_REQUEST
            stream.reset()


async def test_a_message_is_read_to_its_last_byte_and_no_further(make_node, run_nodes):
    one, two = make_node(), make_node()
    read = []

    async def take(stream):
        read.append(await read_message(stream, HopMessage))
        read.append(await stream.receive_some())

    one.serve(ECHO, take)
    with trio.fail_after(10):
        async with run_nodes(one, two):
            stream = await two.open_stream(one.peer_id, ECHO, timeout=3)
            await stream.send_all(encode_message(RESERVE) + b"behind")
            await until(lambda: len(read) == 2)
    assert read == [RESERVE, b"behind"]
    with pytest.raises(WireError):
        encode_message(HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"x" * 5000)))
