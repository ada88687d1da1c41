"""Which service and which peer a request goes to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from meshnode.core.lease import Lease
from meshnode.core.router import Router
from meshnode.http.gateway.asked import Asked
from meshnode.net.lease_queue import LeaseQueue


class ServiceChooser:
    """Picks among the peers that offer the request's service, and waits while all are full.

    Args:
        target: a peer ID or name; nobody else serves then.
        wall_time: Unix seconds, kept with each decision for display.
    """

    def __init__(
        self,
        router: Router,
        queue: LeaseQueue,
        *,
        target: str | None,
        wall_time: Callable[[], float],
    ) -> None:
        self._router = router
        self._queue = queue
        self._target = target
        self._wall_time = wall_time

    async def lease(self, asked: Asked, *, may_wait: bool) -> Lease:
        try_lease = partial(self._try_lease, asked)
        if not may_wait:
            return try_lease()
        key = (asked.service_id, self._target)
        return await self._queue.lease(try_lease, key=key)

    def _try_lease(self, asked: Asked) -> Lease:
        return self._router.lease(
            now=trio.current_time(),
            wall_time=self._wall_time(),
            service_id=asked.service_id,
            target=self._target,
            exclude=tuple(asked.tried),
            attempt=len(asked.tried) + 1,
        )
