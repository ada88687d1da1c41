"""A client whose first bytes are kept until its answer begins, so that another peer can be asked.

The law here: as long as nothing of an answer went to the client, everything that it sent is still
here or the client can't be handed on any more; from the first byte of an answer on, nothing is.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshnode.errors import StreamClosed, StreamReset
from meshnode.net.tcp_stream import TcpStream

# A chat with some pages of text. With every client of an entry point keeping so much, 256 MB.
KEPT_BYTES = 64 * 1024
_CHUNK = 65_536


class HeldClient:
    """The client's connection as a ``ByteStream`` that can be rewound while unanswered.

    Until the first byte of an answer, a ``reset`` or an end coming from the peer is kept from the
    client: whoever holds this decides what becomes of it.

    Args:
        may_repeat: says of the bytes that came whether a second peer may get them after a first
            one had them.
    """

    def __init__(
        self,
        stream: TcpStream,
        *,
        may_repeat: Callable[[bytes], bool],
        limit: int = KEPT_BYTES,
    ) -> None:
        self.answered = False  # something of an answer went to the client
        self.ended_empty = False  # the peer ended its side without a byte of an answer
        self.passed_on = trio.Event()  # the peer got something to answer
        self._stream = stream
        self._may_repeat = may_repeat
        self._limit = limit
        self._kept = bytearray()
        self._at = 0  # how much of it the present peer got
        self._eof = False
        self._is_whole = True  # what was kept is all that came

    @property
    def kept(self) -> bytes:
        """What the client sent so far: all of it while it can be handed on."""
        return bytes(self._kept)

    @property
    def can_be_handed_on(self) -> bool:
        """Whether another peer can be asked as if this one never had been."""
        if self.answered or not self._is_whole:
            return False
        return not self._at or self._may_repeat(self.kept)

    def rewind(self) -> None:
        """Begin anew for another peer."""
        self._at = 0
        self.ended_empty = False
        self.passed_on = trio.Event()

    async def wait_gone(self) -> None:
        """Return when the client goes away while it waits for a peer; read what it sends.

        A client that ends its side after a request that may be repeated, HTTP that is, has hung
        up: no HTTP client does so and still reads. Of others that is said to be half-closing.
        """
        while len(self._kept) < self._limit and not self._eof:
            try:
                data = await self._stream.receive_some(self._limit - len(self._kept))
            except (StreamReset, StreamClosed):
                return
            self._kept += data
            self._eof = not data
        if self._eof and self._kept and self._may_repeat(self.kept):
            return
        await trio.sleep_forever()

    async def receive_some(self, max_bytes: int = _CHUNK) -> bytes:
        if self._at < len(self._kept):
            data = bytes(self._kept[self._at : self._at + max_bytes])
            self._at += len(data)
            await trio.lowlevel.checkpoint()
            self.passed_on.set()
            return data
        if self._eof:
            await trio.lowlevel.checkpoint()
            return b""
        data = await self._stream.receive_some(max_bytes)
        self._eof = not data
        if data:
            self.passed_on.set()
            self._keep(data)
        return data

    async def send_all(self, data: bytes) -> None:
        # A peer that is being given up must not answer: first of all see whether it is.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._commit()
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        if not self.answered and self.can_be_handed_on and self._at:
            self.ended_empty = True
            raise StreamReset("the peer ended without a byte of an answer")
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def reset(self) -> None:
        """Cut the client off if it has had part of an answer; else leave it for another peer."""
        if self.answered:
            self._stream.reset()

    def _keep(self, data: bytes) -> None:
        if self.answered or not self._is_whole:
            return
        if len(self._kept) + len(data) > self._limit:
            self._is_whole = False
            self._kept.clear()
            self._at = 0
            return
        self._kept += data
        self._at = len(self._kept)

    def _commit(self) -> None:
        if not self.answered:
            self.answered = True
            # What a peer has not got yet of what was kept is still to come.
            del self._kept[: self._at]
            self._at = 0
