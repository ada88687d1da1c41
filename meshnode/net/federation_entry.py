"""Clients in: each TCP connection gets the best peer, and another one if that fails in time.

The law here: until a byte was sent to a peer, one that fails costs the client nothing but time.
Until a byte of the answer moves, that holds too for what may be repeated (HTTP, by default) and is
not longer than what is kept of it. After that a failure resets the client's connection, so that a
cut answer never looks whole.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import structlog
import trio

from meshnode.core.lease import Lease
from meshnode.core.router import Router
from meshnode.core.tries import Tries
from meshnode.errors import AllFull, NoCandidate, Overloaded
from meshnode.metrics import Metrics
from meshnode.net.accept import AcceptLimits, Acceptor
from meshnode.net.held_client import HeldClient
from meshnode.net.lease_queue import LeaseQueue
from meshnode.net.mesh import ByteStream
from meshnode.net.splice import IDLE_TIMEOUT, SpliceEnd, SpliceOutcome, splice
from meshnode.net.tcp_stream import TcpStream
from meshnode.net.upstream import AttemptError, Upstreams
from meshnode.tracing import NO_TRACER, Span, Tracer

log = structlog.get_logger(__name__)

# Most answers begin sooner; a peer that has served nobody yet is not waited for any longer while
# there is another.
FIRST_BYTE_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Refusal:
    """What to tell a client that nobody can serve."""

    reason: str  # for people
    retry_after: int | None = None  # seconds after which asking again may help; None: who knows
    already_read: bytes = b""  # what the client sent so far


# Answers a client that nobody can serve, and closes its connection.
Refuse = Callable[[trio.SocketStream, Refusal], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class EntrySettings:
    """What the operator chose for one entry point."""

    target: str | None = None  # a peer ID or name; nobody else serves then
    limits: AcceptLimits = field(default_factory=AcceptLimits)
    idle_timeout: float = IDLE_TIMEOUT  # seconds
    first_byte_timeout: float = FIRST_BYTE_TIMEOUT  # seconds; for peers that served nobody yet
    # Whether a second peer may get these first bytes after a first one had them; an unknown
    # protocol's request may do something that must not be done twice.
    may_repeat: Callable[[bytes], bool] = lambda _: False


@dataclass(slots=True)
class _Client:
    """One connection from accept to close."""

    socket: trio.SocketStream
    held: HeldClient
    service_id: str
    accepted_at: float
    span: Span
    tries: Tries = field(default_factory=Tries)


class _ClientGoneError(Exception):
    """The client went away while it waited for a peer."""


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
        queue: LeaseQueue,
        *,
        choose_service: Callable[[], str],
        refuse: Refuse,
        metrics: Metrics,
        wall_time: Callable[[], float],
        settings: EntrySettings,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._router = router
        self._upstreams = upstreams
        self._queue = queue
        self._choose_service = choose_service
        self._refuse = refuse
        self._metrics = metrics
        self._wall_time = wall_time
        self._settings = settings
        self._acceptor = Acceptor(settings.limits, metrics=metrics)
        self._tracer = tracer

    def close(self) -> None:
        """Accept nobody any more; who is connected is served to the end."""
        self._acceptor.close()

    async def serve_forever(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Accept clients until cancelled; then reset those that are left."""
        await self._acceptor.serve_forever(self.serve_client, listeners)

    async def serve_client(self, socket: trio.SocketStream) -> None:
        """Serve one connection to its end; never raises for what client or peers do."""
        stream = TcpStream(socket)
        span = self._tracer.begin("connection")
        try:
            outcome = await self._serve(socket, stream, span)
            self._count(outcome)
            span.end(outcome, failed=outcome not in ("complete", "client_gone"))
        except Exception as exc:  # the guard of every client: the node must live
            self._count("failed")
            span.end("failed", failed=True)
            log.exception("client_failed", error=repr(exc))
        finally:
            span.end("stopped")
            stream.reset()  # closed already on every way out but an error's or a cancellation's

    async def _serve(self, socket: trio.SocketStream, stream: TcpStream, span: Span) -> str:
        """Try peers until one serves; return the outcome for the metric."""
        held = HeldClient(stream, may_repeat=self._settings.may_repeat)
        try:
            service_id = self._choose_service()
            client = _Client(socket, held, service_id, trio.current_time(), span)
            while client.tries.may_go_on():
                outcome = await self._attempt(client)
                if outcome is not None:
                    return outcome
            raise NoCandidate(
                f"{len(client.tries.passed_over)} peers offer {client.service_id!r}, "
                f"but none served this request: {client.tries}"
            )
        except _ClientGoneError:
            return "client_gone"
        except NoCandidate as exc:
            log.info("client_refused", error=str(exc))
            retry_after = exc.retry_after if isinstance(exc, Overloaded) else None
            await self._refuse(socket, Refusal(str(exc), retry_after, held.kept))
            return "unserved"

    async def _attempt(self, client: _Client) -> str | None:
        """Let the best untried peer serve; return the outcome, or None if it did not.

        Raises:
            NoCandidate: no untried peer can serve.
        """
        with ExitStack() as holding:
            lease = holding.enter_context(await self._lease(client))
            picked_at, retries = trio.current_time(), client.tries.count
            self._metrics.routing_decisions.labels(tier=lease.decision.tier).inc()
            if client.span.is_recording:
                client.span.say(lease.decision.attributes() | {"meshnode.retries": retries})
            try:
                upstream = await self._upstreams.open(lease, holding)
                opened_in = trio.current_time() - picked_at
                word = outcome = await self._carry(client, upstream, lease, opened_in)
            except AttemptError as exc:
                lease.failed(exc.reason, now=trio.current_time())
                self._give_up(client, lease, exc)
                word, outcome = exc.reason, None
            lease.settle(word, duration=trio.current_time() - picked_at, retries=retries)
        return outcome

    def _give_up(self, client: _Client, lease: Lease, failure: AttemptError) -> None:
        client.tries = client.tries.after(lease.peer_id, failure.reason, trio.current_time())
        self._metrics.retries.labels(reason=failure.reason).inc()
        log.info(
            "peer_given_up",
            peer_id=lease.peer_id,
            service=client.service_id,
            attempt=client.tries.count,
            reason=failure.reason,
            error=str(failure),
        )

    # A lease, at once or after waiting

    async def _lease(self, client: _Client) -> Lease:
        """Return a lease for the client, waiting while all who could serve it are full.

        Raises:
            NoCandidate: nobody can serve it, or none had room in time.
        """
        tries = client.tries

        def try_lease() -> Lease:
            return self._router.lease(
                now=trio.current_time(),
                wall_time=self._wall_time(),
                service_id=client.service_id,
                target=self._settings.target,
                exclude=tuple(tries.passed_over),
                attempt=tries.count + 1,
                is_retry=bool(tries.passed_over),
            )

        key = (client.service_id, self._settings.target, frozenset(tries.passed_over))
        try:
            if tries.waiting_since is None:
                return self._queue.lease_now(try_lease, key=key)
        except AllFull:
            client.tries = tries.waiting(trio.current_time())
        return await self._wait(client, try_lease, key)

    async def _wait(self, client: _Client, try_lease: Callable[[], Lease], key: Hashable) -> Lease:
        lease: Lease | None = None
        refusal: NoCandidate | None = None
        is_gone = trio.Event()

        async def watch() -> None:
            await client.held.wait_gone()
            is_gone.set()
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                try:
                    lease = await self._queue.lease(
                        try_lease, key=key, since=client.tries.waiting_since
                    )
                except NoCandidate as exc:
                    refusal = exc
                nursery.cancel_scope.cancel()
            if is_gone.is_set():
                raise _ClientGoneError
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        if lease is None:
            assert refusal is not None
            raise refusal
        return lease

    # The bytes

    async def _carry(
        self, client: _Client, upstream: ByteStream, lease: Lease, opened_in: float
    ) -> str:
        """Carry the client's connection to its end; return the outcome.

        Raises:
            AttemptError: the peer failed, and another one may be asked instead.
        """
        opened_at = trio.current_time()
        self._metrics.tunnel_open_seconds.observe(opened_at - client.accepted_at)
        # Accepting a tunnel is no service yet: what counts is that an answer begins.
        counts = _ByteCounts(
            self._metrics,
            client.accepted_at,
            on_first_byte=lambda: lease.succeeded(opened_in, now=trio.current_time()),
        )
        end = await self._splice(client, upstream, lease, counts)
        outcome, error = end.outcome.value, end.error
        failure = None
        if client.held.ended_empty:
            failure = "empty"
        elif end is _STALLED:
            failure = "stalled"
        elif end.outcome is SpliceOutcome.UPSTREAM_CUT:
            failure = "lost" if end.is_lost else "cut"
        log.debug(
            "tunnel_ended",
            role="entry",
            peer_id=lease.peer_id,
            service=client.service_id,
            outcome=failure or outcome,
            error=error,
            duration_s=round(trio.current_time() - opened_at, 3),
            bytes_in=counts.bytes_to_client,
            bytes_out=counts.bytes_to_service,
        )
        if failure is None:
            return outcome
        lease.failed(failure, now=trio.current_time())
        if not client.held.can_be_handed_on:
            return outcome
        client.held.rewind()
        raise AttemptError(failure, error or failure, is_untouched=False)

    async def _splice(
        self, client: _Client, upstream: ByteStream, lease: Lease, counts: _ByteCounts
    ) -> SpliceEnd:
        async with trio.open_nursery() as nursery:
            end = _STALLED
            circuit = self._router.circuit(lease.peer_id, lease.service_id)
            if circuit is None or not circuit.successes or lease.is_trial:
                nursery.start_soon(self._watch_first_byte, client, lease, nursery.cancel_scope)
            end = await splice(
                client.held,
                upstream,
                count_to_upstream=counts.to_service,
                count_to_client=counts.to_client,
                idle_timeout=self._settings.idle_timeout,
            )
            nursery.cancel_scope.cancel()
        return end

    async def _watch_first_byte(
        self, client: _Client, lease: Lease, tunnel: trio.CancelScope
    ) -> None:
        """Give up a peer that says nothing and has served nobody yet, if there is another."""
        await client.held.passed_on.wait()
        await trio.sleep(self._settings.first_byte_timeout)
        if not (client.held.can_be_handed_on and client.tries.may_go_on(failing=1)):
            return
        try:
            self._router.explain(
                now=trio.current_time(),
                service_id=client.service_id,
                target=self._settings.target,
                exclude=(*client.tries.passed_over, lease.peer_id),
            )
        except NoCandidate:
            return  # it may only be slow, and a slow answer is better than none
        tunnel.cancel()

    def _count(self, outcome: str) -> None:
        self._metrics.tunnels.labels(role="entry", outcome=outcome).inc()


# A peer that was given up before it said anything.
_STALLED = SpliceEnd(SpliceOutcome.UPSTREAM_CUT, "nothing was answered, and others could")


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
