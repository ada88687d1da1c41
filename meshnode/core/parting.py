"""The parting protocol: one side asks whether a link is still needed, the other says.

The law here: a link is closed as surplus only after its other end agreed to it, so that nobody's
last links are closed by those who have enough.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from meshnode.core.wire import (
    FRAME_ERROR_CODES,
    Text256,
    Uint64,
    WireModel,
    decode_model,
    encode_model,
)

PROTOCOL_ID = "/meshnode/parting/1.0.0"
MAX_BYTES = 2048  # of a body: 256 four-byte characters and their keys
TIMEOUT = 3  # seconds for the whole exchange, on either side
AGREED_FOR = 3  # seconds after an "ok" in which the end of the link is no loss

ERROR_CODES = FRAME_ERROR_CODES

Answer = Literal["ok", "in_use", "needed"]


class PartingRequest(WireModel):
    """Asker to peer: this link is surplus here; is it to you?"""

    links: Uint64 = Field(default=0, alias="Links")  # that the asker has; for logs


class PartingReply(WireModel):
    """Peer to asker, once: whether the link may be closed."""

    answer: Answer = Field(alias="Answer")
    message: Text256 = Field(default="", alias="Message")  # for people and logs


def encode_request(request: PartingRequest) -> bytes:
    """Return the body of the request's frame."""
    return encode_model(request, MAX_BYTES)


def decode_request(body: bytes) -> PartingRequest:
    """Return the request; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(PartingRequest, body, MAX_BYTES)


def encode_reply(reply: PartingReply) -> bytes:
    """Return the body of the reply's frame."""
    return encode_model(reply, MAX_BYTES)


def decode_reply(body: bytes) -> PartingReply:
    """Return the reply; raises ``WireError`` ``too_large``, ``bad_msgpack``, ``bad_field``."""
    return decode_model(PartingReply, body, MAX_BYTES)
