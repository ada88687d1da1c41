"""One connection of a client: heads and bodies read within limits, answers written."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import trio

from meshnode.errors import StreamClosed, StreamReset
from meshnode.http.gateway.bodies import Body, BodyError, ChunkedBody, LengthBody
from meshnode.http.gateway.heads import BadRequest, RequestHead, check_beginning, parse_request
from meshnode.net.tcp_stream import TcpStream

_READ_BYTES = 64 * 1024
# After an answer that closes: how long the client may take to read it and close.
_DRAIN_LIMIT = 2.0  # seconds
# What it may still send meanwhile: closing on unread bytes would destroy the answer.
_DRAIN_BYTES = 64 * 1024 * 1024


class ClientGone(Exception):
    """The client closed or cut its connection."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """How long clients may take, and how much they may send."""

    head_timeout: float = 15.0  # seconds, from a request's first byte to the end of its head
    keep_alive: float = 75.0  # seconds between requests; longer than most clients keep theirs
    body_pause: float = 30.0  # seconds without a byte of a body that is being read
    body_timeout: float = 600.0  # seconds for a whole body that is read before it is routed
    body_bytes: int = 32 * 1024 * 1024  # of a body that is read before it is routed


class Client:
    """One connection. ``is_busy`` while a request is under way, for the watch.

    Args:
        stream: the accepted connection; the caller closes it.
    """

    def __init__(self, stream: TcpStream, limits: ClientLimits) -> None:
        self.stream = stream
        self.limits = limits
        # Ends with the client: one for all of its requests, as a scope costs as much as its parse.
        self.connection = trio.CancelScope()
        self.scope: trio.CancelScope | None = None  # the same, while a request is under way
        self.is_gone = False
        self.is_last = False  # the request under way, or the next one, is the connection's last
        # Since when no byte of a request has come, and none is under way; trio.current_time().
        self.quiet_since: float | None = None
        self._unread = b""

    @property
    def is_busy(self) -> bool:
        return self.scope is not None

    @property
    def waiting(self) -> int:
        """Bytes that came and were not read."""
        return len(self._unread)

    @property
    def has_unread(self) -> bool:
        """Whether bytes came that belong to no request yet."""
        return bool(self._unread)

    def on_gone(self) -> None:
        if self.scope is not None:
            self.is_gone = True
            self.scope.cancel()

    def begin_request(self) -> None:
        """From here on the client's leaving ends what is done for it."""
        self.scope = self.connection

    async def read_head(self) -> RequestHead | None:
        """Return the next request's head; None where no further request comes.

        For its first byte it waits until the connection is closed: ``quiet_since`` tells since
        when, for whoever closes those that are quiet for too long.

        Raises:
            BadRequest: it is not acceptable, or did not come in time (408).
            ClientGone: the client cut the connection in the middle of it.
        """
        data = _without_blank_lines(self.take_unread())
        while not data:
            self.quiet_since = trio.current_time()
            data = await self._receive()
            self.quiet_since = None
            if not data:
                return None
            data = _without_blank_lines(data)
        end = data.find(b"\r\n\r\n")
        if end < 0:  # seldom: nearly all come whole, and need no deadline
            data, end = await self._read_rest_of_head(data)
        self._unread = data[end + 4 :]
        return parse_request(data[:end])

    async def _read_rest_of_head(self, data: bytes) -> tuple[bytes, int]:
        """Return what came up to the end of a head and maybe more, and where that end is."""
        limit = self.limits.head_timeout
        with trio.move_on_after(limit):
            while (end := data.find(b"\r\n\r\n")) < 0:
                if len(data) > 2:
                    check_beginning(data)
                more = await self._receive()
                if not more:
                    raise ClientGone
                data = _without_blank_lines(data + more)
            return data, end
        if not data:
            raise ClientGone  # an empty line was all that came
        raise BadRequest(408, f"no whole request within {limit:g} s", "timeout")

    def body_of(self, head: RequestHead) -> RequestBody:
        """Return the body that follows ``head``."""
        framing = ChunkedBody() if head.chunked else LengthBody(head.length or 0)
        return RequestBody(self, framing)

    async def send(self, data: bytes) -> None:
        """Send all of ``data``. Raises ClientGone."""
        try:
            await self.stream.send_all(data)
        except (StreamReset, StreamClosed) as exc:
            raise ClientGone from exc

    def send_now(self, data: bytes) -> bytes:
        """Send what the kernel takes without waiting; return what is left. Raises ClientGone."""
        try:
            return data[self.stream.send_now(data) :]
        except (StreamReset, StreamClosed) as exc:
            raise ClientGone from exc

    async def end(self) -> None:
        """Close so that what was sent can be read to its end."""
        self.scope = None  # its leaving is what is waited for
        with contextlib.suppress(StreamReset, StreamClosed):
            with trio.move_on_after(_DRAIN_LIMIT):
                await self.stream.send_eof()
                drained = 0
                while drained < _DRAIN_BYTES and (
                    data := await self.stream.receive_some(_READ_BYTES)
                ):
                    drained += len(data)
        self.stream.close()

    def unread(self, data: bytes) -> None:
        """Put back what came behind a body."""
        self._unread = data + self._unread

    def take_unread(self) -> bytes:
        """Return what came behind the last head and was not read."""
        data, self._unread = self._unread, b""
        return data

    async def receive(self) -> bytes:
        """Return what comes next, ``b""`` at the client's end. Raises ClientGone."""
        return self.take_unread() or await self._receive()

    async def _receive(self) -> bytes:
        try:
            return await self.stream.receive_some(_READ_BYTES)
        except (StreamReset, StreamClosed) as exc:
            raise ClientGone from exc


def _without_blank_lines(data: bytes) -> bytes:
    """Return what follows empty lines: some clients send one too many behind a body."""
    while data[:2] == b"\r\n":
        data = data[2:]
    return data


class RequestBody:
    """The body of one request, read piece by piece."""

    def __init__(self, client: Client, framing: Body) -> None:
        self._client = client
        self._framing = framing

    @property
    def done(self) -> bool:
        return self._framing.done

    async def read(self) -> bytes:
        """Return the next bytes of it, ``b""`` at its end.

        Raises:
            BadRequest: its framing is broken (400), or nothing came in time (408).
            ClientGone: the client cut the connection.
        """
        framing = self._framing
        while not framing.done:
            with trio.move_on_after(self._client.limits.body_pause) as pause:
                data = await self._client.receive()
            if pause.cancelled_caught:
                raise BadRequest(408, "the body stopped coming", "timeout")
            if not data:
                raise ClientGone
            try:
                payload = framing.feed(data)
            except BodyError as exc:
                raise BadRequest(400, f"the body is malformed: {exc}") from exc
            if framing.done:
                self._client.unread(framing.rest)
            if payload:
                return payload
        return b""

    async def read_whole(self, limit: int) -> bytes:
        """Return all of it.

        Raises:
            BadRequest: as ``read``, and 413 for more than ``limit`` bytes.
            ClientGone: the client cut the connection.
        """
        whole = self._here(limit)
        if whole is not None:
            return whole
        pieces: list[bytes] = []
        size = 0
        with trio.move_on_after(self._client.limits.body_timeout):
            while piece := await self.read():
                size += len(piece)
                if size > limit:
                    raise BadRequest(413, f"the body is more than {limit} bytes", "too_large")
                pieces.append(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        raise BadRequest(408, "the body took too long to come", "timeout")

    def _here(self, limit: int) -> bytes | None:
        """Return the body if all of it came with its head, as that of a small request does."""
        framing = self._framing
        if not isinstance(framing, LengthBody) or not framing.is_in(self._client.waiting):
            return None
        payload = framing.feed(self._client.take_unread())
        self._client.unread(framing.rest)
        return payload if len(payload) <= limit else None
