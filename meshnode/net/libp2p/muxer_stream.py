"""One yamux stream under trio: a ``net/mesh.ByteStream``, and libp2p's ``IMuxedStream`` as well."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from meshnode.errors import StreamClosed, StreamReset
from meshnode.net.libp2p.yamux_stream import Stream

if TYPE_CHECKING:
    from meshnode.net.libp2p.muxer import YamuxConn


class YamuxStream(IMuxedStream):
    """One stream, under the names of ``net/mesh.ByteStream`` and under libp2p's."""

    muxed_conn: YamuxConn

    def __init__(self, conn: YamuxConn, state: Stream) -> None:
        self.muxed_conn = conn
        self._state = state
        self._readable: trio.Event | None = None
        self._writable: trio.Event | None = None
        self._sending = trio.Lock()
        state.on_readable = self._wake_reader
        state.on_writable = self._wake_writer

    def __repr__(self) -> str:
        return f"<yamux stream {self._state.id} with {self.muxed_conn.peer_id}>"

    # As net/mesh.ByteStream; that is where the calls are described.

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` at the other side's clean end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        # Taking bytes and crediting the other side is one step: a cancel falls before or after.
        while (data := self._state.read(max_bytes)) is None:
            self.muxed_conn.kick()
            if self._readable is None:
                self._readable = trio.Event()
            await self._readable.wait()
        self.muxed_conn.kick()
        return data

    async def send_all(self, data: bytes) -> None:
        """Queue all of ``data``, waiting as long as the reader needs for all but a buffer of it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        if not self._sending.locked():
            # Nearly always there is room for all of it, and nobody to take turns with.
            view = view[self._state.write(view) :]
            self.muxed_conn.kick()
            if not view:
                return
            self._sending.acquire_nowait()
        else:
            await self._sending.acquire()
        try:
            while True:
                view = view[self._state.write(view) :]
                self.muxed_conn.kick()
                if not view:
                    return
                if self._writable is None:
                    self._writable = trio.Event()
                await self._writable.wait()
        finally:
            self._sending.release()

    async def send_soon(self, data: bytes) -> None:
        """Queue ``data`` to leave with what is sent next on this stream, or after a moment."""
        await trio.lowlevel.checkpoint_if_cancelled()
        left = data
        if not self._sending.locked():
            left = data[self._state.write(memoryview(data), soon=True) :]
            self.muxed_conn.hold()
        if left:
            await self.send_all(left)

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; receiving goes on."""
        self._state.finish()
        self.muxed_conn.kick()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Finish sending, and let go of what still comes."""
        self._state.abandon()
        self._wake_reader()
        self.muxed_conn.linger(self._state)
        self.muxed_conn.kick()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Abort both ways at once. Never waits or raises."""
        self._state.reset()
        self.muxed_conn.kick()

    @property
    def is_closed(self) -> bool:
        """Whether both sides are done with the stream."""
        return self._state.gone

    # As libp2p's IMuxedStream.

    async def read(self, n: int | None = None) -> bytes:
        """Return 1 to ``n`` bytes, or all that came if ``n`` is None or -1.

        Raises:
            MuxedStreamEOF: the other side ended the stream.
            MuxedStreamReset: the stream was reset, or its connection died.
        """
        if n == 0:
            return b""
        self.muxed_conn.unlinger(self._state)
        try:
            data = await self.receive_some(
                self._state.window if n is None or n < 0 else n,
            )
        except (StreamReset, StreamClosed) as exc:
            raise MuxedStreamReset(str(exc)) from exc
        if not data:
            raise MuxedStreamEOF("the other side ended the stream")
        return data

    async def write(self, data: bytes) -> None:
        """Send all of ``data``.

        Raises:
            MuxedStreamClosed: this side ended the stream.
            MuxedStreamReset: the stream was reset, or its connection died.
        """
        try:
            await self.send_all(data)
        except StreamReset as exc:
            raise MuxedStreamReset(str(exc)) from exc
        except StreamClosed as exc:
            raise MuxedStreamClosed(str(exc)) from exc

    async def close_write(self) -> None:
        """As ``send_eof``."""
        await self.send_eof()

    async def close(self) -> None:
        """End the sending side.

        libp2p's users may go on reading. Those that do not leave the stream to the linger.
        """
        self._state.finish()
        self.muxed_conn.linger(self._state)
        self.muxed_conn.kick()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """As ``abort``."""
        self.abort()
        await trio.lowlevel.checkpoint()

    def set_deadline(self, ttl: int) -> None:
        """Refuse: cancel scopes do this here."""
        raise NotImplementedError("use a trio cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the connection's remote host and port."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_type is None:
            await self.aclose()
        else:
            self.abort()

    def _wake_reader(self) -> None:
        if self._readable is not None:
            self._readable.set()
            self._readable = None

    def _wake_writer(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None
