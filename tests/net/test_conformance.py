"""One suite over both meshes, the real and the in-process one: what ``net/mesh.Mesh`` promises."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import trio

from meshnode.errors import (
    ConfigError,
    LinkLost,
    MeshError,
    PeerRefused,
    PeerUnreachable,
    StreamClosed,
    StreamReset,
    TokenRefused,
    WireError,
)
from meshnode.net.mesh import LinkState, Verdict

ECHO = "/test/echo/1.0.0"
HOLD = "/test/hold/1.0.0"
TOPIC = "/test/topic"
LIMIT = 15.0  # seconds, for one test


@pytest.fixture(params=["memory", "libp2p"])
def meshes(request):
    return request.getfixturevalue(f"{request.param}_meshes")


class Events:
    """Link events of one mesh, to be waited for."""

    def __init__(self, mesh):
        self.seen = []
        self.changed = trio.Event()
        mesh.watch_links(self.note)

    def note(self, event):
        self.seen.append(event)
        self.changed.set()
        self.changed = trio.Event()

    def of(self, state):
        return [event for event in self.seen if event.state is state]

    async def wait(self, state, count=1):
        while len(self.of(state)) < count:
            await self.changed.wait()
        return self.of(state)


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


class Held:
    """A handler that keeps its streams until it is told to go."""

    def __init__(self):
        self.streams, self.opened = trio.open_memory_channel(100)
        self.release = trio.Event()

    async def __call__(self, stream):
        await self.streams.send(stream)
        await self.release.wait()


async def receive_all(stream):
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


async def test_a_dial_proves_both_peers_and_tells_both(meshes):
    events = {}

    def prepare(mesh):
        events[mesh.peer_id] = Events(mesh)

    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=prepare, linked=False) as (a, b):
            assert await b.dial(a.addrs[0], timeout=5) == a.peer_id
            (up_a,) = await events[a.peer_id].wait(LinkState.UP)
            (up_b,) = await events[b.peer_id].wait(LinkState.UP)

            assert (up_a.peer_id, up_a.dialled) == (b.peer_id, False)
            assert (up_b.peer_id, up_b.dialled) == (a.peer_id, True)
            (link,) = a.links()
            assert (link.peer_id, link.dialled) == (b.peer_id, False)
            assert a.addrs[0].endswith(f"/p2p/{a.peer_id}")


async def test_a_second_dial_returns_at_once_and_tells_nobody(meshes):
    events = {}

    def prepare(mesh):
        events[mesh.peer_id] = Events(mesh)

    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=prepare) as (a, b):
            assert await b.dial(a.addrs[0], timeout=5) == a.peer_id
            await b.ping(a.peer_id, timeout=5)
            assert len(a.links()) == len(b.links()) == 1
            assert all(len(e.of(LinkState.UP)) == 1 for e in events.values())


async def test_simultaneous_dials_end_in_one_link_each(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, linked=False) as (a, b):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: a.dial(b.addrs[0], timeout=5))
                nursery.start_soon(lambda: b.dial(a.addrs[0], timeout=5))
            assert len(a.links()) == len(b.links()) == 1
            await a.ping(b.peer_id, timeout=5)
            await b.ping(a.peer_id, timeout=5)


async def test_a_wrong_key_is_named_on_both_sides(meshes):
    events = {}

    def prepare(mesh):
        events[mesh.peer_id] = Events(mesh)

    keys = ((b"a" * 32,), (b"b" * 32,))
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=prepare, keys=keys, linked=False) as (a, b):
            with pytest.raises(TokenRefused):
                await b.dial(a.addrs[0], timeout=5)
            (refused,) = await events[a.peer_id].wait(LinkState.REFUSED)
            assert refused.peer_id == b.peer_id
            await events[b.peer_id].wait(LinkState.REFUSED)
            assert a.links() == b.links() == ()
            assert not events[a.peer_id].of(LinkState.UP)


async def test_one_key_in_common_is_enough(meshes):
    keys = ((b"old" + b"x" * 29, b"new" + b"x" * 29), (b"new" + b"x" * 29,))
    with trio.fail_after(LIMIT):
        async with meshes(2, keys=keys, linked=False) as (a, b):
            assert await a.dial(b.addrs[0], timeout=5) == b.peer_id


async def test_dialling_nobody_is_unreachable(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, linked=False) as (a, b):
            nowhere = f"/ip4/127.0.0.1/tcp/1/p2p/{b.peer_id}"
            with pytest.raises(PeerUnreachable):
                await a.dial(nowhere, timeout=5)


async def test_dialling_an_address_with_another_peers_id_is_unreachable(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(3, linked=False) as (a, b, c):
            transport = b.addrs[0].partition("/p2p/")[0]
            with pytest.raises(PeerUnreachable):
                await a.dial(f"{transport}/p2p/{c.peer_id}", timeout=5)
            assert a.links() == ()


@pytest.mark.parametrize("addr", ["", "nonsense", "/ip4/127.0.0.1/tcp/1"])
async def test_an_address_that_is_none_is_named_as_such(meshes, addr):
    with trio.fail_after(LIMIT):
        async with meshes(1) as (a,):
            with pytest.raises(ConfigError):
                await a.dial(addr, timeout=5)


async def test_bytes_go_both_ways_and_half_close_is_not_close(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda m: m.serve(ECHO, echo)) as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO, timeout=5)
            assert (stream.peer_id, stream.protocol_id) == (b.peer_id, ECHO)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.send_all(b"again")
            await stream.send_eof()
            await stream.send_eof()
            assert await receive_all(stream) == b"again"
            assert await stream.receive_some() == b""
            with pytest.raises(StreamClosed):
                await stream.send_all(b"more")
            await stream.aclose()
            await stream.aclose()


async def test_a_megabyte_arrives_whole_through_a_slow_reader(meshes):
    data = bytes(range(256)) * 4096
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda m: m.serve(ECHO, echo)) as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO, timeout=5)
            received = bytearray()
            async with trio.open_nursery() as nursery:

                async def send():
                    await stream.send_all(data)
                    await stream.send_eof()

                nursery.start_soon(send)
                while piece := await stream.receive_some(1000):
                    assert len(piece) <= 1000
                    received += piece
            assert bytes(received) == data


async def test_a_reset_is_never_an_end(meshes):
    held = Held()
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda m: m.serve(HOLD, held)) as (a, b):
            ours = await a.open_stream(b.peer_id, HOLD, timeout=5)
            await ours.send_all(b"x")
            theirs = await held.opened.receive()
            assert await theirs.receive_some() == b"x"

            theirs.reset()

            with pytest.raises(StreamReset) as caught:
                await receive_all(ours)
            assert not isinstance(caught.value, LinkLost)
            with pytest.raises((StreamReset, StreamClosed)):
                await ours.send_all(b"y" * 1000)
            with pytest.raises(StreamClosed):
                await theirs.receive_some()
            theirs.reset()
            await a.ping(b.peer_id, timeout=5)


async def test_a_dead_link_cuts_its_streams_and_is_told_once(meshes):
    held = Held()
    events = {}

    def prepare(mesh):
        mesh.serve(HOLD, held)
        events[mesh.peer_id] = Events(mesh)

    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=prepare) as (a, b):
            ours = await a.open_stream(b.peer_id, HOLD, timeout=5)
            await ours.send_all(b"x")
            theirs = await held.opened.receive()

            await b.disconnect(a.peer_id, "test")

            with pytest.raises(LinkLost):
                await receive_all(ours)
            with pytest.raises(LinkLost):
                await receive_all(theirs)
            with pytest.raises(LinkLost):
                await ours.send_all(b"y")
            await events[a.peer_id].wait(LinkState.DOWN)
            assert len(events[a.peer_id].of(LinkState.DOWN)) == 1
            assert len(events[b.peer_id].of(LinkState.DOWN)) == 1
            assert a.links() == b.links() == ()
            with pytest.raises(PeerUnreachable):
                await a.open_stream(b.peer_id, HOLD, timeout=5)
            with pytest.raises(PeerUnreachable):
                await a.ping(b.peer_id, timeout=5)
            assert await a.dial(b.addrs[0], timeout=5) == b.peer_id


async def test_disconnecting_nobody_is_no_matter(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, linked=False) as (a, b):
            await a.disconnect(b.peer_id, "test")


async def test_an_unknown_protocol_is_refused_and_the_link_lives(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda m: m.serve(ECHO, echo)) as (a, b):
            with pytest.raises(PeerRefused):
                await a.open_stream(b.peer_id, "/test/unknown/1.0.0", timeout=5)
            await _echo_once(a, b)


async def test_a_handler_that_raises_resets_its_stream_alone(meshes):
    async def fail(stream):
        await stream.receive_some()
        raise ZeroDivisionError

    def prepare(mesh):
        mesh.serve(ECHO, echo)
        mesh.serve("/test/fail/1.0.0", fail)

    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=prepare) as (a, b):
            stream = await a.open_stream(b.peer_id, "/test/fail/1.0.0", timeout=5)
            await stream.send_all(b"x")
            with pytest.raises(StreamReset):
                await receive_all(stream)
            await _echo_once(a, b)


async def test_a_handler_that_returns_closes_its_stream_cleanly(meshes):
    async def answer(stream):
        await stream.send_all(b"that is all")

    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda m: m.serve(ECHO, answer)) as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO, timeout=5)
            await stream.send_eof()
            assert await receive_all(stream) == b"that is all"


async def test_cancelled_reads_writes_and_opens_harm_nobody_else(meshes):
    held = Held()

    def prepare(mesh):
        mesh.serve(ECHO, echo)
        mesh.serve(HOLD, held)

    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=prepare) as (a, b):
            for number in range(30):
                with trio.move_on_after(0.001 * (number % 5)):
                    stream = await a.open_stream(b.peer_id, HOLD, timeout=5)
                    if number % 2:
                        await stream.receive_some()
                    else:
                        while True:  # nobody reads: it waits once the window is full
                            await stream.send_all(bytes(100_000))
                await _echo_once(a, b)
            held.release.set()
            await _echo_once(b, a)
            assert len(a.links()) == len(b.links()) == 1


async def test_a_published_message_reaches_all_others_once(meshes):
    heard = {}
    arrived = trio.Event()

    def prepare(mesh):
        heard[mesh.peer_id] = []

        def listen(sender, data):
            heard[mesh.peer_id].append((sender, data))
            if data.startswith(b"news"):
                count = sum(1 for got in heard.values() for m in got if m[1] == data)
                if count == 3:
                    arrived.set()
            return Verdict.ACCEPT

        mesh.subscribe(TOPIC, listen)

    with trio.fail_after(LIMIT):
        async with meshes(4, prepare=prepare) as nodes:
            first = nodes[0]
            # The first ones may go out before a new link's topic streams stand.
            for number in range(100):
                await first.publish(TOPIC, b"news %d" % number)
                with trio.move_on_after(0.1):
                    await arrived.wait()
                    break
            await first.publish(TOPIC, b"last")
            with trio.move_on_after(0.3):
                await trio.sleep_forever()
            assert heard[first.peer_id] == []
            for node in nodes[1:]:
                got = heard[node.peer_id]
                assert len(got) == len(set(got))
                assert (first.peer_id, b"last") in got
                assert {sender for sender, _ in got} == {first.peer_id}


@pytest.mark.parametrize("verdict", [Verdict.IGNORE, Verdict.REJECT])
async def test_what_a_listener_does_not_accept_goes_no_further(meshes, verdict):
    """Three in a row: what the middle one drops never reaches the last."""
    heard = {}
    order = []
    accepted = trio.Event()

    def prepare(mesh):
        number = len(order)
        order.append(mesh.peer_id)
        heard[number] = []

        def listen(_sender, data):
            heard[number].append(data)
            if number == 2 and data.startswith(b"good"):
                accepted.set()
            if number == 1 and data.startswith(b"bad"):
                return verdict
            return Verdict.ACCEPT

        mesh.subscribe(TOPIC, listen)

    with trio.fail_after(LIMIT):
        async with meshes(3, prepare=prepare, linked=False) as (a, b, c):
            await b.dial(a.addrs[0], timeout=5)
            await b.dial(c.addrs[0], timeout=5)
            for number in range(100):
                await a.publish(TOPIC, b"bad %d" % number)
                await a.publish(TOPIC, b"good %d" % number)
                with trio.move_on_after(0.1):
                    await accepted.wait()
                    break
            assert any(data.startswith(b"good") for data in heard[2])
            assert not any(data.startswith(b"bad") for data in heard[2])


async def test_a_ping_measures_a_round_trip(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2) as (a, b):
            rtt = await a.ping(b.peer_id, timeout=5)
            assert 0 <= rtt < 5
            (link,) = a.links()
            assert link.rtt == rtt
            assert link.last_received >= link.since


async def test_an_envelope_names_its_signer_and_forgeries_are_told(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, linked=False) as (a, b):
            envelope = a.seal(b"payload")
            assert b.open_sealed(envelope) == (a.peer_id, b"payload")
            forged = [b"", b"garbage", envelope[:-1], envelope + b"x", b.seal(b"x")[:40]]
            forged += [
                envelope[:at] + bytes([envelope[at] ^ 1]) + envelope[at + 1 :]
                for at in range(len(envelope))
            ]
            for wrong in forged:
                # A changed bit that carries no meaning may pass; what it says may not change.
                with suppress_bad_envelope():
                    assert b.open_sealed(wrong) == (a.peer_id, b"payload")


@contextmanager
def suppress_bad_envelope():
    try:
        yield
    except WireError as exc:
        if exc.code != "bad_envelope":
            raise


async def test_a_stopped_mesh_leaves_nothing_behind(meshes):
    events = {}
    held = Held()

    def prepare(mesh):
        mesh.serve(HOLD, held)
        events[mesh.peer_id] = Events(mesh)

    with trio.fail_after(LIMIT):
        async with meshes(1, prepare=prepare) as (a,):
            async with meshes(2, prepare=prepare, linked=False) as nodes:
                b = nodes[1]
                await b.dial(a.addrs[0], timeout=5)
                addr = b.addrs[0]
                stream = await a.open_stream(b.peer_id, HOLD, timeout=5)
                await stream.send_all(b"x")
                await held.opened.receive()
            await events[a.peer_id].wait(LinkState.DOWN)
            assert a.links() == b.links() == ()
            assert b.addrs == ()
            with pytest.raises(StreamReset):
                await receive_all(stream)
            with pytest.raises(MeshError):
                await a.dial(addr, timeout=5)


async def _echo_once(a, b):
    stream = await a.open_stream(b.peer_id, ECHO, timeout=5)
    await stream.send_all(b"ping")
    await stream.send_eof()
    assert await receive_all(stream) == b"ping"
    await stream.aclose()


async def test_what_nobody_waits_for_arrives_in_order_and_by_itself(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda mesh: mesh.serve(ECHO, echo)) as (a, b):
            stream = await b.open_stream(a.peer_id, ECHO, timeout=5)
            await stream.send_soon(b"by itself")
            assert await stream.receive_some() == b"by itself"
            await stream.send_soon(b"first ")
            await stream.send_all(b"second ")
            await stream.send_soon(b"third")
            await stream.send_eof()
            assert await receive_all(stream) == b"first second third"
            stream.reset()
            with pytest.raises(StreamClosed):
                await stream.send_soon(b"late")


async def test_a_stream_that_waits_for_no_word_carries_bytes_both_ways(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda mesh: mesh.serve(ECHO, echo)) as (a, b):
            stream = await b.begin_stream(a.peer_id, ECHO)
            assert (stream.peer_id, stream.protocol_id) == (a.peer_id, ECHO)
            await stream.send_all(b"first ")
            await stream.send_all(b"second")
            received = b""
            while len(received) < len(b"first second"):
                received += await stream.receive_some(4)
            await stream.send_eof()
            assert received + await receive_all(stream) == b"first second"

            silent = await b.begin_stream(a.peer_id, ECHO)
            await silent.send_eof()
            assert await silent.receive_some() == b""


async def test_a_protocol_that_is_not_served_is_a_refusal_of_the_first_read(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2) as (a, b):
            stream = await b.begin_stream(a.peer_id, ECHO)
            await stream.send_all(b"for nobody")
            with pytest.raises(PeerRefused):
                await stream.receive_some()
            stream.reset()
            with pytest.raises(PeerUnreachable):
                await b.begin_stream("12D3KooWNobody", ECHO)


async def test_a_link_that_ends_before_the_peers_word_makes_it_unreachable(meshes):
    with trio.fail_after(LIMIT):
        async with meshes(2, prepare=lambda mesh: mesh.serve(ECHO, echo)) as (a, b):
            stream = await b.begin_stream(a.peer_id, ECHO)
            await b.disconnect(a.peer_id, "test")
            with pytest.raises((PeerUnreachable, StreamReset)):  # the word may have come before
                await stream.receive_some()
