"""A TCP connection as a ByteStream: a reset is a reset (RST), never an end of file."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

import trio

from meshnode.errors import PeerUnreachable, StreamClosed, StreamReset

_ABORT = struct.pack("ii", 1, 0)  # struct linger: close at once, throw away, send RST


class TcpStream:
    """Gives a ``trio.SocketStream`` (TCP_NODELAY by default) the interface of ``ByteStream``."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as exc:
            raise StreamReset(f"the connection broke: {exc.__cause__ or exc}") from exc
        except trio.ClosedResourceError as exc:
            raise StreamClosed("this side already closed the connection") from exc

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as exc:
            raise StreamReset(f"the connection broke: {exc.__cause__ or exc}") from exc
        except trio.ClosedResourceError as exc:
            raise StreamClosed("this side already closed the connection") from exc

    async def send_eof(self) -> None:
        try:
            await self._stream.send_eof()
        except trio.BrokenResourceError as exc:
            raise StreamReset(f"the connection broke: {exc.__cause__ or exc}") from exc
        except trio.ClosedResourceError as exc:
            raise StreamClosed("this side already closed the connection") from exc

    async def aclose(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_eof()
        await self._stream.aclose()

    def reset(self) -> None:
        with contextlib.suppress(OSError):  # already closed: there is nothing left to abort
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self._stream.socket.close()


async def connect_tcp(host: str, port: int, *, timeout: float) -> TcpStream:
    """Connect to ``host:port`` within ``timeout`` seconds.

    Raises:
        PeerUnreachable: nothing accepts there, or not in time.
    """
    try:
        with trio.fail_after(timeout):
            return TcpStream(await trio.open_tcp_stream(host, port))
    except trio.TooSlowError as exc:
        raise PeerUnreachable(f"{host}:{port} did not accept within {timeout:g} s") from exc
    except OSError as exc:
        raise PeerUnreachable(f"{host}:{port} can't be reached: {_reason(exc)}") from exc


def _reason(error: OSError) -> str:
    """Return why connecting failed; where a name has several addresses, why the first did."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    number = cause.errno if isinstance(cause, OSError) else None
    return os.strerror(number) if number else str(cause)
