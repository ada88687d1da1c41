"""One link of the in-process mesh: two ends, and the streams between them.

An end never touches the other one directly: everything goes through ``LinkEnd.send``, so that a
cut or slow link holds back bytes, window credit, closes and resets alike, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from meshnode.errors import LinkLost, PeerRefused, PeerUnreachable, StreamClosed, StreamReset

# A writer waits once this many bytes (per direction) are unread; the size yamux starts with.
WINDOW_BYTES = 256 * 1024

Action = Callable[[], None]


class LinkOwner(Protocol):
    """What an end needs of the node it belongs to."""

    @property
    def peer_id(self) -> str: ...

    def post(self, end: LinkEnd, action: Action) -> None:
        """Run ``action`` when what was sent over this link now reaches the node."""

    def accept_stream(self, stream: MemoryStream) -> bool:
        """Start the handler of an inbound stream; False if its protocol is not served."""

    def forget_link(self, end: LinkEnd, reason: str) -> None:
        """Take note that ``end`` just died."""


class LinkEnd:
    """One node's end of a link."""

    def __init__(self, owner: LinkOwner, *, addr: str | None, dialled: bool) -> None:
        self.owner = owner
        self.addr = addr
        self.dialled = dialled
        self.other: LinkEnd
        self.alive = True
        self.since = self.last_received = trio.current_time()
        self.rtt: float | None = None
        self.held: deque[Action] = deque()  # arrived while the link was cut
        self.last_arrival = 0.0  # keeps order when a delay is shortened
        self._streams: dict[int, MemoryStream] = {}
        self._next_stream_id = 1 if dialled else 2  # odd and even, so that both may open

    @property
    def peer_id(self) -> str:
        return self.other.owner.peer_id

    @property
    def stream_count(self) -> int:
        """Streams that are not over in both directions."""
        return len(self._streams)

    def send(self, action: Callable[[LinkEnd], None]) -> None:
        """Run ``action`` with the other end, there, when it arrives."""
        if self.alive:
            other = self.other
            other.owner.post(other, lambda: action(other))

    def arrive(self, action: Action) -> None:
        """Carry out what arrived, unless the link died meanwhile."""
        if self.alive:
            self.last_received = trio.current_time()
            action()

    def die(self, reason: str) -> None:
        """End this end only: its streams are cut, its node is told."""
        if not self.alive:
            return
        self.alive = False
        self.held.clear()
        for stream in tuple(self._streams.values()):
            stream.on_reset(f"the link to {self.peer_id} ended: {reason}", is_lost=True)
        self._streams.clear()
        self.owner.forget_link(self, reason)

    def close(self, reason: str) -> None:
        """End this end now, and the other one when it hears of it."""
        self.send(lambda other: other.die("closed by peer"))
        self.die(reason)

    def open_stream(self, protocol_id: str) -> MemoryStream:
        """Ask the other end for a stream; ``MemoryStream.wait_accepted`` has the answer."""
        stream = MemoryStream(self, self._next_stream_id, protocol_id)
        self._next_stream_id += 2
        self._streams[stream.stream_id] = stream
        stream_id = stream.stream_id
        self.send(lambda other: other._on_open(stream_id, protocol_id))
        return stream

    def to_stream(self, stream_id: int, action: Callable[[MemoryStream], None]) -> None:
        """Run ``action`` with the other end's half of a stream, if it still has one."""

        def deliver(other: LinkEnd) -> None:
            if (stream := other._streams.get(stream_id)) is not None:
                action(stream)

        self.send(deliver)

    def drop_stream(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)

    def _on_open(self, stream_id: int, protocol_id: str) -> None:
        stream = MemoryStream(self, stream_id, protocol_id)
        self._streams[stream_id] = stream
        if self.owner.accept_stream(stream):
            self.to_stream(stream_id, lambda opener: opener.on_accepted())
        else:
            self.drop_stream(stream_id)
            self.to_stream(stream_id, lambda opener: opener.on_refused())


class MemoryStream:
    """A MeshStream between two nodes of one process."""

    def __init__(self, end: LinkEnd, stream_id: int, protocol_id: str) -> None:
        self.stream_id = stream_id
        self.is_begun = False  # opened without waiting for the other side's word
        self._end = end
        self._protocol_id = protocol_id
        self._peer_id = end.peer_id
        self._inbound = bytearray()
        self._credit = WINDOW_BYTES
        self._accepted = False
        self._refused = False
        self._eof_received = False
        self._eof_sent = False
        self._closed = False
        self._cut: str | None = None  # why, once reset or dead
        self._is_lost = False  # dead, and not reset
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def protocol_id(self) -> str:
        return self._protocol_id

    async def wait_accepted(self) -> None:
        """Wait for the other side's answer to the open.

        Raises:
            PeerRefused: it does not serve the protocol.
            StreamReset: the link died first.
        """
        while not self._accepted:
            self._check_served()
            self._check_cut()
            await self._changed.park()

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise StreamClosed("this side already closed the stream")
            self._check_served()
            if self._cut is not None and self.is_begun and not self._accepted:
                raise PeerUnreachable(self._cut)
            self._check_cut()
            if self._inbound:
                return self._take(max_bytes)
            if self._eof_received:
                return b""
            await self._changed.park()

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        self._check_sendable()
        while view:
            if self._credit == 0:
                await self._changed.park()
            else:
                chunk = bytes(view[: self._credit])
                self._credit -= len(chunk)
                view = view[len(chunk) :]
                self._tell(lambda peer, chunk=chunk: peer.on_data(chunk))  # type: ignore[misc]
            self._check_sendable()

    async def send_soon(self, data: bytes) -> None:
        await self.send_all(data)  # there is nothing to spare here

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_cut()
        if self._closed:
            raise StreamClosed("this side already closed the stream")
        self._finish_sending()

    async def aclose(self) -> None:
        if not self._closed and self._cut is None:
            self._finish_sending()
            self._closed = True
            self._discard()
            self._changed.unpark_all()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        if self._cut is None:
            self._closed = True
            self._tell(lambda peer: peer.on_reset("reset by peer"))
            self._end.drop_stream(self.stream_id)
            self._cut = "reset by this side"
            self._changed.unpark_all()

    def reset_unless_closed(self) -> None:
        if not self._closed:
            self.reset()

    def on_accepted(self) -> None:
        self._accepted = True
        self._changed.unpark_all()

    def on_refused(self) -> None:
        self._refused = True
        self._end.drop_stream(self.stream_id)
        self._changed.unpark_all()

    def on_data(self, chunk: bytes) -> None:
        self._inbound += chunk
        if self._closed:
            self._discard()
        self._changed.unpark_all()

    def on_credit(self, size: int) -> None:
        self._credit += size
        self._changed.unpark_all()

    def on_eof(self) -> None:
        self._eof_received = True
        self._drop_if_over()
        self._changed.unpark_all()

    def on_reset(self, reason: str, *, is_lost: bool = False) -> None:
        if self._cut is None:
            self._cut = reason
            self._is_lost = is_lost
            self._inbound.clear()
            self._end.drop_stream(self.stream_id)
            self._changed.unpark_all()

    def _check_served(self) -> None:
        if self._refused:
            raise PeerRefused(f"{self._peer_id} does not serve {self._protocol_id}")

    def _check_sendable(self) -> None:
        if self._closed or self._eof_sent:
            raise StreamClosed("this side already closed the stream, or its sending half")
        self._check_cut()

    def _check_cut(self) -> None:
        if self._cut is not None:
            raise LinkLost(self._cut) if self._is_lost else StreamReset(self._cut)

    def _take(self, max_bytes: int) -> bytes:
        chunk = bytes(self._inbound[:max_bytes])
        del self._inbound[:max_bytes]
        self._tell(lambda peer: peer.on_credit(len(chunk)))
        return chunk

    def _discard(self) -> None:
        # A closed side reads no more, but must not leave the other one waiting for credit.
        if self._inbound:
            self._take(len(self._inbound))

    def _finish_sending(self) -> None:
        if not self._eof_sent:
            self._eof_sent = True
            self._tell(lambda peer: peer.on_eof())
            self._drop_if_over()

    def _drop_if_over(self) -> None:
        if self._eof_sent and self._eof_received:
            self._end.drop_stream(self.stream_id)

    def _tell(self, action: Callable[[MemoryStream], None]) -> None:
        self._end.to_stream(self.stream_id, action)
