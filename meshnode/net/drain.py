"""Leaving without losing a request: take nothing new, finish what runs, then go.

The law here: from its first moment on a drain refuses what is new as busy elsewhere, and tells all
so at once; what runs is cut only when the grace is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass

import structlog
import trio

from meshnode.core.router import Router
from meshnode.net.gossip import Announcer
from meshnode.net.local_services import LocalServices

# How often it looks whether the last request has ended.
_LOOK_INTERVAL = 0.05  # seconds
# The part of the grace during which this node's own clients may still begin something that others
# serve. Without an end to it, steady clients would keep the node until the grace cuts them off.
_CLIENTS_PART = 0.5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """The requests that a drain waits for."""

    served_here: int  # on this host's services, for whomever
    sent_elsewhere: int  # of this node's clients, served by others or waiting for room

    def __bool__(self) -> bool:
        return bool(self.served_here or self.sent_elsewhere)


class Drain:
    """Drains one node.

    Args:
        queue: this node's requests that wait until somebody has room.
        close_entry: takes no new clients any more.
        grace: how long running requests may take to end, in seconds.
    """

    def __init__(
        self,
        services: LocalServices,
        router: Router,
        announcer: Announcer,
        queue: Sized,
        *,
        close_entry: Callable[[], None],
        grace: float,
    ) -> None:
        self.grace = grace
        self.wished = trio.Event()  # set it to begin
        self._services = services
        self._router = router
        self._announcer = announcer
        self._queue = queue
        self._close_entry = close_entry

    @property
    def running(self) -> Running:
        """Return the requests that are open now."""
        here = self._services.total_in_flight
        own_here = self._services.in_flight_of(self._router.self_id)
        return Running(here, max(0, self._router.own_total - own_here) + len(self._queue))

    async def run(self) -> None:
        """Wait until it is wished for, then until nothing runs or the grace is over."""
        await self.wished.wait()
        self._services.draining = True
        self._announcer.drain()
        begun = trio.current_time()
        running = self.running
        log.info(
            "node_draining",
            grace_s=self.grace,
            served_here=running.served_here,
            sent_elsewhere=running.sent_elsewhere,
        )
        if not await self._wait_idle(begun + self.grace * _CLIENTS_PART):
            self._close_entry()
            await self._wait_idle(begun + self.grace)
        took = round(trio.current_time() - begun, 3)
        if running := self.running:
            log.warning(
                "drain_cut_short",
                duration_s=took,
                served_here=running.served_here,
                sent_elsewhere=running.sent_elsewhere,
            )
        else:
            log.info("node_drained", duration_s=took)

    async def _wait_idle(self, until: float) -> bool:
        while self.running:
            if trio.current_time() >= until:
                return False
            await trio.sleep(_LOOK_INTERVAL)
        return True
