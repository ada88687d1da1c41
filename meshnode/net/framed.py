"""Frames of ``core/wire`` read from a byte stream."""

from __future__ import annotations

from meshnode.core.wire import FrameDecoder
from meshnode.errors import WireError
from meshnode.net.mesh import ByteStream


class FrameReader:
    """Waits for one frame after another; what follows the frames can be had as raw bytes."""

    def __init__(self, stream: ByteStream, max_bytes: int) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(max_bytes)

    async def next_frame(self) -> bytes | None:
        """Return the next frame's body, or None at the stream's clean end.

        Raises:
            WireError: ``too_large``, or ``truncated``: the stream ended inside a frame.
            StreamReset: the stream was cut.
        """
        while (body := self._decoder.next_frame()) is None:
            data = await self._stream.receive_some()
            if not data:
                self._decoder.finish()
                return None
            self._decoder.feed(data)
        return body

    async def expect_frame(self) -> bytes:
        """Return the next frame's body.

        Raises:
            WireError: as ``next_frame``, and ``truncated`` where it returns None.
            StreamReset: the stream was cut.
        """
        if (body := await self.next_frame()) is None:
            raise WireError("truncated", "the stream ended where a frame was due")
        return body

    def take_rest(self) -> bytes:
        """Return, once, the bytes that came behind the last frame."""
        return self._decoder.take_rest()
