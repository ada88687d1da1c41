"""Accepting clients: so many in all, so many from one address, and calm without descriptors.

The law here: a client too many is refused at once, and a system that gives no more descriptors
only pauses the accepting; what is being served goes on, and the first free descriptor is used.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog
import trio

from meshnode.metrics import Metrics
from meshnode.net.descriptors import OUT_OF_DESCRIPTORS
from meshnode.net.tcp_stream import TcpStream

# Each takes two descriptors and some 100 KB of buffers at most.
MAX_CLIENTS = 4096
# More than one busy program opens, few enough that four addresses are needed to use up all.
MAX_CLIENTS_PER_IP = 1024
# When the system gives no descriptor, it is asked again so soon.
_PAUSE = 0.1  # seconds

log = structlog.get_logger(__name__)

Serve = Callable[[trio.SocketStream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class AcceptLimits:
    """How many clients may be connected at a time."""

    in_all: int = MAX_CLIENTS
    per_ip: int = MAX_CLIENTS_PER_IP  # not of this host itself, where all share one address

    def within_descriptors(self, soft_limit: int) -> AcceptLimits:
        """Return the limits for a process that may have ``soft_limit`` descriptors.

        A quarter of them, 256 at most, is left to the mesh, the services and the control API.
        """
        room = (soft_limit - min(256, soft_limit // 4)) // 2
        return AcceptLimits(max(1, min(self.in_all, room)), self.per_ip)


class ClientCount:
    """Counts clients by address, and says who is one too many."""

    def __init__(self, limits: AcceptLimits) -> None:
        self._limits = limits
        self._by_ip: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._by_ip.total()

    def why_not(self, ip: str) -> str | None:
        """Return which limit one more client of ``ip`` would break, a word for a metric."""
        if self.total >= self._limits.in_all:
            return "too_many_clients"
        if self._by_ip[ip] >= self._limits.per_ip and not _is_loopback(ip):
            return "too_many_of_one_client"
        return None

    def enter(self, ip: str) -> None:
        self._by_ip[ip] += 1

    def leave(self, ip: str) -> None:
        self._by_ip[ip] -= 1
        if not self._by_ip[ip]:
            del self._by_ip[ip]  # so that past clients take no memory


class Acceptor:
    """Accepts clients of one entry point and has each served in a task of its own."""

    def __init__(self, limits: AcceptLimits, *, metrics: Metrics) -> None:
        self._count = ClientCount(limits)
        self._tunnels = metrics.tunnels
        self._closed = trio.Event()

    @property
    def clients(self) -> int:
        """Connections open now."""
        return self._count.total

    def close(self) -> None:
        """Accept nobody any more; who is connected is served to the end."""
        self._closed.set()

    async def serve_forever(self, serve: Serve, listeners: Sequence[trio.SocketListener]) -> None:
        """Serve clients until cancelled; after ``close`` until the last one has gone."""
        async with trio.open_nursery() as clients:
            try:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self._accept_forever, serve, listener, clients)
                    await self._closed.wait()
                    accepting.cancel_scope.cancel()
            finally:
                for listener in listeners:
                    listener.socket.close()  # who comes now is refused, not kept waiting

    async def _accept_forever(
        self, serve: Serve, listener: trio.SocketListener, clients: trio.Nursery
    ) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno not in OUT_OF_DESCRIPTORS:
                    raise
                log.warning(
                    "accept_paused",
                    error=exc.strerror,
                    clients=self.clients,
                    advice="raise the file limit (ulimit -n, LimitNOFILE), or lower --max-clients",
                )
                await trio.sleep(_PAUSE)
                continue
            ip = _ip_of(stream)
            too_many = self._count.why_not(ip)
            if too_many is not None:
                clients.start_soon(_refuse, stream)
                self._tunnels.labels(role="entry", outcome=too_many).inc()
                log.warning("client_refused", error=too_many, clients=self.clients, ip=ip)
                continue
            self._count.enter(ip)
            clients.start_soon(self._serve, serve, stream, ip)

    async def _serve(self, serve: Serve, stream: trio.SocketStream, ip: str) -> None:
        try:
            await serve(stream)
        finally:
            self._count.leave(ip)


async def _refuse(stream: trio.SocketStream) -> None:
    await trio.lowlevel.checkpoint()  # a cut in the middle of its connect tells a client less
    TcpStream(stream).reset()


def _ip_of(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""  # it has gone already


def _is_loopback(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip.partition("%")[0]).is_loopback
    except ValueError:
        return False
