"""Streams that peers open: choose the protocol, ask the gate, run the handler, survive it.

Nothing that a peer sends or a handler raises gets past ``serve``: at worst the stream is reset
and a fault counted. In the library either ends the host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio
from libp2p.custom_types import TProtocol
from libp2p.identity.identify.identify import ID as IDENTIFY

from meshnode.errors import MeshError, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.membership import PROTOCOL_ID as MEMBERSHIP
from meshnode.net.libp2p.muxer import YamuxStream
from meshnode.net.libp2p.negotiate import Responder
from meshnode.net.libp2p.remedies import ForeignError, foreign_faults
from meshnode.net.libp2p.stream import Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn, MeshHost, open_negotiated
from meshnode.net.mesh import ByteStream, MeshStream, StreamHandler

IDENTIFY_PUSH = "/ipfs/id/push/1.0.0"
PING_PROTOCOL_ID = "/ipfs/ping/1.0.0"
_PING_BYTES = 32  # libp2p's ping specification

log = structlog.get_logger(__name__)

# Handlers of this room, which may look at the connection that a stream came over.
ConnHandler = Callable[[MeshConn, Libp2pStream], Awaitable[None]]


class Serving:
    """The protocols that this node answers, and the way of a stream to one of them."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._handlers: dict[str, StreamHandler] = {PING_PROTOCOL_ID: answer_pings}
        self._host: MeshHost | None = None
        self._conn_handlers: dict[str, ConnHandler] = {}

    def add(self, protocol_id: str, handler: StreamHandler) -> None:
        self._handlers[protocol_id] = handler

    def add_for_conns(self, protocol_id: str, handler: ConnHandler) -> None:
        self._conn_handlers[protocol_id] = handler

    def use(self, host: MeshHost, answer_membership: ConnHandler) -> None:
        """Also serve the protocols of ``host``, and membership before anything else."""
        self._host = host
        self._conn_handlers[MEMBERSHIP] = answer_membership

    async def serve(self, conn: MeshConn, muxed: YamuxStream) -> None:
        """Serve one inbound stream to its end; raises nothing."""
        protocol_id = None
        try:
            with trio.move_on_after(self._limits.negotiate_timeout) as scope:
                protocol_id = await self._choose(conn, muxed)
            if scope.cancelled_caught:
                self._count("multistream", "timeout")
            if protocol_id is not None:
                await self._run(conn, muxed, protocol_id)
        except WireError as exc:
            self._count("multistream", exc.code)
            muxed.abort()
        except MeshError:
            muxed.abort()  # the peer went away
        except BaseException:
            muxed.abort()
            raise
        else:
            if protocol_id is None:
                muxed.abort()

    async def _choose(self, conn: MeshConn, muxed: YamuxStream) -> str | None:
        """Agree on a protocol; None if this connection may not have the one it asks for."""
        responder = Responder(muxed)
        while True:
            wanted = await responder.next_proposal()
            if wanted == MEMBERSHIP:
                # One at a time. Only the side that dialled speaks first, until both are members:
                # then either may ask for a proof by another key.
                served = not conn.is_proving and (conn.is_member or not conn.dialled)
                conn.is_proving = conn.is_proving or served
            elif wanted == IDENTIFY and not conn.is_member:
                # Declined, not kept waiting: go-libp2p asks for it on every new connection, and
                # opens no other stream, membership's included, before it has its answer.
                served = False
                conn.was_denied_identify = True
            else:
                if not await self._is_member(conn):
                    return None
                served = (
                    wanted in self._handlers
                    or wanted in self._conn_handlers
                    or self._foreign(wanted) is not None
                )
            if served:
                await responder.accept(wanted)
                return wanted
            await responder.decline()

    async def _is_member(self, conn: MeshConn) -> bool:
        """Wait until membership is settled: the other side may know of it before this one does."""
        if conn.is_member:
            return True
        if conn.waiting_streams >= self._limits.max_waiting_streams:
            return False
        conn.waiting_streams += 1
        try:
            await conn.settled.wait()
        finally:
            conn.waiting_streams -= 1
        return conn.is_member

    async def _run(self, conn: MeshConn, muxed: YamuxStream, protocol_id: str) -> None:
        stream = Libp2pStream(muxed, conn.peer_id, protocol_id)
        try:
            with foreign_faults(self._metrics, protocol_id, passing=(MeshError,)):
                if (conn_handler := self._conn_handlers.get(protocol_id)) is not None:
                    await conn_handler(conn, stream)
                elif (handler := self._handlers.get(protocol_id)) is not None:
                    await handler(stream)
                else:
                    await self._run_foreign(conn, muxed, protocol_id)
        except ForeignError as exc:
            muxed.abort()
            log.warning(
                "stream_handler_failed",
                protocol_id=protocol_id,
                peer_id=conn.peer_id,
                error=str(exc),
            )
        else:
            await muxed.aclose()

    async def push_identify(self, conn: MeshConn) -> None:
        """Tell a new member unasked what it was denied before it was one.

        go's pubsub, and whatever else there waits for identify, begins only then.
        """
        with trio.move_on_after(self._limits.negotiate_timeout):
            try:
                with foreign_faults(self._metrics, "identify_push", passing=(MeshError, WireError)):
                    muxed, _ = await open_negotiated(conn, (IDENTIFY_PUSH,))
                    await self._run_foreign(conn, muxed, IDENTIFY)
            except (MeshError, WireError, ForeignError) as exc:
                log.debug("identify_not_pushed", peer_id=conn.peer_id, error=str(exc))

    async def _run_foreign(self, conn: MeshConn, muxed: YamuxStream, protocol_id: str) -> None:
        handler = self._foreign(protocol_id)
        assert handler is not None
        stream = await conn.wrap(muxed, protocol_id)
        try:
            await handler(stream)
        finally:
            conn.remove_stream(stream)

    def _foreign(self, protocol_id: str) -> Callable[..., Awaitable[None]] | None:
        if self._host is None:
            return None
        return self._host.multiselect.handlers.get(TProtocol(protocol_id))

    def _count(self, protocol: str, code: str) -> None:
        self._metrics.protocol_faults.labels(protocol=protocol, code=code).inc()


async def answer_pings(stream: MeshStream) -> None:
    """Echo 32 bytes at a time until the other side has enough."""
    while payload := await _read_ping(stream):
        await stream.send_all(payload)


async def _read_ping(stream: ByteStream) -> bytes:
    """Return 32 bytes, or none at a clean end between two pings."""
    data = b""
    while len(data) < _PING_BYTES:
        more = await stream.receive_some(_PING_BYTES - len(data))
        if not more:
            if data:
                raise StreamReset("the stream ended inside a ping")
            return b""
        data += more
    return data
