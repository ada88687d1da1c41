"""A TCP connection as a ByteStream: a reset is a reset (RST), never an end of file.

It reads and writes the socket itself: trio's own stream adds a turn of the scheduler to every
call, which is a good part of what carrying a small message costs.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
from collections.abc import Callable

import trio

from meshnode.errors import OutOfDescriptors, PeerUnreachable, StreamClosed, StreamReset
from meshnode.net.descriptors import OUT_OF_DESCRIPTORS

_ABORT = struct.pack("ii", 1, 0)  # struct linger: close at once, throw away, send RST


class TcpStream:
    """Gives a ``trio.SocketStream`` (TCP_NODELAY by default) the interface of ``ByteStream``."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.on_data: Callable[[], None] | None = None  # called whenever something came
        self._stream = stream
        self._is_broken = False  # sending failed
        self._more_waits = False  # the last read took as much as it might

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        try:
            # Mostly nothing has come yet when somebody asks: a read before the wait is wasted.
            if self._more_waits:
                await trio.lowlevel.checkpoint_if_cancelled()
            else:
                await trio.lowlevel.wait_readable(self._fd())
            while True:
                try:
                    data = os.read(self._fd(), max_bytes)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._fd())
                else:
                    if not data and self._is_broken:
                        # The kernel tells of a reset once. If it told whoever was sending, a
                        # reader sees an end, and a cut answer would look whole.
                        raise StreamReset("the connection broke while sending")
                    self._more_waits = len(data) == max_bytes
                    if data and self.on_data is not None:
                        self.on_data()
                    return data
        except trio.ClosedResourceError as exc:
            raise StreamClosed("this side already closed the connection") from exc
        except OSError as exc:
            raise StreamReset(f"the connection broke: {exc}") from exc

    async def send_all(self, data: bytes) -> None:
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                sent = os.write(self._fd(), data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                await self._send_slowly(memoryview(data)[sent:])
        except trio.ClosedResourceError as exc:
            raise StreamClosed("this side already closed the connection") from exc
        except OSError as exc:
            self._is_broken = True
            raise StreamReset(f"the connection broke: {exc}") from exc

    def send_now(self, data: bytes) -> int:
        """Send as much of ``data`` as there is room for, without waiting; return how much.

        Raises:
            StreamReset, StreamClosed: as ``send_all``.
        """
        try:
            return os.write(self._fd(), data)
        except BlockingIOError:
            return 0
        except trio.ClosedResourceError as exc:
            raise StreamClosed("this side already closed the connection") from exc
        except OSError as exc:
            raise StreamReset(f"the connection broke: {exc}") from exc

    async def _send_slowly(self, left: memoryview) -> None:
        while left:
            await trio.lowlevel.wait_writable(self._fd())
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self._fd(), left) :]

    def is_quiet(self) -> bool:
        """Whether the other side neither sent anything, nor ended or cut the connection."""
        fd = self._stream.socket.fileno()
        if fd < 0:
            return False
        poll = select.poll()  # not select(): descriptors above 1,023 are common here
        poll.register(fd, select.POLLIN)
        return not poll.poll(0)

    def _fd(self) -> int:
        # Asked each time: the number of a closed socket soon belongs to another one.
        fd = self._stream.socket.fileno()
        if fd < 0:
            raise trio.ClosedResourceError
        return fd

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

    def close(self) -> None:
        """Close at once, cleanly if everything that came was read. Never waits or raises."""
        self._stream.socket.close()

    def reset(self) -> None:
        with contextlib.suppress(OSError):  # already closed: there is nothing left to abort
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self._stream.socket.close()


async def connect_tcp(host: str, port: int, *, timeout: float) -> TcpStream:
    """Connect to ``host:port`` within ``timeout`` seconds.

    Raises:
        PeerUnreachable: nothing accepts there, or not in time.
        OutOfDescriptors: no socket could be made here.
    """
    try:
        with trio.fail_after(timeout):
            return TcpStream(await _open(host, port))
    except trio.TooSlowError as exc:
        raise PeerUnreachable(f"{host}:{port} did not accept within {timeout:g} s") from exc
    except OSError as exc:
        number = _number(exc)
        reason = os.strerror(number) if number else str(exc)
        kind = OutOfDescriptors if number in OUT_OF_DESCRIPTORS else PeerUnreachable
        raise kind(f"{host}:{port} can't be reached: {reason}") from exc


async def _open(host: str, port: int) -> trio.SocketStream:
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return await trio.open_tcp_stream(host, port)
    # Of one address there is nothing to choose: trio's race of several costs twice a connect.
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def _number(error: OSError) -> int | None:
    """Return the errno of a failed connect; where a name has several addresses, the first one's."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause.errno if isinstance(cause, OSError) else None
