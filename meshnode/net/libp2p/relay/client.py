"""The ends of a circuit: reservations that this node holds, circuits it opens and takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import trio

from meshnode.errors import PeerRefused, PeerUnreachable, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.delimited import encode_message, read_message
from meshnode.net.libp2p.links import Links
from meshnode.net.libp2p.relay import addrs as circuit_addrs
from meshnode.net.libp2p.relay.addrs import CIRCUIT, CircuitAddr
from meshnode.net.libp2p.relay.circuit import CircuitStream
from meshnode.net.libp2p.relay.limits import RelayLimits
from meshnode.net.libp2p.relay.messages import (
    HOP,
    MALFORMED_MESSAGE,
    OK,
    PERMISSION_DENIED,
    RESOURCE_LIMIT_EXCEEDED,
    UNEXPECTED_MESSAGE,
    HopMessage,
    PeerId,
    StopMessage,
    peer_id_of,
    status_name,
)
from meshnode.net.libp2p.stream import Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn, open_negotiated

# A relay with several addresses is reached at one of these, or not at all. Whoever has a link to it
# already needs none of them.
_MAX_ADDRS_PER_RELAY = 3
_MAX_ADDR_CHARS = 256  # as in an announcement
# What a relay says of the time is believed within these bounds, as clocks differ.
_SHORTEST, _LONGEST = 60.0, 3600.0  # seconds

log = structlog.get_logger(__name__)

# Bring an inbound circuit up to membership; None, or a closed one, if it did not get there.
BringIn = Callable[[CircuitStream], Awaitable[MeshConn | None]]
# Have a direct link to the relay of an address.
DialRelay = Callable[[CircuitAddr], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Reservation:
    addrs: tuple[str, ...]
    until: float  # trio.current_time()


class Circuits:
    """What this node does with relays; it need not be one.

    Args:
        links: the members connected now; a reservation ends with the link to its relay.
        bring_in: secures circuits that others open to this node, and has membership proven.
        dial_relay: raises PeerUnreachable or TokenRefused, as ``Mesh.dial``.
        wall_time: Unix seconds, to read when a reservation expires.
    """

    def __init__(
        self,
        links: Links,
        *,
        own_id: str,
        bring_in: BringIn,
        dial_relay: DialRelay,
        wall_time: Callable[[], float],
        limits: RelayLimits,
        metrics: Metrics,
    ) -> None:
        self._links = links
        self._own_id = own_id
        self._bring_in = bring_in
        self._dial_relay = dial_relay
        self._wall_time = wall_time
        self._limits = limits
        self._metrics = metrics
        self._held: dict[str, _Reservation] = {}
        self._pending = 0

    # Reservations

    @property
    def reserved(self) -> tuple[str, ...]:
        """Peer IDs of the relays at which this node has a reservation now."""
        now = trio.current_time()
        return tuple(peer_id for peer_id, held in self._held.items() if now < held.until)

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs under which this node is reached through them, ending in its peer ID."""
        if not self._held:
            return ()
        return tuple(addr for peer_id in self.reserved for addr in self._held[peer_id].addrs)

    async def reserve(self, relay_id: str, *, timeout: float) -> float:
        """Reserve at a relay with a direct link, or renew; return the seconds it stands at least.

        Raises:
            PeerUnreachable: no direct link, or no answer in time.
            PeerRefused: the relay said no.
        """
        request = HopMessage(type=HopMessage.RESERVE)
        with _translated(relay_id, timeout), trio.fail_after(timeout):
            stream = await self._open_hop(relay_id)
            try:
                answer = await self._ask(stream, request)
            finally:
                await stream.aclose()
        now = trio.current_time()
        seconds = answer.reservation.expire - self._wall_time()
        seconds = min(max(seconds, _SHORTEST), _LONGEST)
        link = self._direct_link(relay_id)
        if link is None:
            raise PeerUnreachable(f"the link to the relay {relay_id} ended meanwhile")
        told = circuit_addrs.tcp_addrs(answer.reservation.addrs, relay_id, self._metrics)
        if link.dialled:
            told = tuple(dict.fromkeys((link.addr, *told)))  # this one is known to work
        suffix = f"/p2p/{relay_id}{CIRCUIT}/p2p/{self._own_id}"
        addrs = [addr + suffix for addr in told if len(addr + suffix) <= _MAX_ADDR_CHARS]
        if not addrs:
            raise PeerRefused(f"the relay {relay_id} told no address that others could dial")
        self._held[relay_id] = _Reservation(tuple(addrs[:_MAX_ADDRS_PER_RELAY]), now + seconds)
        return seconds

    def release(self, relay_id: str) -> None:
        """Announce a relay no more; circuits that run through it go on."""
        self._held.pop(relay_id, None)

    def forget(self, relay_id: str) -> None:
        """Drop the reservation at a relay whose last connection ended."""
        self._held.pop(relay_id, None)

    # Circuits that this node opens

    async def open(self, addr: CircuitAddr) -> CircuitStream:
        """Return a circuit to the peer that ``addr`` names, yet to be secured.

        Raises:
            PeerUnreachable, PeerRefused, TokenRefused: no link to the relay, or it said no.
        """
        if addr.relay_id == self._own_id:
            raise PeerUnreachable("the address leads back through this node")
        if self._direct_link(addr.relay_id) is None:
            await self._dial_relay(addr)
        stream = await self._open_hop(addr.relay_id)
        try:
            request = HopMessage(
                type=HopMessage.CONNECT, peer=PeerId(id=circuit_addrs.id_bytes(addr.peer_id))
            )
            await self._ask(stream, request)
        except WireError as exc:
            stream.reset()
            raise PeerUnreachable(f"the relay {addr.relay_id} answered badly: {exc}") from exc
        except BaseException:
            stream.reset()
            raise
        return CircuitStream(stream, via=addr.relay_id, remote_multiaddr=addr.multiaddr)

    async def _open_hop(self, relay_id: str) -> Libp2pStream:
        link = self._direct_link(relay_id)
        if link is None:
            raise PeerUnreachable(f"no direct link to the relay {relay_id}")
        muxed, _ = await open_negotiated(link, (HOP,))
        return Libp2pStream(muxed, relay_id, HOP)

    async def _ask(self, stream: Libp2pStream, request: HopMessage) -> HopMessage:
        await stream.send_all(encode_message(request))
        answer = await read_message(stream, HopMessage)
        if answer.type != HopMessage.STATUS:
            raise WireError("bad_message", "the answer is no status")
        if answer.status != OK:
            raise PeerRefused(f"the relay {stream.peer_id} says {status_name(answer.status)}")
        return answer

    # Circuits that others open to this node

    async def answer_stop(self, conn: MeshConn, stream: Libp2pStream) -> None:
        """Take one circuit that a relay offers, and stay until its connection has ended."""
        request: StopMessage | None = None
        with trio.move_on_after(self._limits.message_timeout):
            try:
                request = await read_message(stream, StopMessage)
                source = peer_id_of(request.peer)
            except WireError as exc:
                self._metrics.protocol_faults.labels(protocol="relay_stop", code=exc.code).inc()
                await _answer(stream, MALFORMED_MESSAGE)
                return
        if request is None:
            raise StreamReset("no request came")
        if (status := self._objection(conn, request)) is not None:
            await _answer(stream, status)
            return
        self._pending += 1
        try:
            await _answer(stream, OK)
            log.debug("circuit_offered", peer_id=source, via=conn.peer_id)
            where = f"{conn.addr}/p2p/{conn.peer_id}{CIRCUIT}"
            circuit = CircuitStream(stream, via=conn.peer_id, remote_multiaddr=where)
            relayed = await self._bring_in(circuit)
        finally:
            self._pending -= 1
        if relayed is not None:
            await relayed.muxed_conn.event_closed.wait()

    def _objection(self, conn: MeshConn, request: StopMessage) -> int | None:
        if request.type != StopMessage.CONNECT or not request.HasField("type"):
            return UNEXPECTED_MESSAGE
        # Whoever else opens a stop is no relay of ours: what it relays nobody asked for.
        if conn.via is not None or conn.peer_id not in self._held:
            return PERMISSION_DENIED
        if self._pending >= self._limits.max_pending_circuits:
            return RESOURCE_LIMIT_EXCEEDED
        return None

    def _direct_link(self, relay_id: str) -> MeshConn | None:
        link = self._links.get(relay_id)
        return link if link is not None and link.via is None else None


@contextmanager
def _translated(relay_id: str, timeout: float) -> Iterator[None]:
    try:
        yield
    except trio.TooSlowError as exc:
        raise PeerUnreachable(f"{relay_id} did not answer within {timeout:g} s") from exc
    except (StreamReset, WireError) as exc:
        raise PeerUnreachable(f"the stream to {relay_id} failed: {exc}") from exc


async def _answer(stream: Libp2pStream, status: int) -> None:
    answer = StopMessage(type=StopMessage.STATUS, status=status)  # type: ignore[arg-type]
    await stream.send_all(encode_message(answer))
