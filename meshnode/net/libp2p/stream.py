"""A muxed stream as the rest of the program sees it."""

from __future__ import annotations

from typing import Protocol


class MuxedBytes(Protocol):
    """What the muxer's streams offer; see net/mesh.ByteStream for what each call means."""

    async def receive_some(self, max_bytes: int = 65536) -> bytes: ...
    async def send_all(self, data: bytes) -> None: ...
    async def send_soon(self, data: bytes) -> None: ...
    async def send_eof(self) -> None: ...
    async def aclose(self) -> None: ...
    def abort(self) -> None: ...


class Libp2pStream:
    """A byte stream to one peer. Everything is the muxer's; this only knows who and what for."""

    def __init__(self, muxed: MuxedBytes, peer_id: str, protocol_id: str) -> None:
        self._muxed = muxed
        self.peer_id = peer_id
        self.protocol_id = protocol_id
        # Bound once: the calls of the hot path cost no further frame.
        self.receive_some = muxed.receive_some
        self.send_all = muxed.send_all
        self.send_soon = muxed.send_soon

    def __repr__(self) -> str:
        return f"<stream {self.protocol_id} with {self.peer_id}>"

    async def send_eof(self) -> None:
        await self._muxed.send_eof()

    async def aclose(self) -> None:
        await self._muxed.aclose()

    def reset(self) -> None:
        self._muxed.abort()
