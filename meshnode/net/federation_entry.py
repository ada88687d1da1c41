"""Clients in: each TCP connection gets the best peer, and another one if that fails in time.

The law here: until the first byte moves, a peer that fails costs the client nothing but time;
after it, a failure resets the client's connection, so that a cut answer never looks whole.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import structlog
import trio

from meshnode.core.lease import Lease
from meshnode.core.router import Router
from meshnode.errors import NoCandidate
from meshnode.metrics import Metrics
from meshnode.net.mesh import ByteStream
from meshnode.net.splice import IDLE_TIMEOUT, SpliceEnd, SpliceOutcome, splice
from meshnode.net.tcp_stream import TcpStream
from meshnode.net.upstream import AttemptError, Upstreams

# Different peers tried for one client: a fourth would seldom fare better, and the client waits.
MAX_ATTEMPTS = 3
# Each takes two descriptors and some 100 KB of buffers at most.
MAX_CLIENTS = 4096

log = structlog.get_logger(__name__)

# Answers a client that nobody can serve, given why, and closes its connection.
Refuse = Callable[[trio.SocketStream, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class EntrySettings:
    """What the operator chose for one entry point."""

    target: str | None = None  # a peer ID or name; nobody else serves then
    max_clients: int = MAX_CLIENTS
    idle_timeout: float = IDLE_TIMEOUT  # seconds


@dataclass(slots=True)
class _Client:
    """One connection from accept to close."""

    socket: trio.SocketStream
    stream: TcpStream
    service_id: str
    accepted_at: float
    tried: dict[str, str]  # peer ID -> why it was given up


class EntryPoint:
    """Carries each accepted connection to the best peer that offers the service.

    Args:
        choose_service: names the service that clients get; raises NoCandidate where it can't.
        refuse: answers and closes a client that nobody can serve.
        wall_time: Unix seconds, kept with each decision for display.
    """

    def __init__(
        self,
        router: Router,
        upstreams: Upstreams,
        *,
        choose_service: Callable[[], str],
        refuse: Refuse,
        metrics: Metrics,
        wall_time: Callable[[], float],
        settings: EntrySettings,
    ) -> None:
        self._router = router
        self._upstreams = upstreams
        self._choose_service = choose_service
        self._refuse = refuse
        self._metrics = metrics
        self._wall_time = wall_time
        self._settings = settings
        self._clients = 0

    @property
    def clients(self) -> int:
        """Connections open now."""
        return self._clients

    async def serve_forever(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Accept clients until cancelled; then reset those that are left."""
        await trio.serve_listeners(self.serve_client, list(listeners))

    async def serve_client(self, socket: trio.SocketStream) -> None:
        """Serve one connection to its end; never raises for what client or peers do."""
        stream = TcpStream(socket)
        if self._clients >= self._settings.max_clients:
            stream.reset()
            self._count("too_many_clients")
            return
        self._clients += 1
        try:
            self._count(await self._serve(socket, stream))
        except Exception as exc:  # the guard of every client: the node must live
            self._count("failed")
            log.exception("client_failed", error=repr(exc))
        finally:
            self._clients -= 1
            stream.reset()  # closed already on every way out but an error's or a cancellation's

    async def _serve(self, socket: trio.SocketStream, stream: TcpStream) -> str:
        """Try peers until one serves; return the outcome for the metric."""
        try:
            client = _Client(socket, stream, self._choose_service(), trio.current_time(), {})
            for _ in range(MAX_ATTEMPTS):
                outcome = await self._attempt(client)
                if outcome is not None:
                    return outcome
            reasons = ", ".join(client.tried.values())
            raise NoCandidate(
                f"{len(client.tried)} peers offer {client.service_id!r}, "
                f"but none served this request: {reasons}"
            )
        except NoCandidate as exc:
            log.info("client_refused", error=str(exc))
            await self._refuse(socket, str(exc))
            return "unserved"

    async def _attempt(self, client: _Client) -> str | None:
        """Let the best untried peer serve; return the outcome, or None if it did not.

        Raises:
            NoCandidate: no untried peer can serve.
        """
        picked_at = trio.current_time()
        with ExitStack() as holding:
            lease = holding.enter_context(
                self._router.lease(
                    now=picked_at,
                    wall_time=self._wall_time(),
                    service_id=client.service_id,
                    target=self._settings.target,
                    exclude=tuple(client.tried),
                    attempt=len(client.tried) + 1,
                )
            )
            self._metrics.routing_decisions.labels(tier=lease.decision.tier).inc()
            retries = len(client.tried)
            try:
                upstream = await self._upstreams.open(lease, holding)
            except AttemptError as exc:
                lease.failed(exc.reason, now=trio.current_time())
                self._give_up(client, lease, exc)
                outcome = None
            else:
                opened_in = trio.current_time() - picked_at
                outcome = (await self._carry(client, upstream, lease, opened_in)).outcome.value
            lease.settle(
                outcome or client.tried[lease.peer_id],
                duration=trio.current_time() - picked_at,
                retries=retries,
            )
        return outcome

    def _give_up(self, client: _Client, lease: Lease, failure: AttemptError) -> None:
        client.tried[lease.peer_id] = failure.reason
        self._metrics.retries.labels(reason=failure.reason).inc()
        log.info(
            "peer_given_up",
            peer_id=lease.peer_id,
            service=client.service_id,
            attempt=len(client.tried),
            reason=failure.reason,
            error=str(failure),
        )

    async def _carry(
        self, client: _Client, upstream: ByteStream, lease: Lease, opened_in: float
    ) -> SpliceEnd:
        opened_at = trio.current_time()
        self._metrics.tunnel_open_seconds.observe(opened_at - client.accepted_at)
        # Accepting a tunnel is no service yet: what counts is that an answer begins.
        counts = _ByteCounts(
            self._metrics,
            client.accepted_at,
            on_first_byte=lambda: lease.succeeded(opened_in, now=trio.current_time()),
        )
        end = await splice(
            client.stream,
            upstream,
            count_to_upstream=counts.to_service,
            count_to_client=counts.to_client,
            idle_timeout=self._settings.idle_timeout,
        )
        if end.outcome is SpliceOutcome.UPSTREAM_CUT:
            lease.failed("cut", now=trio.current_time())
        log.debug(
            "tunnel_ended",
            role="entry",
            peer_id=lease.peer_id,
            service=client.service_id,
            outcome=end.outcome.value,
            error=end.error,
            duration_s=round(trio.current_time() - opened_at, 3),
            bytes_in=counts.bytes_to_client,
            bytes_out=counts.bytes_to_service,
        )
        return end

    def _count(self, outcome: str) -> None:
        self._metrics.tunnels.labels(role="entry", outcome=outcome).inc()


class _ByteCounts:
    """Counts what one tunnel carries, and times the first byte of the answer."""

    def __init__(
        self, metrics: Metrics, accepted_at: float, on_first_byte: Callable[[], None]
    ) -> None:
        self._on_first_byte = on_first_byte
        self.bytes_to_service = 0
        self.bytes_to_client = 0
        self._accepted_at = accepted_at
        self._ttft = metrics.request_ttft_seconds
        self._total_to_service = metrics.tunnel_bytes.labels(direction="to_service")
        self._total_to_client = metrics.tunnel_bytes.labels(direction="to_client")

    def to_service(self, size: int) -> None:
        self.bytes_to_service += size
        self._total_to_service.inc(size)

    def to_client(self, size: int) -> None:
        if self.bytes_to_client == 0:
            self._ttft.observe(trio.current_time() - self._accepted_at)
            self._on_first_byte()
        self.bytes_to_client += size
        self._total_to_client.inc(size)


def choose_service(named: str | None, offered: Sequence[str]) -> str:
    """Return the service that clients get: the named one, or else the only one on offer.

    Raises:
        NoCandidate: none was named, and not exactly one is on offer.
    """
    if named is not None:
        return named
    if len(offered) == 1:
        return offered[0]
    if not offered:
        raise NoCandidate(
            "no peer offers a service yet; start a node with --expose NAME=HOST:PORT, or wait"
        )
    names = ", ".join(sorted(offered)[:8])
    raise NoCandidate(f"several services are on offer ({names}); name one with --service")
