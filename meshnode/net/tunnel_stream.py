"""The dialler's side of a tunnel: requests one after another, each a ByteStream while it is open.

A FIN without the end marker is a cut: other muxers report a dead connection as a clean end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from meshnode.core.tunnel import (
    DONE,
    END,
    MAX_CHUNK_BYTES,
    Header,
    Mark,
    ReplyDecoder,
    TunnelReply,
    decode_reply,
    encode_chunk,
    encode_chunks,
    opening,
)
from meshnode.errors import PeerRefused, StreamClosed, StreamReset, WireError
from meshnode.net.mesh import MeshStream


class TunnelRefused(PeerRefused):
    """The peer does not serve this request, and not a byte of it reached the backend."""

    def __init__(self, reply: TunnelReply) -> None:
        super().__init__(reply.message or f"the peer is {reply.status}")
        self.status = reply.status


class TunnelBroken(StreamReset):
    """The peer broke the protocol, or ended the stream in the middle; ``code`` says how."""

    def __init__(self, fault: WireError) -> None:
        super().__init__(f"the tunnel was cut short: {fault}")
        self.code = fault.code


class TunnelStream:
    """One tunnel. ``ask``, read and write, ``done``; then it is quiet and can be asked again.

    Args:
        stream: a fresh mesh stream of the tunnel protocol.
        on_reply: told of every reply, refusals included, for the numbers in it.
    """

    def __init__(
        self, stream: MeshStream, on_reply: Callable[[TunnelReply], None] = lambda _: None
    ) -> None:
        self._stream = stream
        self._on_reply = on_reply
        self._decoder = ReplyDecoder()
        self._unread = b""
        self._accepted = False  # the reply came, and was ok
        self._ended = False  # the other side's END came
        self._eof_sent = False

    @property
    def peer_id(self) -> str:
        return self._stream.peer_id

    async def ask(self, service_id: str, first: bytes = b"", *, fresh: bool = False) -> None:
        """Begin a request, its first bytes with it: a refusal costs nobody more than those.

        Args:
            fresh: not over a connection to the backend that another request used before.

        Raises:
            StreamReset: the tunnel is cut.
        """
        self._decoder.ask()
        self._accepted = self._ended = self._eof_sent = False
        header = opening(service_id, fresh=fresh)
        if not first:
            await self._stream.send_all(header)
            return
        if len(first) <= MAX_CHUNK_BYTES:
            await self._stream.send_all(header + encode_chunk(first))
            return
        chunks = encode_chunks(first)
        await self._stream.send_all(header + next(chunks))
        for chunk in chunks:
            await self._stream.send_all(chunk)

    async def wait_accepted(self) -> None:
        """Wait for the reply.

        Raises:
            TunnelRefused: not now, or not here. ``done`` makes the tunnel quiet again.
            StreamReset: the tunnel is cut.
        """
        while not self._accepted:
            await self._receive_items()

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        while not self._unread:
            if self._ended:
                return b""
            await self._receive_items()
        data = self._unread
        if len(data) > max_bytes:
            self._unread = data[max_bytes:]
            return data[:max_bytes]
        self._unread = b""
        return data

    async def send_all(self, data: bytes) -> None:
        for chunk in encode_chunks(data):
            await self._stream.send_all(chunk)

    async def send_eof(self) -> None:
        if not self._eof_sent:
            self._eof_sent = True
            await self._stream.send_all(END)

    async def done(self) -> bool:
        """Let go of the request; return whether the tunnel can be asked again.

        Not if more came than was read: it would be taken for the next answer.
        """
        self._decoder.done()
        if self._unread or not self._decoder.is_quiet:
            self.reset()
            return False
        # Often the next request follows at once, and the other side hears of both together.
        await self._stream.send_soon(DONE)
        return True

    async def aclose(self) -> None:
        # Cut or closed already: then there is no end to tell.
        with contextlib.suppress(StreamReset, StreamClosed):
            if not self._decoder.is_quiet:
                await self.send_eof()
        await self._stream.aclose()

    def reset(self) -> None:
        self._stream.reset()

    async def _receive_items(self) -> None:
        data = await self._stream.receive_some()
        try:
            if not data:
                self._decoder.finish()
                raise WireError("cut", "the stream ended between two requests")
            for item in self._decoder.feed(data):
                if type(item) is bytes:
                    self._unread = self._unread + item if self._unread else item
                elif type(item) is Header:
                    self._take_reply(decode_reply(item.body))
                elif item is Mark.END:
                    self._ended = True
        except WireError as exc:
            self._stream.reset()
            raise TunnelBroken(exc) from exc

    def _take_reply(self, reply: TunnelReply) -> None:
        self._on_reply(reply)
        if reply.status != "ok":
            raise TunnelRefused(reply)
        self._accepted = True
