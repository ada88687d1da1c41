"""Hypercorn's trio worker over a socket that this program bound itself.

Binding apart from serving gives a clear error before anything else starts, and the port that was
chosen for port 0. Hypercorn's connection handler is run from an accept loop of our own, because
its own one shields sends without a limit: one client that never reads would hold up the end of
the node for ever.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat

import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app
from starlette.types import ASGIApp

from meshnode.errors import ListenFailed
from meshnode.metrics import Metrics
from meshnode.net.descriptors import OUT_OF_DESCRIPTORS, DescriptorReserve

# A dashboard and a few scripts need ten; each costs a task and some kilobytes.
MAX_CONNECTIONS = 256
# What is being answered when the node ends may take this long to its end.
GRACE = 0.5  # seconds
# After it connections are cut; Hypercorn then closes within one more turn of the loop.
CUT_GRACE = 0.4  # seconds
# A client that takes no byte for so long reads no more.
SEND_TIMEOUT = 10.0  # seconds
_PIECE = 64 * 1024  # bytes
# Without any descriptor left, not even a kept one, it tries again so soon.
_PAUSE = 0.1  # seconds
_KEEP_ALIVE = 10.0  # seconds; also how long a client may take to send its first request

_log = structlog.get_logger(__name__)


def bind(host: str, port: int, *, setting: str) -> socket.socket:
    """Return a listening TCP socket; ``setting`` names what asked for it, for the error.

    Raises:
        ListenFailed: the address is taken, not this machine's, or not permitted.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ListenFailed(f"{setting}={where} can't be listened on: {exc.strerror}") from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as exc:
        sock.close()
        raise ListenFailed(
            f"{setting}={where} can't be listened on: {exc.strerror}; "
            "choose another port, or 0 for any free one"
        ) from exc
    return sock


def bind_unix(path: str, *, setting: str) -> socket.socket:
    """Return a listening Unix socket that only this user may open.

    What a node that was killed left there is removed; what somebody listens on is not.

    Raises:
        ListenFailed: somebody listens there, something else stands there, or it can't be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_away(path)
        # Before anybody can find it: there is no moment in which others may open it.
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(128)
    except OSError as exc:
        sock.close()
        raise ListenFailed(
            f"{setting}=unix:{path} can't be listened on: {exc.strerror or exc}; "
            "choose another path in a folder of this user's"
        ) from exc
    return sock


def _clear_away(path: str) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "something else than a socket stands there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise FileExistsError(errno.EADDRINUSE, "another program listens there")


async def serve_forever(
    app: ASGIApp,
    sock: socket.socket,
    *,
    metrics: Metrics | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` on ``sock`` until cancelled; then finish within a second and close it.

    Args:
        metrics: where a connection that failed over a bug is counted, besides being logged.
    """
    server = _Server(app, metrics or Metrics())
    stop = trio.Event()
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    async with listener, trio.open_nursery() as nursery:
        # Apart, and shielded: connections outlive the cancellation by the grace.
        nursery.start_soon(server.serve, listener, stop)
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            stop.set()


class _Server:
    """What all connections of one server share."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        # There from the start: an alert on its increase would not see a counter begin at one.
        self._failed = metrics.protocol_faults.labels(
            protocol="control_api", code="connection_failed"
        )
        self._app = wrap_app(app, 0, "asgi")  # type: ignore[arg-type]
        self._config = _hypercorn_config()
        self._context = WorkerContext(None)
        self._streams: set[trio.SocketStream] = set()
        self._empty = trio.Event()
        self._empty.set()
        self._reserve = DescriptorReserve()

    async def serve(self, listener: trio.SocketListener, stop: trio.Event) -> None:
        """Accept until ``stop`` is set, then end every connection within the grace."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(self._accept_forever, listener, connections)
                    await stop.wait()
                    accepting.cancel_scope.cancel()
                await self._end(connections.cancel_scope)
        self._reserve.close()

    async def _accept_forever(
        self, listener: trio.SocketListener, connections: trio.Nursery
    ) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno not in OUT_OF_DESCRIPTORS:
                    raise
                # Who wants to see why nothing works must not be kept out by just that.
                if not self._reserve.give_one_up():
                    await trio.sleep(_PAUSE)
            else:
                connections.start_soon(self._serve_connection, stream)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        if len(self._streams) >= MAX_CONNECTIONS:
            _log.warning("control_api_full", connections=len(self._streams))
            await trio.aclose_forcefully(stream)
            return
        self._streams.add(stream)
        self._empty = trio.Event() if self._empty.is_set() else self._empty
        try:
            await self._guard_connection(stream)
        finally:
            self._streams.discard(stream)
            stream.socket.close()
            self._reserve.refill()
            if not self._streams:
                self._empty.set()

    async def _guard_connection(self, stream: trio.SocketStream) -> None:
        """Keep what goes wrong on one connection from ending the node."""
        try:
            await TCPServer(
                self._app,
                self._config,
                self._context,
                ConnectionState({}),
                _BoundedStream(stream),  # type: ignore[arg-type]
            )
        # Hypercorn and h11 raise what they like over a client's bytes, and no client ends a node.
        except Exception as exc:  # noqa: BLE001
            self._failed.inc()
            _log.error("control_api_connection_failed", error=repr(exc))

    async def _end(self, connections: trio.CancelScope) -> None:
        await self._context.terminated.set()  # idle connections close by themselves
        with trio.move_on_after(GRACE):
            await self._empty.wait()
        for stream in tuple(self._streams):
            stream.socket.close()  # wakes up a send that waits, shielded, for a slow reader
        connections.deadline = trio.current_time() + CUT_GRACE


class _BoundedStream:
    """A client's stream whose sends end the connection of a client that does not read."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket
        self._stream = stream

    async def send_all(self, data: bytes) -> None:
        # In pieces, so that a slow client that does read may take as long as it needs.
        for start in range(0, len(data), _PIECE):
            with trio.move_on_after(SEND_TIMEOUT) as scope:
                await self._stream.send_all(data[start : start + _PIECE])
            if scope.cancelled_caught:
                await trio.aclose_forcefully(self._stream)
                raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _hypercorn_config() -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    # What an application raises is logged by the application; the rest is what clients do.
    config.errorlog = logging.getLogger("meshnode.http.hypercorn")
    config.errorlog.setLevel(logging.CRITICAL)
    config.include_server_header = False
    config.keep_alive_timeout = _KEEP_ALIVE
    return config
