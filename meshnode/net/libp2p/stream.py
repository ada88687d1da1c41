"""A muxed stream as the rest of the program sees it."""

from __future__ import annotations

from typing import Protocol

from meshnode.errors import PeerRefused, PeerUnreachable, StreamReset, WireError
from meshnode.net.libp2p.negotiate import confirm, proposal


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


class BegunStream(Libp2pStream):
    """A stream whose protocol is proposed with its first bytes, and agreed on by the first read."""

    def __init__(self, muxed: MuxedBytes, peer_id: str, protocol_id: str) -> None:
        super().__init__(muxed, peer_id, protocol_id)
        self.send_all = self._send_first
        self.send_soon = self._send_first
        self.receive_some = self._receive_first

    async def _send_first(self, data: bytes) -> None:
        self.send_all = self._muxed.send_all
        self.send_soon = self._muxed.send_soon
        await self._muxed.send_all(proposal(self.protocol_id) + data)

    async def send_eof(self) -> None:
        if self.send_all == self._send_first:
            await self._send_first(b"")
        await super().send_eof()

    async def _receive_first(self, max_bytes: int = 65536) -> bytes:
        if self.send_all == self._send_first:
            await self._send_first(b"")
        try:
            await confirm(self._muxed, self.protocol_id)
        except PeerRefused:
            self._muxed.abort()
            raise
        except (StreamReset, WireError) as exc:
            self._muxed.abort()
            raise PeerUnreachable(f"the stream to {self.peer_id} failed: {exc}") from exc
        self.receive_some = self._muxed.receive_some
        return await self._muxed.receive_some(max_bytes)
