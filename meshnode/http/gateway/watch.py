"""Notices clients that went away while their request is under way.

One watch for all connections: registered once each, asked nothing per request. A task of its own
for every request, reading the client's socket, would cost more than the rest of the request.
"""

from __future__ import annotations

import contextlib
import select
import socket
from typing import Protocol

import trio

# Where the kernel can't tell: how often each busy client's socket is looked at.
LOOK_INTERVAL = 0.05  # seconds


class Watched(Protocol):
    """A client's connection."""

    @property
    def is_busy(self) -> bool:
        """Whether a request of it is under way."""

    def on_gone(self) -> None:
        """Take notice that the client closed its sending side, or the connection died."""


class GoneWatch:
    """Tells connections that their clients are gone; at once on Linux, else within 50 ms."""

    def __init__(self, *, use_epoll: bool = hasattr(select, "epoll")) -> None:
        self._watched: dict[int, Watched] = {}
        self._epoll = select.epoll() if use_epoll else None
        self._some = trio.Event()

    def add(self, fd: int, watched: Watched) -> None:
        """Watch a connection until ``remove``."""
        self._watched[fd] = watched
        if self._epoll is not None:
            # The edge alone: a client that half-closed and waits would be told of for ever.
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)
        self._some.set()

    def remove(self, fd: int, watched: Watched) -> None:
        """Watch it no longer. Its socket may be closed, and the number another one's already."""
        if self._watched.get(fd) is not watched:
            return
        del self._watched[fd]
        if self._epoll is not None:
            # Closed: the kernel forgot it by itself. ValueError: the watch has ended before.
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(fd)

    async def watch_forever(self) -> None:
        """Run the watch until cancelled."""
        if self._epoll is None:
            await self._look_forever()
            return
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, _ in self._epoll.poll(0):
                    if (watched := self._watched.get(fd)) is not None:
                        watched.on_gone()
        finally:
            self._epoll.close()

    async def _look_forever(self) -> None:
        while True:
            await self._some.wait()
            await trio.sleep(LOOK_INTERVAL)
            for fd, watched in list(self._watched.items()):
                if watched.is_busy and has_ended(fd):
                    watched.on_gone()
            if not self._watched:
                self._some = trio.Event()


def has_ended(fd: int) -> bool:
    """Whether the other side of a connection ended or cut it, and everything before was read."""
    with socket.socket(fileno=fd) as view:
        try:
            return not view.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            view.detach()
