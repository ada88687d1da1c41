"""The tunnel protocol: requests for a service, one after another, each with its bytes both ways.

Two laws hold here. A body that ends without its end marker was cut, whatever the transport says:
muxers of other implementations report a dead connection as a plain end, and an answer that was
cut short must never look whole. And bytes that come outside of a request are never taken for
another one's: an answer that is longer than it said must not become the next answer's beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import Literal, NamedTuple

from pydantic import Field

from meshnode.core.wire import (
    FRAME_ERROR_CODES,
    FRAME_HEADER_BYTES,
    Text64,
    Text256,
    Uint64,
    WireModel,
    decode_model,
    encode_frame,
    encode_model,
)
from meshnode.errors import WireError

PROTOCOL_ID = "/meshnode/tunnel/2.0.0"
MAX_HEADER_BYTES = 2048  # of a request's or reply's body; 256 four-byte characters and their keys

# With its two bytes of mark, and yamux's 12, the largest chunk fills one noise frame (65,519).
MAX_CHUNK_BYTES = 65_505
MARK_BYTES = 2
END = b"\x00\x00"  # nothing more this way, of this request
DONE = b"\xff\xfe"  # the dialler is done with the request
HEADER = b"\xff\xff"  # a frame follows: a request, or a reply

_END, _DONE, _HEADER = (int.from_bytes(mark, "big") for mark in (END, DONE, HEADER))

ERROR_CODES = FRAME_ERROR_CODES | {"bad_mark", "out_of_turn", "after_end", "cut"}

Status = Literal["ok", "busy", "draining", "no_such_service", "backend_unreachable", "unhealthy"]


class TunnelRequest(WireModel):
    """Begins a request: the service wanted. It can never name an address."""

    service_id: Text64 = Field(alias="ServiceID", min_length=1)
    # Not over a connection to the backend that an earlier request used: the backend may be about
    # to close that one, and then nobody knows whether it took the request.
    fresh: bool = Field(default=False, alias="Fresh")


class TunnelReply(WireModel):
    """Answers a request: whether the service's bytes follow, and numbers to route by."""

    status: Status = Field(alias="Status")
    # Requests that others than the asking peer hold on this service here.
    in_flight: Uint64 = Field(default=0, alias="InFlight")
    available_vram: Uint64 = Field(default=0, alias="AvailableVRAM")  # bytes; 0 = unknown
    message: Text256 = Field(default="", alias="Message")  # for people and logs


def encode_request(request: TunnelRequest) -> bytes:
    """Return the body of the request's frame."""
    return encode_model(request, MAX_HEADER_BYTES)


@lru_cache(maxsize=64)  # a mesh has a handful of services
def opening(service_id: str, *, fresh: bool) -> bytes:
    """Return the item that begins a request."""
    return encode_header(encode_request(TunnelRequest(service_id=service_id, fresh=fresh)))


# A peer that sends others than these in turn only pays for its own parsing.
@lru_cache(maxsize=64)
def decode_request(body: bytes) -> TunnelRequest:
    """Return the request; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(TunnelRequest, body, MAX_HEADER_BYTES)


def encode_reply(reply: TunnelReply) -> bytes:
    """Return the body of the reply's frame."""
    return encode_model(reply, MAX_HEADER_BYTES)


@lru_cache(maxsize=256)  # free memory and load change seldom between two requests
def decode_reply(body: bytes) -> TunnelReply:
    """Return the reply; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(TunnelReply, body, MAX_HEADER_BYTES)


def encode_header(body: bytes) -> bytes:
    """Return the body of a request or reply as an item of the stream."""
    return HEADER + encode_frame(body)


def encode_chunk(payload: bytes) -> bytes:
    """Return one chunk of 1 to ``MAX_CHUNK_BYTES`` bytes; nothing in it would mean the end.

    Raises:
        ValueError: too few or too many bytes.
    """
    if not 1 <= len(payload) <= MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk holds 1 to {MAX_CHUNK_BYTES} bytes, not {len(payload)}")
    return len(payload).to_bytes(MARK_BYTES, "big") + payload


def encode_chunks(data: bytes) -> Iterator[bytes]:
    """Yield ``data``, of any length, as chunks; none if it is empty."""
    if len(data) <= MAX_CHUNK_BYTES:  # the common case, without another copy
        if data:
            yield encode_chunk(data)
        return
    for start in range(0, len(data), MAX_CHUNK_BYTES):
        yield encode_chunk(data[start : start + MAX_CHUNK_BYTES])


class Header(NamedTuple):
    """A request or a reply, not decoded yet."""

    body: bytes


class Mark(Enum):
    """An item without a payload."""

    END = END
    DONE = DONE


Item = bytes | Header | Mark


class _Turn(Enum):
    """Whose turn it is, in one direction of a tunnel."""

    QUIET = "quiet"  # no request is open
    ASKED = "asked"  # its reply is due; of the server's direction only
    OPEN = "open"  # its bytes may come
    ENDED = "ended"  # END came: no more of its bytes


class _ItemDecoder:
    """Takes one direction of a tunnel apart, and holds it to its turns.

    Passes on whatever part of a chunk has come, so it adds no delay, and holds a header at most.
    """

    def __init__(self) -> None:
        self._left = 0  # bytes still to come of the present chunk
        self._partial = b""  # of a mark or of a header
        self._turn = _Turn.QUIET

    def feed(self, data: bytes) -> list[Item]:
        """Return what is in the next bytes of the stream, in order; payloads as plain bytes.

        Raises:
            WireError: ``bad_mark``: a length above ``MAX_CHUNK_BYTES`` that is no mark.
                ``too_large``: a header's. ``out_of_turn``: an item outside of its request.
                ``after_end``: bytes behind END. In any case reset the stream.
        """
        if self._partial:
            data = self._partial + data
            self._partial = b""
        items: list[Item] = []
        at, size = 0, len(data)
        while at < size:
            if self._left:
                stop = min(at + self._left, size)
                items.append(data[at:stop])
                self._left -= stop - at
                at = stop
                continue
            if size - at < MARK_BYTES:
                self._partial = data[at:]
                break
            mark = data[at] << 8 | data[at + 1]
            if 0 < mark <= MAX_CHUNK_BYTES:
                self._on_chunk()
                self._left = mark
            elif mark == _HEADER:
                body = _header_at(data, at + MARK_BYTES)
                if body is None:
                    self._partial = data[at:]
                    break
                self._on_header()
                items.append(Header(body))
                at += FRAME_HEADER_BYTES + len(body)
            elif mark == _END:
                self._on_end(items)
            elif mark == _DONE:
                self._on_done(items)
            else:
                raise WireError("bad_mark", f"a chunk of {mark} bytes is more than the limit")
            at += MARK_BYTES
        return items

    def finish(self) -> None:
        """Say that the stream ended.

        Raises:
            WireError: ``truncated``: inside a header. ``cut``: a request was open, and its body
                is not whole.
        """
        if self._partial[:MARK_BYTES] == HEADER:
            raise WireError("truncated", "the stream ended inside a header")
        if self._partial or self._turn in (_Turn.OPEN, _Turn.ASKED):
            raise WireError("cut", "the stream ended without the end of the body")

    def _on_chunk(self) -> None:
        if self._turn is _Turn.OPEN:
            return
        if self._turn is _Turn.ENDED:
            raise WireError("after_end", "bytes came after the end of the body")
        raise WireError("out_of_turn", "bytes came outside of a request")

    def _on_header(self) -> None:
        raise NotImplementedError

    def _on_end(self, items: list[Item]) -> None:
        if self._turn is _Turn.ENDED:
            raise WireError("after_end", "a second end of the body came")
        if self._turn is not _Turn.OPEN:
            raise WireError("out_of_turn", "an end came outside of a request")
        self._turn = _Turn.ENDED
        items.append(Mark.END)

    def _on_done(self, items: list[Item]) -> None:
        raise NotImplementedError


class RequestDecoder(_ItemDecoder):
    """What the dialler sends: ``Header``, its bytes, ``END`` if it half-closes, then ``DONE``."""

    def _on_header(self) -> None:
        if self._turn is not _Turn.QUIET:
            raise WireError("out_of_turn", "a request came before the one before it was done")
        self._turn = _Turn.OPEN

    def _on_done(self, items: list[Item]) -> None:
        if self._turn is _Turn.QUIET:
            raise WireError("out_of_turn", "no request was open that could be done")
        self._turn = _Turn.QUIET
        items.append(Mark.DONE)


class ReplyDecoder(_ItemDecoder):
    """What the server sends, for a dialler that says when it asks and when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self._late_end = False  # an END of the request before may still be on its way

    @property
    def is_quiet(self) -> bool:
        """Whether nothing of a request is open, so that another can begin."""
        return self._turn is _Turn.QUIET and not (self._left or self._partial)

    def ask(self) -> None:
        """Say that a request leaves now."""
        assert self._turn is _Turn.QUIET
        self._turn = _Turn.ASKED

    def done(self) -> None:
        """Say that nothing more is wanted of the request, whose reply has come."""
        self._late_end = self._turn is _Turn.OPEN
        self._turn = _Turn.QUIET

    def _on_header(self) -> None:
        if self._turn is not _Turn.ASKED:
            raise WireError("out_of_turn", "a reply came that nobody asked for")
        self._turn = _Turn.OPEN
        self._late_end = False

    def _on_end(self, items: list[Item]) -> None:
        if self._late_end and self._turn in (_Turn.QUIET, _Turn.ASKED):
            # The backend closed right behind its answer: END and DONE met on the way.
            self._late_end = False
            return
        super()._on_end(items)

    def _on_done(self, items: list[Item]) -> None:
        raise WireError("out_of_turn", "the server said that a request is done")


def _header_at(data: bytes, at: int) -> bytes | None:
    """Return the body of the frame at ``at``, or None while it is not whole."""
    start = at + FRAME_HEADER_BYTES
    if len(data) < start:
        return None
    length = int.from_bytes(data[at:start], "big")
    if length > MAX_HEADER_BYTES:
        raise WireError(
            "too_large", f"a header of {length} bytes is more than the {MAX_HEADER_BYTES} allowed"
        )
    body = data[start : start + length]
    return body if len(body) == length else None
