"""Which peer a request goes to: by its model, its prompt, its session and the load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from meshnode.core.lease import Lease
from meshnode.core.ledger import Ledger
from meshnode.core.model_router import ModelRequest, ModelRouter
from meshnode.errors import NoCandidate
from meshnode.http.gateway.asked import Asked
from meshnode.net.lease_queue import LeaseQueue

# A client's name for its session; a longer one is cut.
_MAX_SESSION = 256  # characters


@dataclass(frozen=True, slots=True)
class Aim:
    """What the operator chose for every request."""

    service_id: str | None = None  # nobody's other services will do
    target: str | None = None  # a peer ID or name; nobody else serves then
    session_header: str = "x-session-id"  # where clients name their sessions; lower case


class ModelChooser:
    """Picks among those who have the model, and waits while all of them are full.

    Args:
        wall_time: Unix seconds, kept with each decision for display.
    """

    def __init__(
        self,
        models: ModelRouter,
        ledger: Ledger,
        queue: LeaseQueue,
        *,
        aim: Aim,
        wall_time: Callable[[], float],
    ) -> None:
        self._models = models
        self._ledger = ledger
        self._queue = queue
        self._aim = aim
        self._wall_time = wall_time

    def check_offers(self) -> None:
        """See that anybody serves anything, before a request is read for nothing.

        Raises:
            NoCandidate: nobody does.
        """
        if not self._ledger.offers_any(trio.current_time()):
            raise NoCandidate(
                "no peer offers a service yet; start a node with --expose NAME=HOST:PORT, or wait"
            )

    async def lease(self, asked: Asked, *, may_wait: bool) -> Lease:
        try_lease = partial(self._try_lease, asked)
        if not may_wait:
            return try_lease()
        tries = asked.tries
        # One that passes somebody over must not stand before others whom that peer could serve.
        key = (asked.routed.model, self._aim, frozenset(tries.passed_over))
        return await self._queue.lease(try_lease, key=key, since=tries.waiting_since)

    def _try_lease(self, asked: Asked) -> Lease:
        routed, tries = asked.routed, asked.tries
        return self._models.lease(
            ModelRequest(
                now=trio.current_time(),
                model=routed.model,
                prompt=routed.prompt,
                session=self._session(asked),
                service_id=self._aim.service_id,
                target=self._aim.target,
                exclude=tuple(tries.passed_over),
                attempt=tries.count + 1,
                wall_time=self._wall_time(),
                # A peer that has other models did not fail.
                is_retry=any(why != "model_not_found" for why in tries.passed_over.values()),
            )
        )

    def _session(self, asked: Asked) -> str | None:
        if self._models.affinity != "session":
            return None
        return asked.head.text(self._aim.session_header.encode("ascii"))[:_MAX_SESSION] or None
