"""One attempt: from a lease to bytes that reach the service, at a peer or at this host.

``open`` gives a stream of its own to a client's whole connection; ``begin`` begins one request,
over a tunnel or a connection that an earlier one used where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Protocol

import trio

from meshnode.core.lease import Lease
from meshnode.core.router import Router
from meshnode.core.tunnel import PROTOCOL_ID, TunnelReply
from meshnode.errors import (
    LinkLost,
    MeshError,
    MeshnodeError,
    PeerRefused,
    PeerUnreachable,
    StreamReset,
)
from meshnode.metrics import Metrics
from meshnode.net.exchange import Exchange, Kept, Key, LocalExchange, TunnelExchange, sweep_forever
from meshnode.net.local_services import LocalServices
from meshnode.net.mesh import ByteStream, Mesh
from meshnode.net.tcp_stream import TcpStream
from meshnode.net.tunnel_stream import TunnelBroken, TunnelRefused, TunnelStream

# For one peer, from the dial (if there is no link) to its reply.
OPEN_TIMEOUT = 3.0  # seconds


# What can go wrong with a peer while it is asked.
PEER_FAILURES = (PeerUnreachable, PeerRefused, StreamReset, trio.TooSlowError)


class AttemptError(MeshnodeError):
    """This peer does not serve this client; ``reason`` is fit for a metric label.

    ``is_untouched`` tells whether it is certain that no byte of it reached a backend.
    """

    def __init__(self, reason: str, error: str, *, is_untouched: bool = True) -> None:
        super().__init__(error)
        self.reason = reason
        self.is_untouched = is_untouched


class Neighbours(Protocol):
    """What is asked of peering."""

    async def connect(self, peer_id: str, *, timeout: float) -> None:
        """Make a link to a peer unless there is one; raises MeshError."""

    def report_unreachable(self, peer_id: str, error: str) -> None:
        """Take a peer out of the candidates: a stream to it could not be opened."""


class Upstreams:
    """Opens tunnels to peers, and connections to this host's own services."""

    def __init__(
        self,
        mesh: Mesh,
        router: Router,
        neighbours: Neighbours,
        services: LocalServices,
        *,
        metrics: Metrics,
    ) -> None:
        self._mesh = mesh
        self._router = router
        self._neighbours = neighbours
        self._services = services
        self._metrics = metrics
        self._tunnels: Kept[TunnelStream] = Kept()
        self._connections: Kept[TcpStream] = Kept()

    async def sweep_forever(self) -> None:
        """Close the tunnels and connections that were kept for nothing, until cancelled."""
        await sweep_forever(self._tunnels, self._connections)

    async def open(self, lease: Lease, holding: ExitStack) -> ByteStream:
        """Return a stream to the leased service; what it holds is let go with ``holding``.

        Raises:
            AttemptError: the peer is gone, silent, or does not serve now.
        """
        if lease.is_local:
            return await self._connect_here(lease, holding)
        with self.failures(lease), trio.fail_after(OPEN_TIMEOUT):
            tunnel = await self._open_tunnel(lease, wait=True)
            try:
                await tunnel.ask(lease.service_id)
                await tunnel.wait_accepted()
            except TunnelRefused:
                await tunnel.aclose()
                raise
            except BaseException:
                tunnel.reset()
                raise
            return tunnel

    async def begin(self, lease: Lease, first: bytes, *, fresh: bool) -> Exchange:
        """Begin a request at the leased service with its first bytes.

        A peer's answer, a refusal too, comes with the exchange's first read: put ``failures``
        around that.

        Args:
            fresh: not over a connection to the backend that another request used before; for a
                request that must not be sent twice.

        Raises:
            AttemptError: the peer or the service can't be reached, or the service is full.
        """
        key = (lease.peer_id, lease.service_id)
        if lease.is_local:
            return await self._begin_here(lease, key, first, fresh=fresh)
        while (tunnel := self._tunnels.take(key)) is not None:
            # One whose connection died meanwhile says so at once, and nothing has left.
            with suppress(MeshError):
                await self._ask(tunnel, lease, first, fresh=fresh)
                return TunnelExchange(tunnel, key, self._tunnels)
        began_at = trio.current_time()
        with self.failures(lease), trio.fail_after(OPEN_TIMEOUT):
            # One that must not be sent twice waits for the peer to answer before anything leaves.
            tunnel = await self._open_tunnel(lease, wait=fresh)
            await self._ask(tunnel, lease, first, fresh=fresh)
        opened = partial(self._note_opened, began_at)
        return TunnelExchange(tunnel, key, self._tunnels, on_accepted=opened)

    @contextmanager
    def failures(self, lease: Lease, *, is_untouched: bool = True) -> Iterator[None]:
        """Turn what goes wrong with the leased peer inside the block into an AttemptError.

        Args:
            is_untouched: whether nothing of the request can have reached a backend so far.
        """
        try:
            yield
        except PEER_FAILURES as exc:
            raise self.failure(lease, exc, is_untouched=is_untouched) from exc

    def failure(self, lease: Lease, exc: Exception, *, is_untouched: bool) -> AttemptError:
        """Return what one of ``PEER_FAILURES`` means; arguments as of ``failures``."""
        match exc:
            case TunnelRefused():
                return AttemptError(exc.status, str(exc))
            case trio.TooSlowError():
                error = f"no reply within {OPEN_TIMEOUT:g} s"
                self._neighbours.report_unreachable(lease.peer_id, error)
                return AttemptError("timeout", error, is_untouched=is_untouched)
            case PeerUnreachable():
                self._neighbours.report_unreachable(lease.peer_id, str(exc))
                return AttemptError("unreachable", str(exc))
            case PeerRefused():
                return AttemptError("refused", str(exc))
            case TunnelBroken():
                self._metrics.protocol_faults.labels(protocol="tunnel", code=exc.code).inc()
                return AttemptError("protocol_error", str(exc), is_untouched=is_untouched)
            case LinkLost():
                return AttemptError("lost", str(exc), is_untouched=is_untouched)
            case _:
                return AttemptError("reset", str(exc), is_untouched=is_untouched)

    # At a peer

    async def _open_tunnel(self, lease: Lease, *, wait: bool) -> TunnelStream:
        peer_id = lease.peer_id
        await self._neighbours.connect(peer_id, timeout=OPEN_TIMEOUT)
        if wait:
            stream = await self._mesh.open_stream(peer_id, PROTOCOL_ID, timeout=OPEN_TIMEOUT)
        else:
            stream = await self._mesh.begin_stream(peer_id, PROTOCOL_ID)
        return TunnelStream(stream, partial(self._take_numbers, peer_id, lease.service_id))

    async def _ask(self, tunnel: TunnelStream, lease: Lease, first: bytes, *, fresh: bool) -> None:
        try:
            await tunnel.ask(lease.service_id, first, fresh=fresh)
        except BaseException:
            tunnel.reset()
            raise

    def _note_opened(self, began_at: float) -> None:
        self._metrics.tunnel_open_seconds.observe(trio.current_time() - began_at)

    def _take_numbers(self, peer_id: str, service_id: str, reply: TunnelReply) -> None:
        self._router.report(
            peer_id,
            service_id,
            others_in_flight=reply.in_flight,
            available_vram=reply.available_vram,
            now=trio.current_time(),
        )

    # At this host

    async def _connect_here(self, lease: Lease, holding: ExitStack) -> TcpStream:
        self._claim_here(lease, holding)
        try:
            return await self._services.connect(lease.service_id)
        except PeerUnreachable as exc:
            raise AttemptError("backend_unreachable", str(exc)) from exc

    async def _begin_here(self, lease: Lease, key: Key, first: bytes, *, fresh: bool) -> Exchange:
        with ExitStack() as holding:
            self._claim_here(lease, holding)
            connection = None if fresh else self._kept_here(key)
            if connection is None:
                try:
                    connection = await self._services.connect(lease.service_id)
                except PeerUnreachable as exc:
                    raise AttemptError("backend_unreachable", str(exc)) from exc
            exchange = LocalExchange(connection, key, self._connections, holding.pop_all())
        try:
            await exchange.send_all(first)
        except StreamReset as exc:
            exchange.reset()
            raise AttemptError("reset", str(exc), is_untouched=False) from exc
        except BaseException:
            exchange.reset()
            raise
        return exchange

    def _claim_here(self, lease: Lease, holding: ExitStack) -> None:
        status = self._services.admit(lease.service_id)
        if status != "ok":
            raise AttemptError(status, f"this node's own service is {status}")
        holding.enter_context(self._services.claim(lease.service_id, lease.peer_id))

    def _kept_here(self, key: Key) -> TcpStream | None:
        while (connection := self._connections.take(key)) is not None:
            if connection.is_quiet():
                return connection
            connection.close()
        return None
