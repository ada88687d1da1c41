"""/yamux/1.0.0 under trio, behind libp2p's own interfaces.

All rules are in ``yamux.py``. Here are the tasks: one that reads, and one that writes, so that
nothing is ever cancelled between encrypting a message (the nonce has moved) and having sent it.
Whoever reads, writes or opens a stream only touches the state machine, in steps without an await
between them, and waits outside of it; cancelling one harms nobody.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping

import structlog
import trio
from libp2p.abc import IHost, IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID
from multiaddr import Multiaddr

from meshnode.errors import PeerRefused, PeerUnreachable, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.muxer_stream import YamuxStream
from meshnode.net.libp2p.secure_channel import channel_over
from meshnode.net.libp2p.yamux import Connection
from meshnode.net.libp2p.yamux_frames import GO_AWAY_NORMAL, GO_AWAY_PROTOCOL_ERROR, Limits
from meshnode.net.libp2p.yamux_stream import Stream

# What one write carries at most: four full noise messages, as much as one read takes.
_MESSAGES_PER_WRITE = 4
# With so many streams that have something to say, what is queued leaves at once, and not when all
# tasks that run just now had their turn: else both sides of a busy connection work in turns, each
# idle while the other one is at it.
_EAGER_STREAMS = 8
# How long closing waits for queued data to leave; then a little longer for the GO_AWAY and for
# the other side to close, since closing first would destroy what it has not read yet.
_FLUSH_LIMIT = 1.0  # seconds
_GOODBYE_LIMIT = 0.25  # seconds
# How long bytes that nobody waits for are held back, so that they leave with others: longer than
# an engine that answers at once takes on a busy machine, shorter than anybody would notice.
_HOLD = 0.005  # seconds
# How long an abandoned stream waits for the other side to finish too.
_LINGER = 30.0  # seconds
# libp2p's reaction to a lost connection may notify a dozen parts; it must not hold up a node's end.
_ON_CLOSE_LIMIT = 3.0  # seconds

_log = structlog.get_logger(__name__)


class StreamLimitReached(PeerRefused, MuxedStreamError):
    """This connection has as many streams of ours as it may."""


class ConnectionEnded(PeerUnreachable, MuxedConnUnavailable):
    """The connection is closing, or has ended."""


class YamuxConn(IMuxedConn):
    """One connection and its streams."""

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        *,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        self.on_close: Callable[[], Awaitable[None]] | None = None  # set by libp2p's SwarmConn
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.last_received = trio.current_time()
        self._metrics = metrics
        self._core = Connection(is_initiator=conn.is_initiator, limits=limits)
        self._channel = channel_over(conn)
        self._output = trio.Event()
        self._arrivals = trio.Event()
        self._pings: dict[int, trio.Event] = {}
        self._writer_waits = False  # for something to send, and is not in the middle of sending
        self._unsent = b""  # sealed, and to go before anything else
        self._lingers = trio.Event()
        self._holds = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._is_closing = False
        self._hurry_at = math.inf  # when closing stops to wait for windows that are full
        self._has_ended = False
        self._reason = "the connection was lost"

    def __repr__(self) -> str:
        return f"<yamux connection with {self.peer_id}, {self.stream_count} streams>"

    @property
    def stream_count(self) -> int:
        """How many streams are open."""
        return self._core.stream_count

    @property
    def stream_limit(self) -> int:
        """How many streams each side may have open."""
        return self._core.limits.streams

    @property
    def reason(self) -> str:
        """Why the connection ended, in words for people."""
        return self._reason

    @property
    def is_initiator(self) -> bool:
        """Whether this side dialled."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self._nursery is not None and not (self._is_closing or self._has_ended)

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over, its socket included."""
        return self.event_closed.is_set()

    async def start(self) -> None:
        """Carry the connection until it ends; never raises for what the other side does."""
        try:
            if self._is_closing:
                return
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._read_until_end)
                nursery.start_soon(self._write_until_goodbye)
                nursery.start_soon(self._end_lingering_forever)
                nursery.start_soon(self._release_held_forever)
                self.event_started.set()
        finally:
            await self._finish()

    async def close(self, error_code: int = GO_AWAY_NORMAL) -> None:
        """Send what is queued (for at most a second), say goodbye, close the socket."""
        self._begin_to_close("closed on this side", error_code, _FLUSH_LIMIT)
        if self._nursery is None:
            await self._finish()
        await self.event_closed.wait()

    async def open_stream(self) -> YamuxStream:
        """Open a stream. Never waits: the other side hears of it with the first bytes.

        Raises:
            StreamLimitReached: close some first.
            ConnectionEnded: the connection is closing or has ended.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            state = self._core.open()
        except PeerRefused as exc:
            raise StreamLimitReached(str(exc)) from exc
        except PeerUnreachable as exc:
            raise ConnectionEnded(str(exc)) from exc
        return YamuxStream(self, state)

    async def accept_stream(self) -> YamuxStream:
        """Wait for a stream that the other side opens.

        Raises:
            ConnectionEnded: there will be none.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while (state := self._core.accept()) is None:
            if self._has_ended or self._is_closing:
                raise ConnectionEnded(self._reason)
            self._arrivals = trio.Event()
            await self._arrivals.wait()
        return YamuxStream(self, state)

    async def ping(self, timeout: float) -> float:
        """Return one round trip of the connection in seconds.

        Raises:
            ConnectionEnded: it ended before an answer came.
            trio.TooSlowError: no answer in time.
        """
        if self._has_ended or self._is_closing:
            raise ConnectionEnded(self._reason)
        opaque = self._core.ping()
        answered = self._pings[opaque] = trio.Event()
        self.kick()
        asked_at = trio.current_time()
        try:
            with trio.fail_after(timeout):
                await answered.wait()
        finally:
            self._pings.pop(opaque, None)
        if self._has_ended:
            raise ConnectionEnded(self._reason)
        return trio.current_time() - asked_at

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the remote host and port, where known."""
        return self.secured_conn.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Return the addresses this connection really uses."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Return whether the connection is direct or relayed."""
        return self.secured_conn.get_connection_type()

    # For the streams of this connection.

    def kick(self) -> None:
        """Let the writer look at what there is to send."""
        core = self._core
        if core.ready_count >= _EAGER_STREAMS and self._may_flush:
            self._flush()
        elif core.has_output:
            self._output.set()

    @property
    def _may_flush(self) -> bool:
        if not self._writer_waits or self._unsent or self._is_closing or self._has_ended:
            return False
        return self._channel.sends_now

    def _flush(self) -> None:
        """Write at once; what finds no room is the writer's to send."""
        self._unsent = self._channel.send_now(self._next_messages())
        if self._unsent or self._core.has_output:
            self._output.set()

    def linger(self, state: Stream) -> None:
        """Reset the stream if the other side has not finished it after a while."""
        self._core.linger(state, until=trio.current_time() + _LINGER)
        self._lingers.set()

    def hold(self) -> None:
        """See to it that what is held leaves after a moment at the latest."""
        self._holds.set()

    def unlinger(self, state: Stream) -> None:
        """Somebody reads on: the stream is theirs to end."""
        self._core.lingering.pop(state, None)

    # The tasks.

    async def _read_until_end(self) -> None:
        reason = "closed by the peer"
        try:
            while messages := await self._channel.receive():
                self.last_received = trio.current_time()
                for message in messages:
                    self._core.receive(message)
                self._after_input()
        except PeerUnreachable as exc:
            reason = str(exc)
        except WireError as exc:
            self._blame_peer(exc)
            # What it said before its fault may hold whole answers; what comes is not read.
            return
        self._stop(reason)

    def _after_input(self) -> None:
        if self._core.backlog:
            self._arrivals.set()
        for opaque in self._core.pongs:
            if (answered := self._pings.get(opaque)) is not None:
                answered.set()
        self._core.pongs.clear()
        self.kick()

    async def _write_until_goodbye(self) -> None:
        core = self._core
        try:
            while not core.said_goodbye:
                if self._unsent:
                    sealed, self._unsent = self._unsent, b""
                    await self._channel.send_rest(sealed)
                if messages := self._next_messages():
                    await self._channel.send(messages)
                    if core.has_output:
                        # Others take their turn, and what they write joins the next messages.
                        await trio.lowlevel.checkpoint()
                    continue
                self._output = trio.Event()
                if not self._is_closing:
                    self._writer_waits = True
                    await self._output.wait()
                    self._writer_waits = False
                    continue
                with trio.move_on_at(self._hurry_at) as waiting:
                    await self._output.wait()
                if waiting.cancelled_caught:
                    core.hurry()
            await self._channel.send_eof()
            # The other side reads what came and closes in turn, unless it is not there any more.
            self._close_by(trio.current_time() + _GOODBYE_LIMIT)
        except PeerUnreachable as exc:
            self._stop(str(exc))

    def _next_messages(self) -> list[bytes]:
        """Return what one write carries."""
        core = self._core
        messages: list[bytes] = []
        while core.has_output and len(messages) < _MESSAGES_PER_WRITE:
            if message := core.next_message():
                messages.append(message)
        return messages

    async def _end_lingering_forever(self) -> None:
        while True:
            due = self._core.end_lingering(trio.current_time())
            self.kick()
            if due is not None:
                await trio.sleep_until(due)
            else:
                self._lingers = trio.Event()
                await self._lingers.wait()

    async def _release_held_forever(self) -> None:
        core = self._core
        while True:
            if not core.held:
                self._holds = trio.Event()
                await self._holds.wait()
            # One nap for all of them: each is held for once or twice its time.
            due = tuple(core.held)
            await trio.sleep(_HOLD)
            core.release(due)
            self.kick()

    # The end.

    def _begin_to_close(self, reason: str, code: int, flush_limit: float) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        self._reason = reason
        self._arrivals.set()
        self._core.say_goodbye(code)
        self._output.set()
        self._hurry_at = trio.current_time() + flush_limit
        self._close_by(self._hurry_at + _GOODBYE_LIMIT)

    def _close_by(self, deadline: float) -> None:
        if self._nursery is not None:
            scope = self._nursery.cancel_scope
            scope.deadline = min(scope.deadline, deadline)

    def _blame_peer(self, fault: WireError) -> None:
        _log.warning("yamux_fault", peer_id=str(self.peer_id), code=fault.code, error=str(fault))
        if self._metrics is not None:
            self._metrics.protocol_faults.labels(protocol="yamux", code=fault.code).inc()
        self._begin_to_close(str(fault), GO_AWAY_PROTOCOL_ERROR, 0.0)
        self._core.end(self._reason)

    def _stop(self, reason: str) -> None:
        """End the tasks: nothing more can be read or written."""
        if not self._is_closing:
            self._reason = reason
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _finish(self) -> None:
        """Cut off what is left and tell everybody, once."""
        if self._has_ended:
            return
        self._has_ended = True
        self._core.end(self._reason)
        self._arrivals.set()
        for answered in self._pings.values():
            answered.set()
        with trio.move_on_after(_FLUSH_LIMIT, shield=True):
            try:
                await self.secured_conn.close()
            except (BaseLibp2pError, OSError, trio.BrokenResourceError) as exc:
                _log.debug("connection_not_closed", error=str(exc))
        self.event_closed.set()
        self.event_started.set()
        if self.on_close is not None:
            with trio.move_on_after(_ON_CLOSE_LIMIT, shield=True):
                await self.on_close()


class OurMuxerMultistream(MuxerMultistream):
    """libp2p's negotiation of the muxer, which answers /yamux/1.0.0 with its own class always."""

    def __init__(self, negotiate_timeout: int, metrics: Metrics | None) -> None:
        super().__init__(muxer_options(), negotiate_timeout)
        self._metrics = metrics

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on yamux, and return a connection of ours, not yet started."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = YamuxConn(conn, peer_id, metrics=self._metrics)
        return self._annotate_connection(muxed, conn, protocol)


def muxer_options() -> Mapping[TProtocol, type[IMuxedConn]]:
    """Return the one muxer to offer. The class alone has no effect without ``use_our_muxer``."""
    return {TProtocol(PROTOCOL_ID): YamuxConn}


def use_our_muxer(host: IHost, *, metrics: Metrics | None = None) -> None:
    """Give every connection that ``host`` makes from now on our yamux, and offer nothing else."""
    upgrader = host.get_network().upgrader  # type: ignore[attr-defined]
    stock = upgrader.muxer_multistream
    upgrader.muxer_multistream = OurMuxerMultistream(stock.negotiate_timeout, metrics)


__all__ = [
    "ConnectionEnded",
    "OurMuxerMultistream",
    "StreamLimitReached",
    "YamuxConn",
    "YamuxStream",
    "muxer_options",
    "use_our_muxer",
]
