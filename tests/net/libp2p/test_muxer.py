"""The muxer under trio, over real noise: in memory with a wire that can be held, and over TCP."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.abc import IMuxedConn, INetStream, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.exceptions import StreamReset as NetStreamReset
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from meshnode.errors import PeerRefused, StreamClosed, StreamReset
from meshnode.metrics import Metrics
from meshnode.net.libp2p.muxer import YamuxConn, YamuxStream, use_our_muxer
from meshnode.net.libp2p.yamux_frames import Limits

KIB = 1024
MIB = 1024 * KIB


class Wire(ReadWriteCloser):
    """One end of a link in memory whose sending can be held back."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self.gate = trio.Event()
        self.gate.set()

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self.stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self.gate.wait()
        await self.stream.send_all(data)

    async def close(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


async def shake_hands(dialling: RawConnection, listening: RawConnection) -> list[ISecureConn]:
    """Return the dialler's and the listener's end of a noise connection."""
    keys = [create_new_key_pair(), create_new_key_pair()]
    transports = [
        NoiseTransport(key, noise_privkey=create_noise_key_pair().private_key) for key in keys
    ]
    secured: dict[int, ISecureConn] = {}

    async def listen() -> None:
        secured[1] = await transports[1].secure_inbound(listening)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        remote_id = ID.from_pubkey(keys[1].public_key)
        secured[0] = await transports[0].secure_outbound(dialling, remote_id)
    return [secured[0], secured[1]]


class Pair:
    """Two muxed connections, ``here`` the dialler's, and the wires under them."""

    def __init__(self, conns: list[YamuxConn], wires: list[Wire]) -> None:
        self.here, self.there = conns
        self.wires = wires

    async def streams(self) -> tuple[YamuxStream, YamuxStream]:
        """Return the two ends of a new stream, on which one byte went each way."""
        ours = await self.here.open_stream()
        await ours.send_all(b"?")
        theirs = await self.there.accept_stream()
        assert await theirs.receive_some(1) == b"?"
        await theirs.send_all(b"!")
        assert await ours.receive_some(1) == b"!"
        return ours, theirs


@asynccontextmanager
async def memory_pair(
    limits: Limits | None = None, metrics: Metrics | None = None
) -> AsyncIterator[Pair]:
    wires = [Wire(end) for end in trio.testing.memory_stream_pair()]
    secured = await shake_hands(RawConnection(wires[0], True), RawConnection(wires[1], False))
    async with run_pair(secured, limits, metrics) as conns:
        yield Pair(conns, wires)


@asynccontextmanager
async def tcp_pair(limits: Limits | None = None) -> AsyncIterator[Pair]:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        host, port = listener.socket.getsockname()
        near = await trio.open_tcp_stream(host, port)
        far = await listener.accept()
    secured = await shake_hands(
        RawConnection(TrioTCPStream(near), True), RawConnection(TrioTCPStream(far), False)
    )
    async with run_pair(secured, limits, None) as conns:
        yield Pair(conns, [])


@asynccontextmanager
async def run_pair(
    secured: list[ISecureConn], limits: Limits | None, metrics: Metrics | None
) -> AsyncIterator[list[YamuxConn]]:
    conns = [
        YamuxConn(end, ID(bytes([index])), limits=limits, metrics=metrics)
        for index, end in enumerate(secured)
    ]
    async with trio.open_nursery() as nursery:
        for conn in conns:
            nursery.start_soon(conn.start)
            await conn.event_started.wait()
        yield conns
        for conn in conns:
            await conn.close()


@asynccontextmanager
async def stock_pair() -> AsyncIterator[tuple[Yamux, Yamux, list[Wire]]]:
    """As ``memory_pair``, with the library's own muxer."""
    wires = [Wire(end) for end in trio.testing.memory_stream_pair()]
    secured = await shake_hands(RawConnection(wires[0], True), RawConnection(wires[1], False))
    here, there = (Yamux(end, ID(bytes([index]))) for index, end in enumerate(secured))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.start)
        nursery.start_soon(there.start)
        await here.event_started.wait()
        await there.event_started.wait()
        yield here, there, wires
        nursery.cancel_scope.cancel()


PairMaker = Callable[[], AbstractAsyncContextManager[Pair]]


@pytest.fixture(params=[memory_pair, tcp_pair], ids=["memory", "tcp"])
def make_pair(request: pytest.FixtureRequest) -> PairMaker:
    maker: PairMaker = request.param
    return maker


async def read_all(stream: YamuxStream) -> bytes:
    received = bytearray()
    while data := await stream.receive_some(MIB):
        received += data
    return bytes(received)


async def read_exactly(stream: YamuxStream, count: int) -> bytes:
    received = b""
    while len(received) < count:
        data = await stream.receive_some(count - len(received))
        assert data, "ended too early"
        received += data
    return received


# What a byte stream promises.


async def test_bytes_arrive_whole_both_ways_with_one_side_closed_first(
    make_pair: PairMaker,
) -> None:
    blob = random.Random(2).randbytes(3 * MIB)
    with trio.fail_after(10):
        async with make_pair() as pair, trio.open_nursery() as nursery:
            ours, theirs = await pair.streams()

            async def answer() -> None:
                question = await read_all(theirs)
                await theirs.send_all(hashlib.sha256(question).digest())
                await theirs.send_all(question)
                await theirs.aclose()

            nursery.start_soon(answer)
            await ours.send_all(blob)
            await ours.send_eof()
            answered = await read_all(ours)
            assert answered == hashlib.sha256(blob).digest() + blob
            await ours.aclose()
            assert pair.here.stream_count == 0
            assert pair.there.stream_count == 0


async def test_a_reset_wakes_a_waiting_reader_with_a_reset(make_pair: PairMaker) -> None:
    with trio.fail_after(5):
        async with make_pair() as pair, trio.open_nursery() as nursery:
            ours, theirs = await pair.streams()

            async def read_cut() -> None:
                with pytest.raises(StreamReset):
                    await theirs.receive_some()

            nursery.start_soon(read_cut)
            ours.abort()


async def test_a_lost_connection_resets_streams_that_wait(make_pair: PairMaker) -> None:
    with trio.fail_after(5):
        async with make_pair() as pair, trio.open_nursery() as nursery:
            ours, theirs = await pair.streams()

            async def read_cut() -> None:
                with pytest.raises(StreamReset):
                    await theirs.receive_some()

            async def write_cut() -> None:
                with pytest.raises(StreamReset):
                    await theirs.send_all(b"x" * MIB)

            nursery.start_soon(read_cut)
            nursery.start_soon(write_cut)
            await trio.testing.wait_all_tasks_blocked()
            await pair.here.secured_conn.close()
            await pair.there.event_closed.wait()
            with pytest.raises(MuxedConnUnavailable):
                await pair.there.open_stream()
            with pytest.raises(MuxedConnUnavailable):
                await pair.there.accept_stream()
            ours.abort()


async def test_own_close_is_told_apart_from_the_peers(make_pair: PairMaker) -> None:
    with trio.fail_after(5):
        async with make_pair() as pair:
            ours, theirs = await pair.streams()
            await ours.send_eof()
            with pytest.raises(StreamClosed):
                await ours.send_all(b"x")
            theirs.abort()
            with pytest.raises(StreamClosed):
                await theirs.receive_some()


# Cancelling.


async def test_cancelling_a_write_harms_nobody_even_with_the_wire_held() -> None:
    with trio.fail_after(5):
        async with memory_pair() as pair:
            other, other_far = await pair.streams()
            stream, far = await pair.streams()
            pair.wires[0].gate = trio.Event()
            await other.send_all(b"held")
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, b"x" * MIB)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            stream.abort()
            pair.wires[0].gate.set()
            await other.send_all(b" and whole")
            assert await read_exactly(other_far, 14) == b"held and whole"
            with pytest.raises(StreamReset):
                await read_all(far)


async def test_cancelling_a_read_loses_no_byte() -> None:
    with trio.fail_after(20):
        async with tcp_pair() as pair, trio.open_nursery() as nursery:
            ours, theirs = await pair.streams()
            blob = random.Random(3).randbytes(500_000)

            async def write() -> None:
                for start in range(0, len(blob), 1000):
                    await ours.send_all(blob[start : start + 1000])
                await ours.send_eof()

            nursery.start_soon(write)
            received = bytearray()
            rng = random.Random(4)
            ended = False
            while not ended:
                with trio.move_on_after(rng.choice([0, 0, 0.00001, 0.0001])):
                    data = await theirs.receive_some(rng.choice([1, 100, 5000]))
                    received += data
                    ended = not data
            assert received == blob
            await theirs.aclose()


async def test_cancelling_an_open_leaves_nothing_behind() -> None:
    with trio.fail_after(5):
        async with memory_pair() as pair:
            for _ in range(100):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await pair.here.open_stream()
            assert pair.here.stream_count == 0
            ours, _ = await pair.streams()
            assert repr(ours).startswith("<yamux stream 1 ")


@pytest.mark.stock
async def test_stock_cancelling_a_write_kills_the_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with stock_pair() as (here, there, wires):
            stream = await here.open_stream()
            await there.accept_stream()
            wires[0].gate = trio.Event()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.write, b"x")
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            wires[0].gate.set()
            await here.open_stream()
            # The nonce has moved, and the message it belongs to was never sent.
            await there.event_closed.wait()


@pytest.mark.stock
async def test_stock_a_reset_reads_as_a_clean_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with stock_pair() as (here, there, _), trio.open_nursery() as nursery:
            stream = await here.open_stream()
            await stream.write(b"half an ans")
            far = await there.accept_stream()
            assert await far.read(11) == b"half an ans"

            async def read_as_end() -> None:
                with pytest.raises(MuxedStreamEOF):
                    await far.read(11)

            nursery.start_soon(read_as_end)
            await trio.testing.wait_all_tasks_blocked()
            await stream.reset()


# Slow readers.


async def test_a_writer_waits_for_a_reader_however_slow(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(100_000):
        async with memory_pair() as pair, trio.open_nursery() as nursery:
            ours, theirs = await pair.streams()

            async def write() -> None:
                await ours.send_all(b"x" * MIB)
                await ours.send_eof()

            nursery.start_soon(write)
            await trio.sleep(3600)
            assert len(await read_all(theirs)) == MIB


@pytest.mark.stock
async def test_stock_a_reader_slower_than_five_seconds_kills_the_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with stock_pair() as (here, there, _):
            stream = await here.open_stream()
            await there.accept_stream()
            with pytest.raises(MuxedStreamError, match="5 seconds"):
                await stream.write(b"x" * MIB)


async def test_stalled_streams_do_not_hold_up_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with memory_pair() as pair, trio.open_nursery() as nursery:
            for _ in range(20):
                stalled, _ = await pair.streams()
                nursery.start_soon(stalled.send_all, b"x" * MIB)
            await trio.testing.wait_all_tasks_blocked()
            ours, theirs = await pair.streams()
            await ours.send_all(b"quick")
            assert await read_exactly(theirs, 5) == b"quick"
            nursery.cancel_scope.cancel()


# How many.


async def test_a_thousand_streams_are_open_at_once() -> None:
    with trio.fail_after(20):
        async with memory_pair() as pair, trio.open_nursery() as nursery:

            async def echo(stream: YamuxStream) -> None:
                while data := await stream.receive_some():
                    await stream.send_all(data)
                await stream.aclose()

            async def serve() -> None:
                for _ in range(1000):
                    nursery.start_soon(echo, await pair.there.accept_stream())

            async def ask(number: int) -> None:
                stream = await pair.here.open_stream()
                for turn in range(3):
                    line = f"{number} {turn}".encode()
                    await stream.send_all(line)
                    assert await read_exactly(stream, len(line)) == line
                await stream.send_eof()
                assert await stream.receive_some() == b""

            nursery.start_soon(serve)
            async with trio.open_nursery() as askers:
                for number in range(1000):
                    askers.start_soon(ask, number)
            assert pair.here.stream_count == 0
        assert pair.there.stream_count == 0


async def test_the_stream_beyond_the_limit_fails_at_once_and_says_why() -> None:
    with trio.fail_after(5):
        async with memory_pair(Limits(streams=3)) as pair:
            opened = [await pair.here.open_stream() for _ in range(pair.here.stream_limit)]
            with pytest.raises(PeerRefused, match="limit of one connection"):
                await pair.here.open_stream()
            opened[0].abort()
            await pair.here.open_stream()


@pytest.mark.stock
async def test_stock_the_257th_stream_waits_forever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(10_000):
        async with stock_pair() as (here, there, _), trio.open_nursery() as nursery:

            async def accept() -> None:
                while True:
                    await there.accept_stream()

            nursery.start_soon(accept)
            for _ in range(256):
                await here.open_stream()
            with trio.move_on_after(3600) as scope:
                await here.open_stream()
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()


# Ending.


async def test_closing_sends_what_was_queued_first(make_pair: PairMaker) -> None:
    with trio.fail_after(5):
        async with make_pair() as pair:
            ours, theirs = await pair.streams()
            await ours.send_all(b"x" * 200 * KIB)
            await ours.send_eof()
            await pair.here.close()
            assert len(await read_all(theirs)) == 200 * KIB
            await pair.there.event_closed.wait()


async def test_closing_waits_a_second_and_no_longer_for_a_stalled_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with memory_pair() as pair:
            ours, theirs = await pair.streams()
            await ours.send_all(b"x" * 256 * KIB)
            await ours.send_all(b"does not fit the window")
            started_at = trio.current_time()
            await pair.here.close()
            assert 1.0 <= trio.current_time() - started_at < 1.5
            with pytest.raises(StreamReset):
                await read_all(theirs)


async def test_closing_takes_its_time_even_if_the_wire_is_stuck(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with memory_pair() as pair:
            ours, _ = await pair.streams()
            pair.wires[0].gate = trio.Event()
            await ours.send_all(b"x")
            started_at = trio.current_time()
            await pair.here.close()
            assert trio.current_time() - started_at < 1.5
            pair.wires[0].gate.set()


async def test_the_close_hook_is_awaited_once_on_each_side() -> None:
    with trio.fail_after(5):
        told = []
        async with memory_pair() as pair:

            async def hear_close(name: str, conn: IMuxedConn) -> None:
                await conn.close()  # As libp2p's SwarmConn does.
                assert conn.is_closed
                told.append(name)

            pair.here.on_close = lambda: hear_close("here", pair.here)
            pair.there.on_close = lambda: hear_close("there", pair.there)
            assert pair.here.is_established
            await pair.here.close()
            await pair.here.close()
        assert sorted(told) == ["here", "there"]
        assert not pair.here.is_established


async def test_a_connection_that_is_refused_before_it_started_closes_its_socket() -> None:
    with trio.fail_after(5):
        wires = [Wire(end) for end in trio.testing.memory_stream_pair()]
        secured = await shake_hands(RawConnection(wires[0], True), RawConnection(wires[1], False))
        conn = YamuxConn(secured[0], ID(b"a"))
        await conn.close()
        assert await wires[1].read(1) == b""
        await conn.start()
        assert conn.event_started.is_set()
        assert conn.is_closed


async def test_a_peer_that_breaks_the_protocol_is_counted_and_left() -> None:
    metrics = Metrics()
    with trio.fail_after(5):
        async with memory_pair(metrics=metrics) as pair:
            _, theirs = await pair.streams()
            await pair.here._channel.send([b"\xff" * 12])
            with pytest.raises(StreamReset, match="version"):
                await theirs.receive_some()
            await pair.there.event_closed.wait()
    faults = metrics.protocol_faults.labels(protocol="yamux", code="bad_version")
    assert faults._value.get() == 1


async def test_a_wire_that_is_tampered_with_ends_the_connection() -> None:
    metrics = Metrics()
    with trio.fail_after(5):
        async with memory_pair(metrics=metrics) as pair:
            _, theirs = await pair.streams()
            await pair.wires[0].stream.send_all(b"\x00\x20" + b"\x00" * 32)
            with pytest.raises(StreamReset):
                await theirs.receive_some()
    faults = metrics.protocol_faults.labels(protocol="yamux", code="bad_ciphertext")
    assert faults._value.get() == 1


async def test_an_abandoned_stream_is_reset_after_its_linger(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(100):
        async with memory_pair() as pair:
            ours, theirs = await pair.streams()
            await ours.aclose()
            await ours.aclose()
            assert await theirs.receive_some() == b""
            assert pair.here.stream_count == 1
            await trio.sleep(29)
            await theirs.send_all(b"nobody hears this")
            await trio.sleep(2)
            assert pair.here.stream_count == 0
            with pytest.raises(StreamReset):
                await theirs.send_all(b"x")


async def test_a_stream_that_is_read_after_its_close_does_not_linger(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(1000):
        async with memory_pair() as pair, trio.open_nursery() as nursery:
            ours, theirs = await pair.streams()
            await ours.close()  # libp2p's, after which its users read on

            async def answer_late() -> None:
                await trio.sleep(100)
                await theirs.send_all(b"late")

            nursery.start_soon(answer_late)
            assert await ours.read(4) == b"late"


async def test_a_ping_measures_the_round_trip_and_shows_life() -> None:
    with trio.fail_after(5):
        async with tcp_pair() as pair:
            before = pair.here.last_received
            assert 0 < await pair.here.ping(1) < 1
            assert pair.here.last_received > before


async def test_a_ping_without_an_answer_times_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(60):
        async with memory_pair() as pair:
            pair.wires[1].gate = trio.Event()
            with pytest.raises(trio.TooSlowError):
                await pair.here.ping(3)
            pair.wires[1].gate.set()


# As libp2p's own protocols see it.


async def test_hosts_of_libp2p_get_our_muxer_and_tell_a_reset_from_an_end() -> None:
    async def answer(stream: INetStream) -> None:
        question = await stream.read(100)
        if question == b"cut":
            await stream.reset()
        else:
            await stream.write(question)
            await stream.close()

    hosts = []
    for _ in range(2):
        key_pair = create_new_key_pair()
        noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
        host = new_host(key_pair=key_pair, sec_opt={NOISE: noise})
        use_our_muxer(host)
        hosts.append(host)
    listener, dialler = hosts
    protocol = TProtocol("/answer/1")
    listener.set_stream_handler(protocol, answer)
    with trio.fail_after(20):
        async with listener.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]), dialler.run([]):
            info = info_from_p2p_addr(listener.get_addrs()[0])
            await dialler.connect(info)
            conn = dialler.get_network().connections[info.peer_id][0].muxed_conn
            assert type(conn) is YamuxConn
            assert conn.negotiated_muxer_protocol == "/yamux/1.0.0"
            stream = await dialler.new_stream(info.peer_id, [protocol])
            await stream.write(b"whole")
            assert await stream.read(100) == b"whole"
            with pytest.raises(StreamEOF):
                await stream.read(100)
            await stream.close()
            stream = await dialler.new_stream(info.peer_id, [protocol])
            await stream.write(b"cut")
            with pytest.raises(NetStreamReset):
                await stream.read(100)
            await conn.close()
            with pytest.raises(MuxedConnUnavailable):
                await conn.open_stream()


async def test_libp2ps_names_raise_libp2ps_errors() -> None:
    with trio.fail_after(5):
        async with memory_pair() as pair:
            ours, theirs = await pair.streams()
            await ours.write(b"abc")
            await ours.close_write()
            assert await theirs.read() == b"abc"
            with pytest.raises(MuxedStreamEOF):
                await theirs.read(1)
            await theirs.reset()
            with pytest.raises(MuxedStreamReset):
                await ours.read(1)
            with pytest.raises(MuxedStreamReset):
                await ours.read(1)
            with pytest.raises(MuxedStreamClosed):
                await theirs.write(b"x")


# All of it at once.

EXCHANGES = 10_000
WORKERS = 40


class Churn:
    """Exchanges of every kind on one connection, half-closed, reset and cancelled at random."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.left = EXCHANGES
        self.whole = self.cut = self.cancelled = 0

    async def serve_forever(self, nursery: trio.Nursery) -> None:
        while True:
            nursery.start_soon(self.answer, await self.pair.there.accept_stream())

    async def answer(self, stream: YamuxStream) -> None:
        """Answer with the digest and the question, once the question has ended."""
        try:
            question = await read_all(stream)
            if question.startswith(b"cut"):
                await stream.send_all(question[:1000])
                stream.abort()
                return
            await stream.send_all(hashlib.sha256(question).digest() + question)
            await stream.aclose()
        except StreamReset:
            stream.abort()

    async def work(self, rng: random.Random) -> None:
        while self.left > 0:
            self.left -= 1
            kind = rng.random()
            if kind < 0.7:
                await self.ask_whole(rng)
            elif kind < 0.85:
                await self.ask_cut(rng)
            else:
                await self.ask_and_cancel(rng)

    async def ask_whole(self, rng: random.Random) -> None:
        stream = await self.pair.here.open_stream()
        question = rng.randbytes(rng.choice([1, 100, 5000, 70_000, 300_000]))
        await stream.send_all(question)
        await stream.send_eof()
        answer = await read_all(stream)
        assert answer == hashlib.sha256(question).digest() + question
        self.whole += 1

    async def ask_cut(self, rng: random.Random) -> None:
        stream = await self.pair.here.open_stream()
        await stream.send_all(b"cut" + rng.randbytes(rng.choice([1, 5000])))
        await stream.send_eof()
        with pytest.raises(StreamReset):
            await read_all(stream)
        stream.abort()
        self.cut += 1

    async def ask_and_cancel(self, rng: random.Random) -> None:
        stream: YamuxStream | None = None
        with trio.move_on_after(rng.choice([0, 0.0005, 0.002, 0.01])):
            stream = await self.pair.here.open_stream()
            await stream.send_all(rng.randbytes(rng.choice([1, 5000, 300_000])))
            await stream.send_eof()
            await read_all(stream)
        if stream is not None:
            stream.abort()
        self.cancelled += 1


@pytest.mark.slow
async def test_ten_thousand_exchanges_leave_one_connection_whole_and_empty() -> None:
    with trio.fail_after(100):
        async with tcp_pair() as pair, trio.open_nursery() as nursery:
            churn = Churn(pair)
            nursery.start_soon(churn.serve_forever, nursery)
            async with trio.open_nursery() as workers:
                for number in range(WORKERS):
                    workers.start_soon(churn.work, random.Random(number))
            assert churn.whole + churn.cut + churn.cancelled == EXCHANGES
            # The last resets are still on their way; a ping comes after them.
            await pair.here.ping(5)
            while pair.there.stream_count:
                await pair.there.ping(5)
            assert pair.here.stream_count == 0
            assert pair.here._core.queued == pair.there._core.queued == 0
            assert not pair.here._core.lingering
            assert not pair.there._core.lingering
            assert pair.here.is_established
            nursery.cancel_scope.cancel()


async def test_bytes_that_nobody_waits_for_arrive_by_themselves_and_in_order() -> None:
    with trio.fail_after(5):
        async with memory_pair() as pair:
            ours, theirs = await pair.streams()
            for number in range(5):
                await ours.send_soon(b"%d" % number)
                assert await theirs.receive_some() == b"%d" % number
            await ours.send_soon(b"a")
            await ours.send_all(b"b")
            await ours.send_soon(b"c")
            await ours.send_eof()
            received = b""
            while data := await theirs.receive_some():
                received += data
            assert received == b"abc"
            with pytest.raises(StreamClosed):
                await ours.send_soon(b"d")


async def test_a_connection_that_closes_sends_what_it_held_back() -> None:
    with trio.fail_after(5):
        async with memory_pair() as pair:
            ours, theirs = await pair.streams()
            await ours.send_soon(b"last words")
            await pair.here.close()
            assert await theirs.receive_some() == b"last words"


async def test_what_many_streams_say_leaves_before_the_writer_has_its_turn() -> None:
    with trio.fail_after(10):
        async with tcp_pair() as pair:
            streams = [await pair.streams() for _ in range(8)]
            await trio.testing.wait_all_tasks_blocked(0.01)
            for ours, _ in streams[:7]:
                await ours.send_all(b"question")
            assert pair.here._core.queued == 7 * len(b"question")  # few wait for the writer
            await streams[7][0].send_all(b"question")
            assert pair.here._core.queued == 0
            for _, theirs in streams:
                assert await theirs.receive_some() == b"question"
            # What was woken for the first seven finds nothing to do, and goes on to the next.
            await streams[0][0].send_all(b"again")
            assert await streams[0][1].receive_some() == b"again"


async def test_what_many_streams_say_into_a_full_socket_arrives_whole_and_in_order() -> None:
    with trio.fail_after(30):
        async with tcp_pair() as pair:
            streams = [await pair.streams() for _ in range(24)]
            sizes = [random.Random(n).randrange(200 * KIB, 600 * KIB) for n in range(len(streams))]
            bodies = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
            received = [b""] * len(streams)

            async def send(number: int) -> None:
                ours, body = streams[number][0], bodies[number]
                for start in range(0, len(body), 10_000):
                    await ours.send_all(body[start : start + 10_000])
                    await ours.send_soon(b"")
                await ours.send_eof()

            async def receive(number: int) -> None:
                theirs = streams[number][1]
                pieces = []
                while data := await theirs.receive_some():
                    pieces.append(data)
                received[number] = b"".join(pieces)

            async with trio.open_nursery() as nursery:
                for number in range(len(streams)):
                    nursery.start_soon(send, number)
                    nursery.start_soon(receive, number)
            assert received == bodies


async def test_a_connection_that_broke_says_so_to_all_that_would_write_at_once() -> None:
    with trio.fail_after(10):
        async with tcp_pair() as pair:
            streams = [await pair.streams() for _ in range(8)]
            await pair.there.secured_conn.close()
            for ours, _ in streams:
                with suppress(StreamReset):  # as soon as it is known
                    await ours.send_all(b"lost")
            for ours, _ in streams:
                with pytest.raises(StreamReset):
                    await ours.receive_some()
