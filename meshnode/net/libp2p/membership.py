"""The membership exchange carried over one stream, before anything else is served."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

import trio

from meshnode.core import membership as protocol
from meshnode.core.wire import FrameDecoder, encode_frame
from meshnode.errors import MeshError, PeerRefused, StreamReset, TokenRefused, WireError
from meshnode.net.mesh import MeshStream

PROTOCOL_ID = protocol.PROTOCOL_ID
# The listener already has a connection to this dialler, which itself may not know it yet.
DUPLICATE = "duplicate"


class DuplicateConnection(PeerRefused):
    """The peer says that the two of us are connected already."""


async def prove_as_dialler(stream: MeshStream, keys: tuple[bytes, ...], own_id: str) -> bytes:
    """Prove membership to the peer that was dialled, and have it proven; return the key's ID.

    Raises:
        TokenRefused: the tokens differ.
        DuplicateConnection: another connection to the same peer stands already.
        PeerRefused: the listener refused for another reason.
        WireError: the listener broke the protocol.
        StreamReset: the connection died meanwhile.
    """
    side = protocol.DiallerSide(keys, own_id, stream.peer_id, _nonce())
    channel = _Channel(stream)
    await channel.send(side.hello())
    while side.outcome is None:
        message = await channel.receive()
        if isinstance(message, protocol.Refusal) and message.code == DUPLICATE:
            raise DuplicateConnection(f"peer {stream.peer_id} is connected to this node already")
        reply = side.receive(message)
        if reply is not None:
            await channel.send(reply)
    await stream.send_eof()
    return side.check()


async def prove_as_listener(
    stream: MeshStream,
    keys: tuple[bytes, ...],
    own_id: str,
    *,
    objection: Callable[[], Awaitable[protocol.Refusal | None]],
) -> bytes:
    """Have the dialling peer prove membership, and prove it in turn; return the key's ID.

    ``objection`` is asked once the peer has spoken: a reason of ours, other than the token, not to
    take this connection.

    Raises:
        TokenRefused, PeerRefused, WireError, StreamReset: as ``prove_as_dialler``.
    """
    side = protocol.ListenerSide(keys, own_id, stream.peer_id, _nonce())
    channel = _Channel(stream)
    hello = await channel.receive()
    refusal = await objection()
    if refusal is not None:
        await channel.send(refusal)
        await stream.send_eof()
        kind = DuplicateConnection if refusal.code == DUPLICATE else PeerRefused
        raise kind(f"this node refused {stream.peer_id}: {refusal.message}")
    reply = side.receive(hello)
    while reply is not None:
        await channel.send(reply)
        if side.outcome is not None:
            break
        reply = side.receive(await channel.receive())
    await stream.send_eof()
    return side.check()


async def await_farewell(stream: MeshStream, timeout: float) -> None:
    """Wait until the refused peer has read why: closing at once would discard it unread."""
    with trio.move_on_after(timeout):
        try:
            while await stream.receive_some(4096):
                continue
        except MeshError:
            return  # it left without a word: just as well


def outcome_label(error: BaseException | None) -> str:
    """Return the metric label for how one exchange ended."""
    match error:
        case None:
            return "member"
        case TokenRefused():
            return "wrong_token"
        case DuplicateConnection():
            return "duplicate"
        case PeerRefused():
            return "refused"
        case WireError(code=code):
            return code
        case _:
            return "broken"


class _Channel:
    """Framed messages over the stream; the stream's end in mid-exchange is a cut."""

    def __init__(self, stream: MeshStream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(protocol.MAX_MESSAGE_BYTES)

    async def send(self, message: protocol.Message) -> None:
        await self._stream.send_all(encode_frame(protocol.encode(message)))

    async def receive(self) -> protocol.Message:
        while (body := self._decoder.next_frame()) is None:
            data = await self._stream.receive_some(4096)
            if not data:
                raise StreamReset(f"peer {self._stream.peer_id} ended the membership exchange")
            self._decoder.feed(data)
        return protocol.decode(body)


def _nonce() -> bytes:
    return secrets.token_bytes(protocol.NONCE_BYTES)
