"""A gateway before members of an in-process mesh, with engines on loopback that do as told."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import trio

from meshnode.http.gateway.access import Access
from meshnode.http.gateway.choice import Aim, ModelChooser
from meshnode.http.gateway.listing import Listing
from meshnode.http.gateway.server import Gateway
from meshnode.http.gateway.settings import GatewaySettings
from meshnode.metrics import Metrics
from meshnode.net.local_services import LocalService
from meshnode.net.member import Member, MemberSettings
from meshnode.net.memory_mesh import MemoryNetwork
from meshnode.values import HealthCheck

TCP = HealthCheck("tcp")
Serve = Callable[["Connection"], Awaitable[None]]


class Reading:
    """A GPU that has this much free."""

    def __init__(self, gib: int) -> None:
        self.available = self.total = gib * 2**30
        self.count = 1


class Connection:
    """An engine's side of one connection."""

    def __init__(self, engine: Engine, stream: trio.SocketStream) -> None:
        self.engine = engine
        self.stream = stream
        self.data = b""
        self.counted = False

    async def request(self) -> tuple[bytes, bytes] | None:
        """Return the next request's (head, body), or None at the end; bodies in chunks as sent."""
        while b"\r\n\r\n" not in self.data:
            more = await self.stream.receive_some()
            if not more:
                return None
            self.data += more
        if not self.counted:  # a look at the service's health asks nothing
            self.counted = True
            self.engine.connections += 1
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            while not self.data.endswith(b"0\r\n\r\n"):
                self.data += await self.more()
            body, self.data = self.data, b""
        else:
            length = 0
            for line in lower.split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            while len(self.data) < length:
                self.data += await self.more()
            body, self.data = self.data[:length], self.data[length:]
        self.engine.requests.append((head, body))
        self.engine.asked.set()
        return head, body

    async def more(self) -> bytes:
        data = await self.stream.receive_some()
        if not data:
            raise trio.BrokenResourceError
        return bytes(data)

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def until_gone(self) -> None:
        """Wait for the other side's end or cut."""
        while await self.stream.receive_some():
            pass

    def cut(self) -> None:
        abort(self.stream)


class Engine:
    """A TCP server whose handler serves one connection; counts what it gets."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.connections = 0
        self.requests: list[tuple[bytes, bytes]] = []
        self.asked = trio.Event()
        self.gone = trio.Event()
        self.gone_at = 0.0
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._one, listeners)

    async def _one(self, stream: trio.SocketStream) -> None:
        connection = Connection(self, stream)
        try:
            async with stream:
                await self.serve(connection)
        except* trio.BrokenResourceError:
            pass
        finally:
            if connection.counted:
                self.gone_at = trio.current_time()
                self.gone.set()


def abort(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def answering(
    body: bytes = b"hello", status: bytes = b"200 OK", *lines: bytes, framing: bytes | None = None
) -> Serve:
    """A handler that gives every request the same answer."""
    length = framing if framing is not None else b"content-length: %d" % len(body)
    head = b"\r\n".join([b"HTTP/1.1 " + status, *lines, length]) + b"\r\n\r\n"

    async def serve(connection: Connection) -> None:
        while await connection.request() is not None:
            await connection.send(head + body)

    return serve


class GatewayMesh:
    """Members of one network, the first with the gateway."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._network = MemoryNetwork(random.Random(1))
        self._members = 0
        self.front_metrics = Metrics()
        self.front = self._member("front", self.front_metrics, ())
        self.address: tuple[str, int] = ("", 0)
        self.peers: dict[str, Member] = {}
        self.ended = trio.Event()  # the gateway has, after its last client

    def _member(
        self, name: str, metrics: Metrics, services: Sequence[LocalService], vram: int = 0
    ) -> Member:
        mesh = self._network.node(name, keys=(b"k" * 32,))
        return Member(
            mesh,
            MemberSettings(network="test", name=name, services=tuple(services), queue_timeout=1.0),
            gpu=lambda: Reading(vram),
            rng=random.Random(name),
            metrics=metrics,
            wall_time=lambda: 0.0,
        )

    def expose(self, engine: Engine) -> None:
        """Let the node with the gateway serve too; before ``open``."""
        service = LocalService("llm", "127.0.0.1", engine.port, check=TCP)
        self.front = self._member("front-that-serves", self.front_metrics, [service])

    async def open(
        self,
        *,
        settings: GatewaySettings | None = None,
        access: Access | None = None,
    ) -> None:
        """Start the gateway."""
        await self._start(self.front)
        await self.gateway(settings, access)

    async def gateway(self, settings: GatewaySettings | None, access: Access | None) -> None:
        gateway = Gateway(
            ModelChooser(
                self.front.models,
                self.front.ledger,
                self.front.queue,
                aim=Aim(),
                wall_time=lambda: 0.0,
            ),
            self.front.upstreams,
            listing=Listing(self.front.ledger, service_id=None),
            access=access or Access(loopback_only=True),
            metrics=self.front_metrics,
            settings=settings or GatewaySettings(),
        )
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.served = gateway
        self._nursery.start_soon(self._serve_clients, listeners)
        self.address = listeners[0].socket.getsockname()[:2]

    async def _serve_clients(self, listeners: list[trio.SocketListener]) -> None:
        await self.served.serve_forever(listeners)
        self.ended.set()

    async def _start(self, member: Member) -> None:
        await self._nursery.start(member._mesh.run_forever)
        self._nursery.start_soon(member.run_forever)

    async def peer(
        self,
        name: str,
        engine: Engine | int,
        *,
        vram: int = 1,
        limit: int = 0,
        check: HealthCheck = TCP,
    ) -> Member:
        """Add a member before an engine (or a port), and wait until the gateway knows it."""
        port = engine if isinstance(engine, int) else engine.port
        service = LocalService("llm", "127.0.0.1", port, max_in_flight=limit, check=check)
        member = self._member(name, Metrics(), [service], vram)
        self.peers[name] = member
        await self._start(member)
        await member._mesh.dial(self.front._mesh.addrs[0], timeout=5)
        await until(lambda: self._knows(name))
        return member

    def _knows(self, name: str) -> bool:
        online = self.front.ledger.online(trio.current_time())
        return any(entry.node.name == name and entry.node.services for entry in online)

    async def engine(self, serve: Serve) -> Engine:
        engine = Engine(serve)
        await self._nursery.start(engine.run)
        return engine

    async def served_by(self, serve: Serve, name: str = "peer", **options: Any) -> Engine:
        """Add a member before an engine that does as told."""
        engine = await self.engine(serve)
        await self.peer(name, engine, **options)
        return engine

    def lose(self, name: str) -> None:
        """Let the connection to a member die, as the member's death does."""
        self._network.sever(self.front._mesh, self.peers[name]._mesh)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.address)

    def counted(self, name: str, **labels: str) -> float:
        return self.front_metrics.registry.get_sample_value(f"meshnode_{name}", labels) or 0.0


async def until(condition: Callable[[], bool], *, within: float = 10.0) -> None:
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.002)


async def read_to_end(stream: trio.SocketStream) -> bytes:
    received = b""
    async for data in stream:
        received += data
    return received


async def exchange(mesh: GatewayMesh, *pieces: bytes) -> bytes:
    """Send pieces on a connection of their own; return everything up to its end."""
    async with await mesh.connect() as client:
        for piece in pieces:
            await client.send_all(piece)
        return await read_to_end(client)


def get(path: str = "/", *lines: bytes, close: bool = True) -> bytes:
    head = [b"GET " + path.encode() + b" HTTP/1.1", b"host: localhost", *lines]
    if close:
        head.append(b"connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n"


def post(path: str, body: bytes, *lines: bytes, close: bool = True) -> bytes:
    head = [b"POST " + path.encode() + b" HTTP/1.1", b"host: localhost", *lines]
    head.append(b"content-length: %d" % len(body))
    if close:
        head.append(b"connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n" + body


CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
chat = partial(post, "/v1/chat/completions", CHAT)
