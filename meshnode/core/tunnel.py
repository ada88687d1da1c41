"""The tunnel protocol: who asks for which service, the answer, and bytes with an explicit end.

The law here: a body that ends without its end marker was cut, whatever the transport says.
Muxers of other implementations report a dead connection as a plain end, and an answer that was
cut short must never look whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from meshnode.core.wire import (
    FRAME_ERROR_CODES,
    Text64,
    Text256,
    Uint64,
    WireModel,
    decode_model,
    encode_model,
)
from meshnode.errors import WireError

PROTOCOL_ID = "/meshnode/tunnel/1.0.0"
MAX_HEADER_BYTES = 2048  # of a request's or reply's body; 256 four-byte characters and their keys

# With its two bytes of length, and yamux's 12, the largest chunk fills one noise frame (65,519).
MAX_CHUNK_BYTES = 65_505
CHUNK_HEADER_BYTES = 2
END = b"\x00\x00"

ERROR_CODES = FRAME_ERROR_CODES | {"bad_chunk", "after_end", "cut"}

Status = Literal["ok", "busy", "draining", "no_such_service", "backend_unreachable", "unhealthy"]


class TunnelRequest(WireModel):
    """Dialler to server, first: the service wanted. It can never name an address."""

    service_id: Text64 = Field(alias="ServiceID", min_length=1)


class TunnelReply(WireModel):
    """Server to dialler, once: whether the service's bytes follow, and numbers to route by."""

    status: Status = Field(alias="Status")
    # Requests that others than the asking peer hold on this service here.
    in_flight: Uint64 = Field(default=0, alias="InFlight")
    available_vram: Uint64 = Field(default=0, alias="AvailableVRAM")  # bytes; 0 = unknown
    message: Text256 = Field(default="", alias="Message")  # for people and logs


def encode_request(request: TunnelRequest) -> bytes:
    """Return the body of the request's frame."""
    return encode_model(request, MAX_HEADER_BYTES)


def decode_request(body: bytes) -> TunnelRequest:
    """Return the request; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(TunnelRequest, body, MAX_HEADER_BYTES)


def encode_reply(reply: TunnelReply) -> bytes:
    """Return the body of the reply's frame."""
    return encode_model(reply, MAX_HEADER_BYTES)


def decode_reply(body: bytes) -> TunnelReply:
    """Return the reply; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(TunnelReply, body, MAX_HEADER_BYTES)


def encode_chunk(payload: bytes) -> bytes:
    """Return one chunk of 1 to ``MAX_CHUNK_BYTES`` bytes; nothing in it would mean the end.

    Raises:
        ValueError: too few or too many bytes.
    """
    if not 1 <= len(payload) <= MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk holds 1 to {MAX_CHUNK_BYTES} bytes, not {len(payload)}")
    return len(payload).to_bytes(CHUNK_HEADER_BYTES, "big") + payload


def encode_chunks(data: bytes) -> Iterator[bytes]:
    """Yield ``data``, of any length, as chunks; none if it is empty."""
    if len(data) <= MAX_CHUNK_BYTES:  # the common case, without another copy
        if data:
            yield encode_chunk(data)
        return
    for start in range(0, len(data), MAX_CHUNK_BYTES):
        yield encode_chunk(data[start : start + MAX_CHUNK_BYTES])


class ChunkDecoder:
    """Takes the chunk lengths out of one direction of a tunnel.

    Passes on whatever part of a chunk has come, so it holds one byte at most, and adds no delay.
    """

    def __init__(self) -> None:
        self._left = 0  # bytes still to come of the present chunk
        self._half_header = b""  # the first of a length's two bytes
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the clean end has been read."""
        return self._ended

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payload in the next bytes of the stream, in order; then look at ``ended``.

        Raises:
            WireError: ``bad_chunk``: a length above ``MAX_CHUNK_BYTES``. ``after_end``: bytes
                behind the clean end. Either way reset the stream.
        """
        if self._half_header:
            data = self._half_header + data
            self._half_header = b""
        pieces: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
            elif self._ended:
                raise WireError("after_end", "bytes came after the end of the body")
            elif size - at < CHUNK_HEADER_BYTES:
                self._half_header = data[at:]
                break
            else:
                self._begin_chunk(int.from_bytes(data[at : at + CHUNK_HEADER_BYTES], "big"))
                at += CHUNK_HEADER_BYTES
        return pieces

    def finish(self) -> None:
        """Say that the stream ended.

        Raises:
            WireError: ``cut``: it ended without the end marker, so the body is not whole.
        """
        if not self._ended:
            raise WireError("cut", "the stream ended without the end of the body")

    def _begin_chunk(self, length: int) -> None:
        if length > MAX_CHUNK_BYTES:
            raise WireError(
                "bad_chunk", f"a chunk of {length} bytes is more than {MAX_CHUNK_BYTES}"
            )
        self._left = length
        self._ended = length == 0
