"""Length-prefixed protobuf messages, read without reading ahead.

What follows the last message on a stream may be another protocol's, so not one byte more than the
message is taken from it.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from meshnode.errors import WireError
from meshnode.net.libp2p.negotiate import read_exactly
from meshnode.net.mesh import ByteStream

# The bound of the specifications of circuit relay v2 and AutoNAT.
MAX_MESSAGE_BYTES = 4096
_MAX_LENGTH_BYTES = 2  # a varint of two bytes reaches 16,383

M = TypeVar("M", bound=Message)


def encode_message(message: Message) -> bytes:
    """Return ``message`` behind its length.

    Raises:
        WireError: ``too_large``: no reader would take it.
    """
    body = message.SerializeToString()
    length = len(body)
    if length > MAX_MESSAGE_BYTES:
        raise WireError("too_large", f"a message of {length} bytes")
    prefix = bytes((length,)) if length < 0x80 else bytes((length & 0x7F | 0x80, length >> 7))
    return prefix + body


async def read_message(stream: ByteStream, kind: type[M]) -> M:
    """Return the next message.

    Raises:
        WireError: ``too_large`` or ``bad_message``.
        StreamReset: the stream or its connection ended before.
    """
    length = shift = 0
    for _ in range(_MAX_LENGTH_BYTES):
        byte = (await read_exactly(stream, 1))[0]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    else:
        raise WireError("too_large", f"more than {MAX_MESSAGE_BYTES} bytes in one message")
    if length > MAX_MESSAGE_BYTES:
        raise WireError("too_large", f"a message of {length} bytes")
    message = kind()
    try:
        message.ParseFromString(await read_exactly(stream, length))
    except DecodeError as exc:
        raise WireError("bad_message", f"no {kind.__name__}") from exc
    return message
