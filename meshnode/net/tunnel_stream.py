"""The body of a tunnel as a ByteStream: chunks on a mesh stream, with an explicit end.

A FIN without the end marker is a cut: other muxers report a dead connection as a clean end.
"""

from __future__ import annotations

import contextlib
from collections import deque

from meshnode.core.tunnel import END, ChunkDecoder, encode_chunks
from meshnode.errors import StreamClosed, StreamReset, WireError
from meshnode.net.mesh import MeshStream


class TunnelStream:
    """Takes chunks off, and puts chunks on, what follows an ``ok`` reply.

    Args:
        stream: the mesh stream, past its header frames.
        received: bytes of the body that were read together with the header.
    """

    def __init__(self, stream: MeshStream, received: bytes = b"") -> None:
        self._stream = stream
        self._decoder = ChunkDecoder()
        self._pieces: deque[bytes] = deque()
        self._unfed = received
        self._eof_sent = False

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        while not self._pieces:
            if self._decoder.ended:
                return b""
            await self._receive_pieces()
        piece = self._pieces.popleft()
        if len(piece) > max_bytes:
            self._pieces.appendleft(piece[max_bytes:])
            piece = piece[:max_bytes]
        return piece

    async def send_all(self, data: bytes) -> None:
        for chunk in encode_chunks(data):
            await self._stream.send_all(chunk)

    async def send_eof(self) -> None:
        if not self._eof_sent:
            self._eof_sent = True
            await self._stream.send_all(END)
            await self._stream.send_eof()

    async def aclose(self) -> None:
        # Cut or closed already: then there is no end to tell.
        with contextlib.suppress(StreamReset, StreamClosed):
            await self.send_eof()
        await self._stream.aclose()

    def reset(self) -> None:
        self._stream.reset()

    async def _receive_pieces(self) -> None:
        try:
            data, self._unfed = self._unfed, b""
            if not data:
                data = await self._stream.receive_some()
            if data:
                self._pieces.extend(self._decoder.feed(data))
            else:
                self._decoder.finish()
        except WireError as exc:
            self._stream.reset()
            raise StreamReset(f"the tunnel was cut short: {exc}") from exc
