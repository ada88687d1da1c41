"""One yamux stream as one side sees it: its windows, its buffers and its two ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from meshnode.errors import LinkLost, StreamClosed, StreamReset
from meshnode.net.libp2p.yamux_frames import INITIAL_WINDOW, RST, SYN, WINDOW_UPDATE

if TYPE_CHECKING:
    from meshnode.net.libp2p.yamux import Connection

# A peer may send its window in two-byte frames: small ones share a buffer, so that what is kept
# stays near to what was sent.
_SMALL_CHUNK = 512  # bytes
_SHARED_CHUNK = 16 * 1024  # bytes


def _nothing() -> None:
    """Wake nobody."""


class Stream:
    """One stream as one side sees it.

    ``on_readable`` and ``on_writable`` are called whenever a reader or writer that waits should
    look again. They must not call back into the stream.
    """

    __slots__ = (
        "_connection",
        "_consumed",
        "_inbox",
        "_is_lost",
        "_outbox",
        "_taken",
        "aborted",
        "credit_due",
        "cut",
        "ended",
        "fin_queued",
        "fin_sent",
        "flags_due",
        "gone",
        "id",
        "let_go",
        "on_readable",
        "on_writable",
        "outbound",
        "queued",
        "recv_credit",
        "scheduled",
        "send_credit",
        "unanswered",
        "unread",
        "window",
    )

    def __init__(self, connection: Connection, stream_id: int, *, outbound: bool) -> None:
        self._connection = connection
        self.id = stream_id  # 0 until the peer is told of it
        self.outbound = outbound
        self.on_readable: Callable[[], None] = _nothing
        self.on_writable: Callable[[], None] = _nothing
        # Receiving.
        self._inbox: deque[bytes | bytearray] = deque()
        self._taken = 0  # bytes of the inbox's first chunk that were read
        self.unread = 0  # bytes in the inbox
        self.ended = False  # the peer's FIN came
        self.let_go = False  # nobody here will read any more
        self.window = INITIAL_WINDOW  # bytes
        self.recv_credit = INITIAL_WINDOW  # bytes the peer may still send
        self._consumed = 0  # bytes read here, and not credited to the peer yet
        self.credit_due = 0  # bytes that the next window update credits
        # Sending.
        self._outbox: deque[memoryview] = deque()
        self.queued = 0  # bytes in the outbox
        self.send_credit = INITIAL_WINDOW  # bytes the peer will still take
        self.fin_queued = False
        self.fin_sent = False
        self.unanswered = False  # the SYN was queued, and nothing came back yet
        self.flags_due = 0  # SYN or ACK, carried by whatever is sent first
        self.scheduled = False  # stands in the connection's ready queue
        # The end.
        self.aborted = False  # reset on this side
        self.cut: str | None = None  # why it ended before its time
        self._is_lost = False  # its connection ended, and not it alone
        self.gone = False  # out of the connection's table

    def read(self, max_bytes: int) -> bytes | None:
        """Return 1 to ``max_bytes`` bytes, ``b""`` at the clean end, None if nothing came yet.

        What came before a cut is read first. The peer is credited in the same step.
        """
        if self.aborted or self.let_go:
            raise StreamClosed("this stream was closed on this side; open another one")
        if self.unread:
            data = self._pop(max_bytes)
            if not (self.ended or self.gone):
                self._credit(len(data))
            return data
        if self.ended:
            return b""
        self._check_cut()
        if not self.id:
            # Whoever waits for an answer wants the peer to know of the stream.
            self._connection.announce(self)
        return None

    def write(self, data: memoryview, *, soon: bool = False) -> int:
        """Queue as much of ``data`` as there is room for; return how many bytes were taken.

        Args:
            soon: let it wait for what is written next, or until ``Connection.release``.
        """
        if self.aborted or self.fin_queued:
            raise StreamClosed("this stream was closed for sending on this side")
        self._check_cut()
        size = min(len(data), self._connection.limits.send_buffer - self.queued)
        if size > 0:
            self._outbox.append(data[:size])
            self.queued += size
            self._connection.queued += size
            if soon and self.id and not self.scheduled:
                self._connection.held[self] = None
            else:
                self._connection.schedule(self)
        return size

    def finish(self) -> None:
        """Say that nothing more will be sent, after what is queued. Twice is once."""
        if self.fin_queued or self.gone:
            return
        self.fin_queued = True
        self._connection.schedule(self)

    def abandon(self) -> None:
        """Finish sending, and take no more interest in what comes.

        The entry lives on until the peer finishes too. The caller resets the stream after a
        linger, because a peer need not ever finish. One that goes on sending gets no new credit
        and is reset at half a window: a reset at once could destroy what it has not read yet.
        """
        if self.gone:
            self.let_go = True
            return
        if not (self.id or self.queued or self.fin_queued):
            self.reset()  # The peer never heard of it: there is nothing to say.
            return
        self.finish()
        self.let_go = True
        self._drop_inbox()

    def reset(self) -> None:
        """Abort both ways at once."""
        if self.aborted:
            return
        self.aborted = True
        self._drop_inbox()
        if not self.gone:
            if self.id and not self.flags_due & SYN:
                self._connection.control(WINDOW_UPDATE, RST, self.id, 0)
            self.cut_off("the stream was reset on this side")
        self._wake()

    # What follows is the connection's half.

    def deliver(self, chunk: bytes) -> None:
        """Take bytes that came; the window was checked when their frame's header was read."""
        if self.aborted:
            return
        if self.let_go:
            if self.recv_credit < self.window // 2:
                self.reset()
            return
        self.unread += len(chunk)
        inbox = self._inbox
        if len(chunk) < _SMALL_CHUNK and inbox:
            last = inbox[-1]
            if type(last) is bytearray and len(last) < _SHARED_CHUNK:
                last += chunk
            else:
                inbox.append(bytearray(chunk))
        else:
            inbox.append(chunk)
        self.on_readable()

    def end_receiving(self) -> None:
        """Take the peer's FIN."""
        self.ended = True
        self.on_readable()
        if self.fin_sent:
            self._connection.forget(self)

    def cut_off(self, reason: str, *, is_lost: bool = False) -> None:
        """End before its time: what is queued is lost, what came whole stays readable.

        Args:
            is_lost: the whole connection ended.
        """
        if self.gone:
            return
        self.cut = reason
        self._is_lost = is_lost
        self._connection.queued -= self.queued
        self.queued = 0
        self._outbox.clear()
        self._connection.forget(self)
        self._wake()

    def take(self, size: int, parts: list[bytes | memoryview]) -> None:
        """Move ``size`` queued bytes to ``parts``."""
        self.queued -= size
        self.send_credit -= size
        self._connection.queued -= size
        outbox = self._outbox
        while size:
            piece = outbox.popleft()
            if len(piece) > size:
                outbox.appendleft(piece[size:])
                piece = piece[:size]
            parts.append(piece)
            size -= len(piece)
        # Half empty, and not at each byte, so that a writer is woken for a good piece.
        if self.queued <= self._connection.limits.send_buffer // 2:
            self.on_writable()

    @property
    def sendable(self) -> bool:
        """Whether a data frame could be sent now."""
        if self.gone or not self.id:
            return False
        if self.queued:
            return self.send_credit > 0
        return self.fin_queued and not self.fin_sent

    def _check_cut(self) -> None:
        if self.cut is not None:
            raise LinkLost(self.cut) if self._is_lost else StreamReset(self.cut)

    def _pop(self, max_bytes: int) -> bytes:
        inbox = self._inbox
        first = inbox[0]
        if not self._taken and len(first) <= max_bytes:
            inbox.popleft()
            if inbox and len(first) + len(inbox[0]) <= max_bytes:
                parts = [first]
                size = len(first)
                while inbox and size + len(inbox[0]) <= max_bytes:
                    parts.append(inbox.popleft())
                    size += len(parts[-1])
                data = b"".join(parts)
            else:
                data = bytes(first)
        else:
            data = bytes(memoryview(first)[self._taken : self._taken + max_bytes])
            self._taken += len(data)
            if self._taken == len(first):
                inbox.popleft()
                self._taken = 0
            elif type(first) is bytearray and inbox[-1] is first:
                # Frozen: a half-read chunk must not grow without end.
                inbox[0] = bytes(memoryview(first)[self._taken :])
                self._taken = 0
        self.unread -= len(data)
        return data

    def _credit(self, size: int) -> None:
        self._consumed += size
        if self._consumed < self.window // 2:
            return
        credit = self._consumed
        self._consumed = 0
        if not self.unread:
            # The reader waits for the peer and not the other way round.
            credit += self._connection.grow(self)
        self.recv_credit += credit
        self.credit_due += credit
        self._connection.owe(self)

    def _drop_inbox(self) -> None:
        self._inbox.clear()
        self._taken = self.unread = 0

    def _wake(self) -> None:
        self.on_readable()
        self.on_writable()
