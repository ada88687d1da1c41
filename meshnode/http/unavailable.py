"""The answer to a client that nobody can serve: 503, readable whole, then a clean close.

An answer written while the client still sends its request is lost: closing a socket with unread
bytes makes the kernel send RST, which throws away what the client has not read yet. So the whole
request is read first. A client that speaks something other than HTTP is only closed.
"""

from __future__ import annotations

import contextlib
import re
from enum import Enum

import h11
import trio

from meshnode.net.federation_entry import Refusal

# Longer than any patient upload on a LAN; after it the answer is sent whatever is still missing.
REQUEST_LIMIT = 10.0  # seconds
# A prompt with images is some MiB. What goes beyond is drained, but not waited for to its end.
REQUEST_BYTES = 32 * 1024 * 1024
# How long the client may take to read the answer and close; it is on its way by then.
DRAIN_LIMIT = 2.0  # seconds
RETRY_AFTER = 5  # seconds

_CHUNK = 65_536
# The text that LocalAI's users and their scripts know.
_PAGE = b"<html><body><h1>Sorry, waiting for nodes to connect</h1></body></html>"
# Where a method may end: no registered method is longer than 17 characters.
_METHOD_BYTES = 32
_START_LINE_BYTES = 16_384
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_START_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [^\s]+ HTTP/1\.[01]\r?")


class _Speaks(Enum):
    HTTP = "http"
    OTHER = "other"
    UNKNOWN = "unknown"  # too little came to tell


def looks_like_http(first: bytes) -> bool:
    """Say whether a connection that begins with these bytes speaks HTTP/1."""
    return _judge(first.lstrip(b"\r\n")) is _Speaks.HTTP


async def refuse(stream: trio.abc.HalfCloseableStream, refusal: Refusal) -> None:
    """Answer a client of the entry point that nobody can serve; see ``answer_unavailable``."""
    await answer_unavailable(
        stream,
        refusal.reason,
        retry_after=refusal.retry_after or RETRY_AFTER,
        already_read=refusal.already_read,
    )


async def answer_unavailable(
    stream: trio.abc.HalfCloseableStream,
    reason: str = "",
    *,
    retry_after: int = RETRY_AFTER,
    already_read: bytes = b"",
) -> None:
    """Answer the client's request with 503 and close; never raises for what the client does.

    Args:
        stream: the client's connection; closed at the end.
        reason: why, for people; goes into the header ``X-Meshnode-Reason``.
        retry_after: seconds, for the header ``Retry-After``.
        already_read: what was read of the request before.
    """
    try:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            method = await _read_request(stream, already_read)
            if method is not None:
                await _answer_and_drain(stream, _answer(method, reason, retry_after))
    finally:
        await trio.aclose_forcefully(stream)


async def _read_request(stream: trio.abc.HalfCloseableStream, already_read: bytes) -> bytes | None:
    """Return the method of the request once it is read; None if it is none."""
    opening = _Opening()
    body_length = 0
    parser = h11.Connection(h11.SERVER)
    method = b"GET"
    with trio.move_on_after(REQUEST_LIMIT):
        while body_length < REQUEST_BYTES:
            data = already_read or await stream.receive_some(_CHUNK)
            already_read = b""
            if opening.feed(data) is _Speaks.OTHER or (not data and not opening.is_http):
                return None
            body_length += len(data)
            try:
                parser.receive_data(bytes(data))
                for event in _events(parser):
                    if isinstance(event, h11.Request):
                        method = event.method
                    if (
                        isinstance(event, h11.EndOfMessage)
                        or parser.they_are_waiting_for_100_continue
                    ):
                        return method
            except h11.RemoteProtocolError:
                return method  # broken, but HTTP: it can read an answer
            if not data:
                return method
    return method if opening.is_http else None


class _Opening:
    """The first bytes of a connection, until they tell which protocol it speaks."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._verdict = _Speaks.UNKNOWN

    @property
    def is_http(self) -> bool:
        return self._verdict is _Speaks.HTTP

    def feed(self, data: bytes | bytearray) -> _Speaks:
        if self._verdict is _Speaks.UNKNOWN:
            self._seen += data
            self._verdict = _judge(bytes(self._seen).lstrip(b"\r\n"))
        return self._verdict


def _judge(seen: bytes) -> _Speaks:
    line, newline, _ = seen.partition(b"\n")
    if newline:
        return _Speaks.HTTP if _START_LINE.fullmatch(line) else _Speaks.OTHER
    method, space, _ = seen.partition(b" ")
    if method and not _METHOD.fullmatch(method):
        return _Speaks.OTHER  # a TLS handshake, for one, is told by its first byte
    if (not space and len(method) > _METHOD_BYTES) or len(seen) > _START_LINE_BYTES:
        return _Speaks.OTHER
    return _Speaks.UNKNOWN


def _events(parser: h11.Connection) -> list[object]:
    events: list[object] = []
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA or event is h11.PAUSED:
            return events
        events.append(event)
        if isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return events


def _answer(method: bytes, reason: str, retry_after: int) -> bytes:
    lines = [
        b"HTTP/1.1 503 Service Unavailable",
        b"Content-Type: text/html; charset=utf-8",
        b"Content-Length: %d" % len(_PAGE),
        b"Retry-After: %d" % retry_after,
        b"Connection: close",
    ]
    if reason:
        # A reason may quote names that peers chose: nothing of them may end the line.
        printable = "".join(c if " " <= c <= "~" else "?" for c in reason[:200])
        lines.append(b"X-Meshnode-Reason: " + printable.encode("ascii"))
    page = b"" if method == b"HEAD" else _PAGE
    return b"\r\n".join(lines) + b"\r\n\r\n" + page


async def _answer_and_drain(stream: trio.abc.HalfCloseableStream, answer: bytes) -> None:
    with trio.move_on_after(DRAIN_LIMIT):
        await stream.send_all(answer)
        await stream.send_eof()
        while await stream.receive_some(_CHUNK):
            continue
