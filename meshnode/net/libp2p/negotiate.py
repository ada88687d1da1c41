"""multistream-select 1.0.0 on a stream or connection: small, strict and bounded.

The library's own reads messages of any length and lets bad UTF-8 escape as an exception that ends
the host. It also waits for the header's echo before it names a protocol; here both lines leave in
one write, so that opening costs one round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from meshnode.errors import PeerRefused, StreamReset, WireError

_HEADER = "/multistream/1.0.0"
_REFUSED = "na"
# Protocol IDs are some dozens of bytes; go-libp2p reads up to 1,024 too.
_MAX_LINE_BYTES = 1024
# A dialler that names this many protocols that we don't serve is looking for holes.
_MAX_PROPOSALS = 16


class Duplex(Protocol):
    """What protocols are chosen on: a muxed stream, or a connection that is not muxed yet."""

    async def receive_some(self, max_bytes: int, /) -> bytes: ...
    async def send_all(self, data: bytes, /) -> None: ...


async def propose(stream: Duplex, protocol_ids: Sequence[str]) -> str:
    """Ask for the first of ``protocol_ids`` that the other side serves, and return it.

    Raises:
        PeerRefused: it serves none of them.
        WireError: code ``bad_multistream``.
        StreamReset: the stream or its connection died meanwhile.
    """
    greeting = _encode(_HEADER)
    for protocol_id in protocol_ids:
        await stream.send_all(greeting + _encode(protocol_id))
        if greeting:
            greeting = b""
            if (header := await _read_line(stream)) != _HEADER:
                raise _bad(f"the stream begins with {header!r}")
        answer = await _read_line(stream)
        if answer == protocol_id:
            return protocol_id
        if answer != _REFUSED:
            raise _bad(f"the answer to {protocol_id} is {answer!r}")
    raise PeerRefused(f"the peer does not serve {' or '.join(protocol_ids)}")


def proposal(protocol_id: str) -> bytes:
    """Return what proposes one protocol at the beginning of a stream."""
    return _encode(_HEADER) + _encode(protocol_id)


async def confirm(stream: Duplex, protocol_id: str) -> None:
    """Read the answer to a ``proposal`` that left, and not a byte more.

    Raises:
        PeerRefused, WireError, StreamReset: as ``propose``.
    """
    header, agreed, refused = _encode(_HEADER), _encode(protocol_id), _encode(_REFUSED)
    # The first byte of the answer tells which of the two it can be.
    data = await read_exactly(stream, len(header) + 1)
    if data[:-1] != header:
        raise _bad(f"the stream begins with {data[:-1]!r}")
    expected = agreed if data[-1] == agreed[0] else refused
    answer = data[-1:]
    if answer == expected[:1]:
        answer += await read_exactly(stream, len(expected) - 1)
    if answer == agreed:
        return
    if answer != refused:
        raise _bad(f"the answer to {protocol_id} is {answer!r}")
    raise PeerRefused(f"the peer does not serve {protocol_id}")


class Responder:
    """The answering side. ``next_proposal`` until one suits, then ``accept``."""

    def __init__(self, stream: Duplex) -> None:
        self._stream = stream
        self._greeting = _encode(_HEADER)
        self._proposals = 0

    async def next_proposal(self) -> str:
        """Return the protocol ID that the other side asks for next.

        Raises:
            WireError: code ``bad_multistream``.
            StreamReset: the stream or its connection died meanwhile.
        """
        if self._greeting:
            # Said unasked, as every implementation does: some wait for it before they propose.
            await self._stream.send_all(self._greeting)
            self._greeting = b""
            if (header := await _read_line(self._stream)) != _HEADER:
                raise _bad(f"the stream begins with {header!r}")
        self._proposals += 1
        if self._proposals > _MAX_PROPOSALS:
            raise _bad(f"more than {_MAX_PROPOSALS} protocols were proposed")
        return await _read_line(self._stream)

    async def accept(self, protocol_id: str) -> None:
        """Agree to the protocol proposed last; what follows on the stream is its own."""
        await self._stream.send_all(_encode(protocol_id))

    async def settle_for(self, protocol_id: str) -> None:
        """Agree to ``protocol_id`` as soon as it is proposed, and to nothing else.

        Raises:
            WireError, StreamReset: as ``next_proposal``.
        """
        while await self.next_proposal() != protocol_id:
            await self.decline()
        await self.accept(protocol_id)

    async def decline(self) -> None:
        """Say that the protocol proposed last is not served. ("ls" lands here too: we don't.)"""
        await self._stream.send_all(_encode(_REFUSED))


def _encode(line: str) -> bytes:
    body = line.encode() + b"\n"
    length = len(body)
    if length < 0x80:
        return bytes((length,)) + body
    return bytes((length & 0x7F | 0x80, length >> 7)) + body


async def _read_line(stream: Duplex) -> str:
    """Read exactly one line: bytes behind it belong to the protocol chosen."""
    length = (await read_exactly(stream, 1))[0]
    if length & 0x80:
        high = (await read_exactly(stream, 1))[0]
        length = length & 0x7F | high << 7
    if not 1 <= length <= _MAX_LINE_BYTES:
        raise _bad(f"a line of {length} bytes")
    body = await read_exactly(stream, length)
    if body[-1:] != b"\n":
        raise _bad("a line without its end")
    try:
        return body[:-1].decode()
    except UnicodeDecodeError as exc:
        raise _bad("a line that is not UTF-8") from exc


async def read_exactly(stream: Duplex, count: int) -> bytes:
    """Return ``count`` bytes, and take no more.

    Raises:
        StreamReset: the stream ended, or died, before.
    """
    data = await stream.receive_some(count) if count else b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data)) if data else b""
        if not more:
            raise StreamReset("the stream ended inside a message")
        data += more
    return data


def _bad(what: str) -> WireError:
    return WireError("bad_multistream", f"multistream-select: {what}"[:300])
