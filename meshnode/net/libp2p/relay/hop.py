"""The relay's side: who may be reached through this node, and the bytes carried for them.

The law here: a relay decides about reservations and circuits in one synchronous step, sees
ciphertext only, and passes on each end of file and each cut as what it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import structlog
import trio

from meshnode.core.rate import RateLimit
from meshnode.errors import MeshError, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.delimited import encode_message, read_message
from meshnode.net.libp2p.links import Links
from meshnode.net.libp2p.relay import addrs as circuit_addrs
from meshnode.net.libp2p.relay.limits import RelayLimits
from meshnode.net.libp2p.relay.messages import (
    CONNECTION_FAILED,
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    STOP,
    UNEXPECTED_MESSAGE,
    HopMessage,
    Limit,
    PeerId,
    Reservation,
    StopMessage,
    peer_id_of,
    status_name,
)
from meshnode.net.libp2p.stream import Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn, open_negotiated
from meshnode.net.mesh import ByteStream
from meshnode.net.splice import splice

# Rates are kept for members with a link, and for as many again that come and go.
_MAX_RATED = 8192

log = structlog.get_logger(__name__)


class _Refusal(Exception):
    """A request that is answered with a status other than OK."""

    def __init__(self, status: int) -> None:
        super().__init__(status_name(status))
        self.status = status


class Hop:
    """Reservations and circuits of one relay.

    Args:
        links: the members connected now; a reservation stands no longer than the peer's link.
        own_addrs: this node's multiaddrs, each ending in ``/p2p/<own peer ID>``.
        wall_time: Unix seconds, in which the protocol says when a reservation expires.
    """

    def __init__(
        self,
        links: Links,
        *,
        own_addrs: Callable[[], tuple[str, ...]],
        wall_time: Callable[[], float],
        limits: RelayLimits,
        metrics: Metrics,
    ) -> None:
        self._links = links
        self._own_addrs = own_addrs
        self._wall_time = wall_time
        self._limits = limits
        self._metrics = metrics
        self._reserved: dict[str, float] = {}  # peer ID -> trio.current_time() of the end
        self._circuits: Counter[str] = Counter()  # per peer, at whichever end
        self._circuit_count = 0
        self._rates = RateLimit(
            per_s=limits.requests_per_s, burst=limits.requests_burst, max_keys=_MAX_RATED
        )

    async def answer(self, conn: MeshConn, stream: Libp2pStream) -> None:
        """Serve one hop stream of a member, to the end of its circuit if it asks for one."""
        try:
            request = await self._read_request(stream)
            if conn.via is not None:
                # Chains of relays would cost each of them, and nobody could tell how long they are.
                raise _Refusal(PERMISSION_DENIED)
            if request.type == HopMessage.RESERVE and request.HasField("type"):
                await stream.send_all(encode_message(self._reserve(conn.peer_id)))
                log.info("relay_reserved", peer_id=conn.peer_id)
            elif request.type == HopMessage.CONNECT:
                await self._connect(conn, stream, request)
            else:
                raise _Refusal(UNEXPECTED_MESSAGE)
        except _Refusal as refusal:
            name = status_name(refusal.status)
            self._metrics.relay_refusals.labels(status=name).inc()
            log.debug("relay_refused", peer_id=conn.peer_id, error=name)
            answer = HopMessage(type=HopMessage.STATUS, status=refusal.status)  # type: ignore[arg-type]
            await stream.send_all(encode_message(answer))

    def forget(self, peer_id: str) -> None:
        """Drop the reservation of a peer whose last connection ended."""
        self._reserved.pop(peer_id, None)
        self._show()

    async def _read_request(self, stream: ByteStream) -> HopMessage:
        with trio.move_on_after(self._limits.message_timeout):
            try:
                return await read_message(stream, HopMessage)
            except WireError as exc:
                self._metrics.protocol_faults.labels(protocol="relay_hop", code=exc.code).inc()
                raise _Refusal(MALFORMED_MESSAGE) from exc
        raise StreamReset("no request came")

    # Reservations

    def _reserve(self, peer_id: str) -> HopMessage:
        now = trio.current_time()
        self._expire(now)
        limits = self._limits
        is_full = len(self._reserved) >= limits.max_reservations and peer_id not in self._reserved
        if is_full or not self._rates.allows(peer_id, now):
            raise _Refusal(RESERVATION_REFUSED)
        self._reserved[peer_id] = now + limits.reservation_ttl
        self._show()
        return HopMessage(
            type=HopMessage.STATUS,
            status=OK,
            reservation=Reservation(
                expire=math.floor(self._wall_time() + limits.reservation_ttl),
                addrs=circuit_addrs.to_bytes(self._own_addrs()),
            ),
            limit=self._limit(),
        )

    def _expire(self, now: float) -> None:
        for peer_id in [peer for peer, until in self._reserved.items() if now >= until]:
            del self._reserved[peer_id]

    def _limit(self) -> Limit | None:
        """Return what is said of circuits: nothing at all where there is no limit."""
        limits = self._limits
        if limits.circuit_duration is None and limits.circuit_bytes is None:
            return None
        # In either field 0 means no limit.
        seconds = math.ceil(limits.circuit_duration or 0)
        return Limit(duration=seconds, data=limits.circuit_bytes or 0)

    # Circuits

    async def _connect(self, conn: MeshConn, stream: Libp2pStream, request: HopMessage) -> None:
        source = conn.peer_id
        target = self._admit(source, request)
        self._count(source, target, 1)
        try:
            onward = await self._open_onward(source, target)
            try:
                answer = HopMessage(type=HopMessage.STATUS, status=OK, limit=self._limit())
                await stream.send_all(encode_message(answer))
            except BaseException:
                onward.reset()
                raise
            log.debug("relay_circuit", peer_id=source, target=target)
            await self._carry(stream, onward)
        finally:
            self._count(source, target, -1)

    def _admit(self, source: str, request: HopMessage) -> str:
        """Return the peer ID to connect to, if this may be done now."""
        try:
            target = peer_id_of(request.peer)
        except WireError as exc:
            raise _Refusal(MALFORMED_MESSAGE) from exc
        now = trio.current_time()
        if not self._rates.allows(source, now):
            raise _Refusal(RESOURCE_LIMIT_EXCEEDED)
        if target == source or self._reserved.get(target, -math.inf) <= now:
            raise _Refusal(NO_RESERVATION)
        if self._circuit_count >= self._limits.max_circuits or any(
            self._circuits[peer] >= self._limits.max_circuits_per_peer for peer in (source, target)
        ):
            raise _Refusal(RESOURCE_LIMIT_EXCEEDED)
        return target

    async def _open_onward(self, source: str, target: str) -> Libp2pStream:
        """Return a stream to the target, which has agreed to the circuit."""
        link = self._links.get(target)
        if link is None or link.via is not None:
            raise _Refusal(NO_RESERVATION)
        stream: Libp2pStream | None = None
        try:
            with trio.fail_after(self._limits.stop_timeout):
                muxed, _ = await open_negotiated(link, (STOP,))
                stream = Libp2pStream(muxed, target, STOP)
                request = StopMessage(
                    type=StopMessage.CONNECT,
                    peer=PeerId(id=circuit_addrs.id_bytes(source)),
                    limit=self._limit(),
                )
                await stream.send_all(encode_message(request))
                answer = await read_message(stream, StopMessage)
                if answer.type != StopMessage.STATUS or answer.status != OK:
                    raise _Refusal(CONNECTION_FAILED)
        except BaseException as exc:
            if stream is not None:
                stream.reset()
            if isinstance(exc, MeshError | WireError | trio.TooSlowError):
                raise _Refusal(CONNECTION_FAILED) from exc
            raise
        return stream

    async def _carry(self, stream: Libp2pStream, onward: Libp2pStream) -> None:
        limits = self._limits
        deadline = math.inf
        if limits.circuit_duration is not None:
            deadline = trio.current_time() + limits.circuit_duration
        # The splice resets both streams when it is cancelled.
        with trio.CancelScope(deadline=deadline) as scope:
            await splice(
                stream,
                onward,
                count_to_upstream=_Meter(limits.circuit_bytes, scope, self._metrics).count,
                count_to_client=_Meter(limits.circuit_bytes, scope, self._metrics).count,
                idle_timeout=limits.circuit_idle,
            )

    def _count(self, source: str, target: str, change: int) -> None:
        self._circuit_count += change
        for peer in (source, target):
            self._circuits[peer] += change
            if not self._circuits[peer]:
                del self._circuits[peer]
        self._show()

    def _show(self) -> None:
        self._metrics.relay_reservations.set(len(self._reserved))
        self._metrics.relay_circuits.set(self._circuit_count)


class _Meter:
    """Counts one direction of a circuit, and ends the circuit at its limit."""

    def __init__(self, limit: int | None, scope: trio.CancelScope, metrics: Metrics) -> None:
        self._left = math.inf if limit is None else limit
        self._scope = scope
        self._bytes = metrics.relay_bytes

    def count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            self._scope.cancel()
        self._bytes.inc(size)
