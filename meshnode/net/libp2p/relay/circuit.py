"""A stream through a relay, in the form of the raw connection that noise is put on."""

from __future__ import annotations

from types import TracebackType

from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IOException

from meshnode.errors import StreamClosed, StreamReset
from meshnode.net.mesh import MeshStream

_READ_BYTES = 256 * 1024


class CircuitStream(ReadWriteCloser):
    """What ``TcpStream`` is for a socket.

    Args:
        stream: the stream to the relay, behind the last message of hop or stop.
        via: the relay's peer ID.
        remote_multiaddr: where the relay is, and ``/p2p/RELAY_ID/p2p-circuit``.
    """

    def __init__(self, stream: MeshStream, *, via: str, remote_multiaddr: str) -> None:
        self.via = via
        self.remote_multiaddr = remote_multiaddr
        self._stream = stream
        # Under the names of secure_channel's pipes, which the muxer uses.
        self.receive_some = stream.receive_some
        self.send_eof = stream.send_eof

    async def send_all(self, parts: list[bytes]) -> None:
        """Send noise messages together: the muxer below cuts them as it likes."""
        await self._stream.send_all(b"".join(parts))

    async def read(self, n: int | None = None) -> bytes:
        """Return 1 to ``n`` bytes, or none at the end."""
        if n == 0:
            return b""
        try:
            return await self._stream.receive_some(_READ_BYTES if n is None or n < 0 else n)
        except (StreamReset, StreamClosed) as exc:
            raise IOException(str(exc)) from exc

    async def write(self, data: bytes) -> None:
        """Send all of ``data``."""
        try:
            await self._stream.send_all(data)
        except (StreamReset, StreamClosed) as exc:
            raise IOException(str(exc)) from exc

    async def close(self) -> None:
        """Finish the circuit; streams still open on it are cut at the other end all the same."""
        await self._stream.aclose()

    def reset(self) -> None:
        """Cut the circuit at once."""
        self._stream.reset()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return None: the other side's own address is the relay's secret."""
        return None

    async def __aenter__(self) -> CircuitStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()
