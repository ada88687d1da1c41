"""/yamux/1.0.0 as a state machine: bytes in, bytes out, no I/O and no clock.

Everything that decides the life of a stream lives here; ``muxer.py`` only moves bytes and wakes
tasks. Two laws hold at every moment: a clean end (FIN) and a cut (RST, or the death of the
connection) are never confused, and nothing that a peer can grow is without a bound.

Source: hashicorp/yamux spec.md, and what go-yamux and js-yamux do where it is silent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from meshnode.errors import PeerRefused, PeerUnreachable, WireError
from meshnode.net.libp2p.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    GO_AWAY_NORMAL,
    HEADER,
    INITIAL_WINDOW,
    MAX_MESSAGE,
    MAX_U32,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Limits,
)
from meshnode.net.libp2p.yamux_stream import Stream

# A data frame smaller than this at the end of a message costs more than it carries.
_MIN_SLICE = 4096  # bytes
# go-yamux resets streams beyond 256 that its user did not take yet, and acknowledges them when
# they are taken: this many SYNs are under way at a time, as with go-yamux and rust-yamux.
_MAX_UNACKNOWLEDGED = 256
# Fewer than what would make such a peer wait.
_MAX_WITHHELD_ACKS = 64


class Connection:
    """One side of a yamux connection.

    ``receive`` takes what came, ``next_message`` returns what to send, in pieces that fit one
    noise message.
    """

    def __init__(self, *, is_initiator: bool, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.streams: dict[int, Stream] = {}  # those that the peer knows of
        self.backlog: deque[Stream] = deque()  # inbound ones that nobody took yet
        self.pongs: list[int] = []  # answers to own pings, for the shell to take away
        self.queued = 0  # bytes in all outboxes
        # Streams that this side is done with -> when to give up on the other; oldest first.
        self.lingering: dict[Stream, float] = {}
        # Streams whose bytes wait for more to leave with them, as long as the shell lets them.
        self.held: dict[Stream, None] = {}
        self.ended: str | None = None  # why the connection is over
        self.peer_leaves = False  # its GO_AWAY came
        self.said_goodbye = False  # own GO_AWAY was handed out: the last frame of all
        self._next_id = 1 if is_initiator else 2
        self._peer_parity = 0 if is_initiator else 1
        self._unannounced: set[Stream] = set()
        self._waiting: dict[Stream, None] = {}  # unannounced ones that want to be, in turn
        self._unanswered = 0  # outbound streams whose SYN nothing came back for yet
        self._outbound = 0
        self._inbound = 0
        self._next_ping = 0
        # Growth beyond the initial windows, all streams together.
        self._growth_left = self.limits.growth
        # Output.
        self._control: deque[bytes] = deque()
        self._owing: dict[Stream, None] = {}  # streams with a SYN or credit to tell of
        self._acks: dict[Stream, None] = {}  # streams taken here, whose ACK is withheld
        self._ready: deque[Stream] = deque()  # streams with data or a FIN to send, in turn
        self._goodbye: int | None = None  # GO_AWAY code
        self._hurried = False
        # Input.
        self._partial = b""  # of a header
        self._body_left = 0  # bytes of the frame that is being read
        self._body_stream: Stream | None = None
        self._body_ends = False

    @property
    def stream_count(self) -> int:
        """How many streams are open, told to the peer or not."""
        return self._outbound + self._inbound

    @property
    def ready_count(self) -> int:
        """How many streams have something to send."""
        return len(self._ready)

    @property
    def has_output(self) -> bool:
        """Whether ``next_message`` has something to say."""
        return bool(
            self._control
            or self._owing
            or self._ready
            or len(self._acks) >= _MAX_WITHHELD_ACKS
            or (self._goodbye is not None and self._may_say_goodbye)
        )

    @property
    def _may_say_goodbye(self) -> bool:
        if self.said_goodbye:
            return False
        return self._hurried or not (self.queued or self._ready)

    def open(self) -> Stream:
        """Open a stream; the peer hears of it with the first bytes, or when a reader waits.

        Raises:
            PeerRefused: at the limit of streams.
            PeerUnreachable: the connection ends, or has ended.
        """
        if self.ended is not None or self.peer_leaves or self._goodbye is not None:
            raise PeerUnreachable(self.ended or "the connection is closing")
        if self._outbound >= self.limits.streams:
            raise PeerRefused(f"{self._outbound} streams are open, the limit of one connection")
        if self._next_id > MAX_U32:
            raise PeerUnreachable("all stream IDs of this connection are used up")
        stream = Stream(self, 0, outbound=True)
        self._outbound += 1
        self._unannounced.add(stream)
        return stream

    def accept(self) -> Stream | None:
        """Take the oldest inbound stream, if any."""
        while self.backlog:
            stream = self.backlog.popleft()
            if not stream.gone:
                # An ACK alone does not deserve a packet; it goes with whatever is sent next.
                self._acks[stream] = None
                return stream
        return None

    def ping(self) -> int:
        """Ask for a sign of life; the number returned comes back in ``pongs``."""
        self._next_ping = (self._next_ping + 1) & MAX_U32
        self.control(PING, SYN, 0, self._next_ping)
        return self._next_ping

    def say_goodbye(self, code: int = GO_AWAY_NORMAL) -> None:
        """Send GO_AWAY once everything that is queued was sent."""
        if self._goodbye is None:
            self._goodbye = code

    def hurry(self) -> None:
        """Send GO_AWAY without waiting for windows that are full."""
        self._hurried = True

    def end(self, reason: str) -> None:
        """Cut off every stream: the connection is over. Twice is once."""
        if self.ended is not None:
            return
        self.ended = reason
        for stream in [*self.streams.values(), *self._unannounced]:
            stream.cut_off(reason, is_lost=True)
        self.backlog.clear()
        self._ready.clear()

    # Output.

    def next_message(self) -> bytes:
        """Return the next frames to send, at most ``MAX_MESSAGE`` bytes; ``b""`` if none."""
        parts: list[bytes | memoryview] = []
        room = MAX_MESSAGE
        while self._control and room >= HEADER.size:
            parts.append(self._control.popleft())
            room -= HEADER.size
        while self._owing and room >= HEADER.size:
            stream = next(iter(self._owing))
            del self._owing[stream]
            # A stream whose turn to send comes tells its flags with the data.
            if not stream.gone and (
                stream.credit_due or (stream.flags_due and not stream.scheduled)
            ):
                parts.append(self._window_update(stream))
                room -= HEADER.size
        room = self._take_data(parts, room)
        if parts or len(self._acks) >= _MAX_WITHHELD_ACKS:
            while self._acks and room >= HEADER.size:
                stream = next(iter(self._acks))
                del self._acks[stream]
                if stream.flags_due and not stream.gone:
                    parts.append(self._window_update(stream))
                    room -= HEADER.size
        if self._goodbye is not None and room >= HEADER.size and self._may_say_goodbye:
            parts.append(HEADER.pack(0, GO_AWAY, 0, 0, self._goodbye))
            self.said_goodbye = True
        return b"".join(parts)

    def _take_data(self, parts: list[bytes | memoryview], room: int) -> int:
        """Let the ready streams send in turn, each as much as still fits this message."""
        ready = self._ready
        while ready and room > 2 * HEADER.size:
            stream = ready[0]
            if not stream.sendable:
                stream.scheduled = False
                ready.popleft()
                continue
            if stream.fin_queued and stream.flags_due & ACK:
                # py-libp2p overlooks a FIN that comes with an ACK.
                parts.append(self._window_update(stream))
                room -= HEADER.size
            size = min(stream.queued, stream.send_credit)
            if size > room - HEADER.size:
                if room < _MIN_SLICE:
                    break
                size = room - HEADER.size
            ready.popleft()
            stream.scheduled = False
            ends = stream.fin_queued and size == stream.queued
            flags = stream.flags_due | (FIN if ends else 0)
            stream.flags_due = 0
            parts.append(HEADER.pack(0, DATA, flags, stream.id, size))
            room -= HEADER.size + size
            if size:
                stream.take(size, parts)
            if ends:
                stream.fin_sent = True
                if stream.ended:
                    self.forget(stream)
            else:
                self.schedule(stream)
        return room

    def _window_update(self, stream: Stream) -> bytes:
        frame = HEADER.pack(0, WINDOW_UPDATE, stream.flags_due, stream.id, stream.credit_due)
        stream.flags_due = stream.credit_due = 0
        return frame

    def linger(self, stream: Stream, *, until: float) -> None:
        """Wait for the peer to finish the stream too, but not for ever."""
        if not stream.gone:
            self.lingering.pop(stream, None)
            self.lingering[stream] = until

    def end_lingering(self, now: float) -> float | None:
        """Reset what lingered until ``now``; return when the next one is due, if there is any."""
        while self.lingering:
            stream, until = next(iter(self.lingering.items()))
            if until > now:
                return until
            stream.reset()
        return None

    # What streams ask of their connection.

    def control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame that stands for itself."""
        self._control.append(HEADER.pack(0, kind, flags, stream_id, length))

    def announce(self, stream: Stream) -> None:
        """Give the stream its ID and owe the peer its SYN.

        Not before: an open that is cancelled then costs nothing, and the SYN mostly rides on the
        first data. IDs are given in the order of the SYNs, as every implementation expects. With
        too many SYNs unanswered the stream waits for its turn, and so do its bytes.
        """
        if self._unanswered >= _MAX_UNACKNOWLEDGED:
            self._waiting[stream] = None
            return
        self._unanswered += 1
        self._unannounced.discard(stream)
        stream.id = self._next_id
        self._next_id += 2
        stream.unanswered = True
        stream.flags_due = SYN
        self.streams[stream.id] = stream
        self._owing[stream] = None

    def _on_answer(self, stream: Stream) -> None:
        stream.unanswered = False
        self._unanswered -= 1
        if self._waiting and self._unanswered < _MAX_UNACKNOWLEDGED and self.ended is None:
            waiting = next(iter(self._waiting))
            del self._waiting[waiting]
            self.schedule(waiting)

    def schedule(self, stream: Stream) -> None:
        """Put the stream in the queue of senders if it has something to send."""
        if stream.gone:
            return
        if self.held:
            self.held.pop(stream, None)
        if not stream.id:
            self.announce(stream)
        if not stream.scheduled and stream.sendable:
            stream.scheduled = True
            self._ready.append(stream)

    def release(self, streams: Iterable[Stream]) -> None:
        """Let what is still held on these streams leave with the next message."""
        for stream in streams:
            if stream in self.held:
                self.schedule(stream)

    def owe(self, stream: Stream) -> None:
        """Tell the peer of the stream's credit."""
        self._owing[stream] = None

    def grow(self, stream: Stream) -> int:
        """Double the stream's window if the bounds allow; return the bytes it gained."""
        gain = min(stream.window, self.limits.max_window - stream.window, self._growth_left)
        if gain <= 0:
            return 0
        self._growth_left -= gain
        stream.window += gain
        return gain

    def forget(self, stream: Stream) -> None:
        """Take the stream out of the table: both sides are done with it."""
        if stream.gone:
            return
        stream.gone = True
        self._growth_left += stream.window - INITIAL_WINDOW
        self._unannounced.discard(stream)
        self._waiting.pop(stream, None)
        self.streams.pop(stream.id, None)
        self.lingering.pop(stream, None)
        self.held.pop(stream, None)
        self._owing.pop(stream, None)
        self._acks.pop(stream, None)
        if stream.outbound:
            self._outbound -= 1
        else:
            self._inbound -= 1
        if stream.unanswered:
            self._on_answer(stream)

    # Input.

    def receive(self, data: bytes) -> None:
        """Take bytes that came, cut at any place.

        Raises:
            WireError: the peer broke the protocol; the connection can't go on.
        """
        if self._partial:
            data = self._partial + data
            self._partial = b""
        position, size = 0, len(data)
        while self.ended is None:
            if self._body_left:
                count = min(self._body_left, size - position)
                if not count:
                    return
                if self._body_stream is not None:
                    whole = count == size
                    self._body_stream.deliver(data if whole else data[position : position + count])
                position += count
                self._body_left -= count
                if self._body_left:
                    return
                self._end_body()
                continue
            if size - position < HEADER.size:
                self._partial = data[position:]
                return
            version, kind, flags, stream_id, length = HEADER.unpack_from(data, position)
            position += HEADER.size
            if version:
                raise WireError("bad_version", f"yamux version {version}, expected 0")
            if kind <= WINDOW_UPDATE:
                self._on_stream_frame(kind, flags, stream_id, length)
            elif kind == PING:
                self._on_ping(flags, length)
            elif kind == GO_AWAY:
                self.peer_leaves = True
            else:
                raise WireError("bad_type", f"yamux frame type {kind} is not known")

    def _on_stream_frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        stream = self._open_inbound(stream_id) if flags & SYN else self.streams.get(stream_id)
        if stream is not None and stream.unanswered:
            self._on_answer(stream)
        if kind == DATA:
            if stream is not None and length:
                if stream.ended:
                    raise WireError("data_after_fin", f"data on stream {stream_id} after its end")
                if length > stream.recv_credit:
                    raise WireError(
                        "window_overrun",
                        f"{length} bytes on stream {stream_id}, {stream.recv_credit} were allowed",
                    )
                stream.recv_credit -= length
            # Frames of a stream that is gone were on their way when it ended: overlooked.
            self._body_left, self._body_stream = length, stream
        elif stream is not None and length:
            stream.send_credit += length
            if stream.send_credit > MAX_U32:
                raise WireError("window_overflow", f"window of stream {stream_id} beyond 2^32-1")
            self.schedule(stream)
        if stream is not None and flags & RST:
            stream.cut_off("the peer reset the stream")
            self._body_stream = stream = None
        self._body_ends = bool(flags & FIN)
        if not self._body_left:
            self._body_stream = stream
            self._end_body()

    def _end_body(self) -> None:
        stream = self._body_stream
        self._body_stream = None
        if self._body_ends and stream is not None and not stream.gone and not stream.ended:
            stream.end_receiving()

    def _open_inbound(self, stream_id: int) -> Stream | None:
        """Return the stream that a SYN opens, or None if it was refused with RST."""
        if not stream_id or stream_id % 2 != self._peer_parity:
            raise WireError("bad_stream_id", f"stream ID {stream_id} is not the peer's to open")
        if stream_id in self.streams:
            raise WireError("duplicate_stream", f"stream {stream_id} is open already")
        if (
            self._inbound >= self.limits.streams
            or len(self.backlog) >= self.limits.accept_backlog
            or self._goodbye is not None
        ):
            self._answer(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = Stream(self, stream_id, outbound=False)
        stream.flags_due = ACK
        self._inbound += 1
        self.streams[stream_id] = stream
        self.backlog.append(stream)
        return stream

    def _on_ping(self, flags: int, opaque: int) -> None:
        if flags & SYN:
            self._answer(PING, ACK, 0, opaque)
        elif flags & ACK:
            self.pongs.append(opaque)

    def _answer(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame that the peer provoked; it must read them as fast as it provokes."""
        if len(self._control) >= self.limits.control_frames:
            raise WireError("control_flood", f"{len(self._control)} answers wait to be read")
        self.control(kind, flags, stream_id, length)
