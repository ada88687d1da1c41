"""Bodies of HTTP/1.1 messages taken out of their framing, and put into chunks; no I/O."""

from __future__ import annotations

import re
from enum import Enum
from typing import Protocol

# A size, and an extension that nobody uses: more is an attempt to make us keep it.
_MAX_LINE_BYTES = 256
_MAX_TRAILER_BYTES = 8 * 1024
# 16 hexadecimal digits could be more than any integer of an engine in C.
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")

LAST_CHUNK = b"0\r\n\r\n"


class BodyError(Exception):
    """The body's framing is broken, or it ended before its time."""


class Body(Protocol):
    """Takes what comes behind a head, and gives the payload."""

    done: bool  # the whole body came
    rest: bytes  # what came behind its end

    def feed(self, data: bytes) -> bytes:
        """Return the payload in ``data``. Raises BodyError."""

    def finish(self) -> None:
        """Say that the connection ended. Raises BodyError where more was to come."""


class LengthBody:
    """A body of known length."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.rest = b""

    def is_in(self, size: int) -> bool:
        """Whether ``size`` bytes hold all that is left of it, and that is something."""
        return 0 < self._left <= size

    def feed(self, data: bytes) -> bytes:
        if len(data) < self._left:
            self._left -= len(data)
            return data
        payload, self.rest = data[: self._left], data[self._left :]
        self._left = 0
        self.done = True
        return payload

    def finish(self) -> None:
        if not self.done:
            raise BodyError(f"the body ended {self._left} bytes before its length")


class EofBody:
    """A body that goes on until the connection ends."""

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def finish(self) -> None:
        self.done = True


class _At(Enum):
    SIZE = "size"
    DATA = "data"
    DATA_END = "data end"
    TRAILER = "trailer"


class ChunkedBody:
    """A chunked body; extensions and trailers are checked and dropped."""

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._at = _At.SIZE
        self._left = 0  # bytes of the present chunk
        self._held = b""  # the beginning of a line
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        if self._held:
            data = self._held + data
            self._held = b""
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while not self.done:
            if self._at is _At.DATA:
                stop = min(at + self._left, size)
                if stop > at:
                    pieces.append(data[at:stop])
                self._left -= stop - at
                at = stop
                if self._left:
                    break
                self._at = _At.DATA_END
            if self._at is _At.DATA_END:
                ending = data[at : at + 2]
                if ending != b"\r\n":
                    if ending not in (b"", b"\r"):
                        raise BodyError("a chunk is not as long as its size says")
                    self._held = ending
                    break
                at += 2
                self._at = _At.SIZE
            end = data.find(b"\r\n", at, at + _MAX_LINE_BYTES)
            if end < 0:
                self._hold(data[at:])
                break
            if self._at is _At.SIZE:
                self._begin_chunk(data, at, end)
            else:
                self._take_trailer(data[at:end])
            at = end + 2
        if self.done:
            self.rest = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def finish(self) -> None:
        if not self.done:
            raise BodyError("the body ended before its last chunk")

    def _hold(self, line: bytes) -> None:
        if len(line) >= _MAX_LINE_BYTES or b"\n" in line:
            raise BodyError("a line of the chunked body is too long, or ends without CR")
        self._held = line

    def _begin_chunk(self, data: bytes, at: int, end: int) -> None:
        match = _SIZE_LINE.fullmatch(data, at, end)
        if match is None:
            raise BodyError("the size of a chunk is no hexadecimal number")
        self._left = int(match[1], 16)
        self._at = _At.DATA if self._left else _At.TRAILER

    def _take_trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
            return
        self._trailer_bytes += len(line)
        if not _TRAILER.fullmatch(line) or self._trailer_bytes > _MAX_TRAILER_BYTES:
            raise BodyError("a trailer is malformed, or there are too many")


def encode_chunk(payload: bytes) -> bytes:
    """Return ``payload`` as one chunk; nothing if it is empty, as that would be the end."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
