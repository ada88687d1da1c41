"""One end of a measurement: ``bench_peer.py ours|stock serve`` or ``… ours|stock bench ADDR``.

``serve`` prints {"addr": …} and serves until its standard input ends; ``bench`` measures against
such a server and prints one JSON object. tests/interop/go/main.go speaks the same.
``ours relay`` is a relay, and ``ours behind ADDR`` serves through the one at that address.
``hear`` and ``tell ADDR`` do the same for announcements: the hearer prints its CPU per message.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import trio

ECHO, SINK = "/bench/echo/1", "/bench/sink/1"
TOPIC = "/bench/announce/1"
MESSAGE = bytes(64)
CONNECTS, OPENS, PINGS = 7, 200, 1000
BULK_BYTES, BLOCK = 100 << 20, 1 << 20
STREAMS, TRIPS = 1000, 10
# Stock waits for ever from the 257th stream on.
STREAMS_LIMIT_S = 20.0
# As large as an announcement with two services and four addresses, and as frequent as a node
# in a large mesh hears them at most.
ANNOUNCEMENT, ANNOUNCEMENTS, ANNOUNCEMENTS_PER_S = bytes(300), 600, 100


class Stream(Protocol):
    """What either library's stream is turned into."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self, most: int) -> bytes: ...  # b"" at the end
    async def end(self) -> None: ...
    async def drop(self) -> None: ...


Handler = Callable[[Stream], Awaitable[None]]


class Peer(Protocol):
    """What either library's host is turned into."""

    addr: str

    async def dial(self, addr: str) -> str: ...
    async def hang_up(self, peer_id: str) -> None: ...
    async def open(self, peer_id: str, protocol_id: str) -> Stream: ...
    async def publish(self, data: bytes) -> None: ...


class Ours:
    """meshnode's own host."""

    def __init__(
        self,
        handlers: dict[str, Handler],
        on_message: Callable[[], None] | None,
        *,
        is_relay: bool = False,
    ) -> None:
        from meshnode.core.belonging import by_keys
        from meshnode.metrics import Metrics
        from meshnode.net.libp2p.host import Libp2pMesh
        from meshnode.net.libp2p.identity import ephemeral_identity
        from meshnode.net.mesh import Verdict

        self.mesh = Libp2pMesh(
            identity=ephemeral_identity(),
            listen=("/ip4/127.0.0.1/tcp/0",),
            membership=by_keys((bytes(32),)),
            metrics=Metrics(),
            is_relay=is_relay,
        )
        for protocol_id, handler in handlers.items():
            self._serve(protocol_id, handler)

        def listener(_sender: str, _data: bytes) -> Verdict:
            if on_message is not None:
                on_message()
            return Verdict.ACCEPT

        self.mesh.subscribe(TOPIC, listener)

    def _serve(self, protocol_id: str, handler: Handler) -> None:
        async def serve(stream: object) -> None:
            await handler(OurStream(stream))

        self.mesh.serve(protocol_id, serve)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.mesh.run_forever)
            self.addr = self.mesh.addrs[0]
            yield
            nursery.cancel_scope.cancel()

    async def reserve(self, relay_addr: str) -> None:
        """Be reached through a relay, and tell that address instead of the direct one."""
        await self.mesh.reserve(await self.dial(relay_addr), timeout=10)
        self.addr = self.mesh.addrs[-1]

    async def dial(self, addr: str) -> str:
        return await self.mesh.dial(addr, timeout=10)

    async def hang_up(self, peer_id: str) -> None:
        await self.mesh.disconnect(peer_id, "measured")

    async def open(self, peer_id: str, protocol_id: str) -> Stream:
        return OurStream(await self.mesh.open_stream(peer_id, protocol_id, timeout=10))

    async def publish(self, data: bytes) -> None:
        await self.mesh.publish(TOPIC, data)


class OurStream:
    """A MeshStream under the names of this file."""

    def __init__(self, stream: object) -> None:
        self.send = stream.send_all
        self.receive = stream.receive_some
        self.end = stream.send_eof
        self.drop = stream.aclose


class Stock:
    """py-libp2p as it comes: noise, yamux, GossipSub with its own settings."""

    def __init__(self, handlers: dict[str, Handler], on_message: Callable[[], None] | None) -> None:
        from libp2p import new_host
        from libp2p.custom_types import TProtocol
        from libp2p.pubsub.gossipsub import GossipSub
        from libp2p.pubsub.pubsub import Pubsub

        self.host = new_host()
        self.on_message = on_message
        # The one setting changed: with it the guard would drop all but ten messages a second.
        self.router = GossipSub(
            ["/meshsub/1.1.0"], degree=6, degree_low=4, degree_high=12,
            spam_protection_enabled=False,
        )  # fmt: skip
        self.pubsub = Pubsub(self.host, self.router)
        for protocol_id, handler in handlers.items():

            async def serve(stream: object, handler: Handler = handler) -> None:
                await handler(StockStream(stream))

            self.host.set_stream_handler(TProtocol(protocol_id), serve)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        from libp2p.tools.anyio_service import background_trio_service
        from multiaddr import Multiaddr

        async with (
            self.host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
            background_trio_service(self.pubsub),
            background_trio_service(self.router),
            trio.open_nursery() as nursery,
        ):
            await self.pubsub.wait_until_ready()
            if self.on_message is not None:
                subscription = await self.pubsub.subscribe(TOPIC)
                nursery.start_soon(self._hear_forever, subscription, self.on_message)
            self.addr = str(self.host.get_addrs()[0])
            yield
            nursery.cancel_scope.cancel()

    async def _hear_forever(self, subscription: object, on_message: Callable[[], None]) -> None:
        while True:
            await subscription.get()
            on_message()

    async def dial(self, addr: str) -> str:
        from libp2p.peer.peerinfo import info_from_p2p_addr
        from multiaddr import Multiaddr

        info = info_from_p2p_addr(Multiaddr(addr))
        await self.host.connect(info)
        return str(info.peer_id)

    async def hang_up(self, peer_id: str) -> None:
        from libp2p.peer.id import ID

        await self.host.disconnect(ID.from_base58(peer_id))

    async def open(self, peer_id: str, protocol_id: str) -> Stream:
        from libp2p.custom_types import TProtocol
        from libp2p.peer.id import ID

        return StockStream(
            await self.host.new_stream(ID.from_base58(peer_id), [TProtocol(protocol_id)])
        )

    async def publish(self, data: bytes) -> None:
        await self.pubsub.publish(TOPIC, data)


class StockStream:
    """A NetStream under the names of this file."""

    def __init__(self, stream: object) -> None:
        self._stream = stream
        self.end = stream.close_write
        self.drop = stream.close

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), 65_507):
            await self._stream.write(data[start : start + 65_507])

    async def receive(self, most: int) -> bytes:
        from libp2p.network.stream.exceptions import StreamEOF

        try:
            return await self._stream.read(most)
        except StreamEOF:
            return b""


async def echo(stream: Stream) -> None:
    while data := await stream.receive(65_536):
        await stream.send(data)
    await stream.drop()


async def sink(stream: Stream) -> None:
    total = 0
    while data := await stream.receive(65_536):
        total += len(data)
    await stream.send(total.to_bytes(8, "big"))
    await stream.drop()


async def round_trip(stream: Stream) -> None:
    await stream.send(MESSAGE)
    missing = len(MESSAGE)
    while missing:
        data = await stream.receive(missing)
        if not data:
            raise EOFError("the echo ended early")
        missing -= len(data)


async def measure(peer: Peer, addr: str) -> dict[str, float | None]:
    connects = []
    for number in range(CONNECTS):
        start = time.perf_counter()
        peer_id = await peer.dial(addr)
        connects.append((time.perf_counter() - start) * 1e3)
        if number < CONNECTS - 1:
            await peer.hang_up(peer_id)
    result: dict[str, float | None] = {"connect_ms": statistics.median(connects)}

    opens = []
    for _ in range(OPENS):
        start = time.perf_counter()
        stream = await peer.open(peer_id, ECHO)
        await round_trip(stream)
        opens.append((time.perf_counter() - start) * 1e3)
        await stream.drop()
    result["open_ms"] = statistics.median(opens)

    stream = await peer.open(peer_id, ECHO)
    pings = []
    for _ in range(PINGS):
        start = time.perf_counter()
        await round_trip(stream)
        pings.append((time.perf_counter() - start) * 1e3)
    await stream.drop()
    result["ping_pong_ms"] = statistics.median(pings)

    stream = await peer.open(peer_id, SINK)
    block = bytes(BLOCK)
    start = time.perf_counter()
    for _ in range(BULK_BYTES // BLOCK):
        await stream.send(block)
    await stream.end()
    answer = b""
    while len(answer) < 8:
        answer += await stream.receive(8)
    if int.from_bytes(answer, "big") != BULK_BYTES:
        raise EOFError("bytes were lost")
    result["one_stream_mb_s"] = BULK_BYTES / 1e6 / (time.perf_counter() - start)
    await stream.drop()

    result["streams_trips_s"] = None
    result["streams_open"] = 0
    with trio.move_on_after(STREAMS_LIMIT_S):
        streams = []
        for _ in range(STREAMS):
            streams.append(await peer.open(peer_id, ECHO))
            result["streams_open"] = len(streams)

        async def trips(stream: Stream) -> None:
            for _ in range(TRIPS):
                await round_trip(stream)

        start = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(trips, stream)
        result["streams_trips_s"] = STREAMS * TRIPS / (time.perf_counter() - start)
    return result


async def until_input_ends() -> None:
    await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


async def run(stack: str, role: str, addr: str) -> None:
    heard: list[float] = []  # CPU seconds of this process at each message

    def on_message() -> None:
        heard.append(time.process_time())

    make = {"ours": Ours, "stock": Stock}[stack]
    more = {"is_relay": True} if role == "relay" else {}
    peer = make({ECHO: echo, SINK: sink}, on_message if role == "hear" else None, **more)
    async with peer.running():
        if role == "behind":
            await peer.reserve(addr)
        if role in ("serve", "hear", "relay", "behind"):
            say(addr=peer.addr)
            await until_input_ends()
            if role == "hear":
                skipped = len(heard) // 5  # warming up
                cpu = heard[-1] - heard[skipped]
                say(announcements=len(heard), cpu_ms=cpu / (len(heard) - skipped - 1) * 1e3)
        elif role == "bench":
            say(**await measure(peer, addr))
        else:
            await peer.dial(addr)
            await trio.sleep(2)  # until the hearer's subscription is known here
            start = trio.current_time()
            for number in range(ANNOUNCEMENTS):
                await trio.sleep_until(start + number / ANNOUNCEMENTS_PER_S)
                await peer.publish(number.to_bytes(4, "big") + ANNOUNCEMENT)
            await trio.sleep(1)
            say(told=ANNOUNCEMENTS)


def main() -> None:
    logging.disable(logging.CRITICAL)
    stack, role, *rest = sys.argv[1:]
    trio.run(run, stack, role, rest[0] if rest else "")


if __name__ == "__main__":
    main()
