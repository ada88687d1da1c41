"""One request at a service: over a tunnel to a peer, or over a connection of this host.

Both kinds are kept when the request is over, so that the next one needs neither a stream nor a
connection of its own. Kept ones count as no load, are bounded in number, and close after a while.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

import trio

from meshnode.errors import MeshError
from meshnode.net.tcp_stream import TcpStream
from meshnode.net.tunnel_stream import TunnelStream

# How many quiet ones are kept for one service at one peer: as many as a busy client opens at once.
MAX_KEPT = 64
# And for all of them together. Each holds a stream of its connection, and a descriptor over there.
MAX_KEPT_IN_ALL = 1024
# Well below the 15 minutes after which the other side closes a quiet tunnel, so that none is
# asked while it is being closed.
KEEP_FOR = 60.0  # seconds
_SWEEP_INTERVAL = 10.0  # seconds

KeptT = TypeVar("KeptT", TunnelStream, TcpStream)
Key = tuple[str, str]  # peer ID, service


class Exchange(Protocol):
    """A request under way, its first bytes sent."""

    async def wait_accepted(self) -> None:
        """Wait until the service is known to take the request.

        Raises:
            TunnelRefused: not now, or not here; not a byte reached the backend.
            StreamReset: cut before that was known.
        """

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return the next bytes of the answer, ``b""`` at the backend's end; raises as above."""

    async def send_all(self, data: bytes) -> None:
        """Send more of the request. Raises StreamReset."""

    async def send_eof(self) -> None:
        """Half-close; the exchange can't be kept then."""

    async def finish(self) -> None:
        """Say that the whole answer was read; what carried it is kept for the next request."""

    async def close(self) -> None:
        """Say that the whole answer was read, and that the backend's connection ends with it."""

    def reset(self) -> None:
        """Give up: the backend sees its connection cut, unless all was finished before."""


class Kept(Generic[KeptT]):
    """Quiet tunnels or connections, the most recently used first."""

    def __init__(self) -> None:
        self._kept: dict[Key, list[tuple[float, KeptT]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def take(self, key: Key) -> KeptT | None:
        """Return the one used last, which is the least likely to have been closed meanwhile."""
        entries = self._kept.get(key)
        if not entries:
            return None
        self._count -= 1
        kept = entries.pop()[1]
        if not entries:
            del self._kept[key]
        return kept

    def put(self, key: Key, kept: KeptT) -> bool:
        """Keep one that is quiet; False where there are enough."""
        entries = self._kept.setdefault(key, [])
        if len(entries) >= MAX_KEPT or self._count >= MAX_KEPT_IN_ALL:
            return False
        entries.append((trio.current_time(), kept))
        self._count += 1
        return True

    def expired(self, now: float = math.inf) -> list[KeptT]:
        """Take out those that nobody used for ``KEEP_FOR``; without ``now``, all."""
        out: list[KeptT] = []
        for key, entries in list(self._kept.items()):
            old = sum(since + KEEP_FOR <= now for since, _ in entries)  # the oldest stand first
            out += [kept for _, kept in entries[:old]]
            del entries[:old]
            if not entries:
                del self._kept[key]
        self._count -= len(out)
        return out


class TunnelExchange:
    """A request over a tunnel to a peer.

    Args:
        on_accepted: told once the peer has accepted the request; for a tunnel's first one.
    """

    def __init__(
        self,
        tunnel: TunnelStream,
        key: Key,
        kept: Kept[TunnelStream],
        *,
        on_accepted: Callable[[], None] | None = None,
    ) -> None:
        self._tunnel = tunnel
        self._key = key
        self._kept = kept
        self._over = False
        self._on_accepted = on_accepted
        # A call less for each request but the first.
        self.wait_accepted = tunnel.wait_accepted if on_accepted is None else self._wait_first
        self.receive_some = tunnel.receive_some
        self.send_all = tunnel.send_all
        self.send_eof = tunnel.send_eof

    async def _wait_first(self) -> None:
        await self._tunnel.wait_accepted()
        if self._on_accepted is not None:
            self._on_accepted()
            self._on_accepted = None

    async def finish(self) -> None:
        self._over = True
        tunnel = self._tunnel
        try:
            quiet = await tunnel.done()
        except MeshError:
            return  # it died right after the answer, which is whole
        except BaseException:
            tunnel.reset()
            raise
        if quiet and not self._kept.put(self._key, tunnel):
            await tunnel.aclose()

    async def close(self) -> None:
        # END tells the other side not to keep the connection; the tunnel itself is kept.
        with contextlib.suppress(MeshError), trio.CancelScope(shield=True):
            await self._tunnel.send_eof()
        await self.finish()

    def reset(self) -> None:
        if not self._over:
            self._over = True
            self._tunnel.reset()


class LocalExchange:
    """A request over a connection to a service of this host.

    Args:
        claim: counts it at the service; closed when it is over.
    """

    def __init__(
        self, connection: TcpStream, key: Key, kept: Kept[TcpStream], claim: ExitStack
    ) -> None:
        self._connection = connection
        self._key = key
        self._kept = kept
        self._claim = claim
        self._over = False
        self._ended = False
        self.send_all = connection.send_all

    async def wait_accepted(self) -> None:
        """Return at once: it was admitted before there was an exchange."""

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        data = await self._connection.receive_some(max_bytes)
        self._ended = self._ended or not data
        return data

    async def send_eof(self) -> None:
        self._ended = True
        await self._connection.send_eof()

    async def finish(self) -> None:
        self._over = True
        self._claim.close()
        if (
            self._ended
            or not self._connection.is_quiet()
            or not self._kept.put(self._key, self._connection)
        ):
            self._connection.close()

    async def close(self) -> None:
        self._ended = True
        await self.finish()

    def reset(self) -> None:
        if not self._over:
            self._over = True
            self._claim.close()
            self._connection.reset()


async def sweep_forever(tunnels: Kept[TunnelStream], connections: Kept[TcpStream]) -> None:
    """Close what was kept for too long, until cancelled; then everything."""
    try:
        while True:
            await trio.sleep(_SWEEP_INTERVAL)
            now = trio.current_time()
            for tunnel in tunnels.expired(now):
                await tunnel.aclose()
            for connection in connections.expired(now):
                connection.close()
    finally:
        for tunnel in tunnels.expired():
            tunnel.reset()
        for connection in connections.expired():
            connection.close()
