"""The waiting room: requests for which every peer is full wait here, in order and not for ever.

The law here: of requests that ask for the same, the one that came first is served first, and one
that came while others wait stands behind them. Only the first of each kind tries for a lease, and
it does so whenever ``wake`` is called; so a thousand that wait cost no more than one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from meshnode.errors import AllFull, NoCandidate, Overloaded, RetriesSpent
from meshnode.metrics import Metrics

# Each waits with a socket and up to a prompt in memory; more than this many are turned away.
QUEUE_LENGTH = 256
# Most clients give up after a minute at the latest; what waited this long is better told.
QUEUE_TIMEOUT = 30.0  # seconds
# A storm of retries is over within seconds, or it is no storm but a mesh that fails.
RETRY_WAIT = 2.0  # seconds
# What comes with time alone wakes nobody: a peer that said "busy" is asked again after a while.
_RECHECK = 0.5  # seconds

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Waiter:
    since: float  # when its request came; seconds on trio's clock
    full: AllFull | None = None  # why it did not get a lease when it last tried
    woken: trio.Event = field(default_factory=trio.Event)


class LeaseQueue:
    """Waits for a lease on behalf of requests that nobody has room for.

    Args:
        length: how many may wait at once; 0 turns everybody away for whom no peer has room.
        timeout: seconds after which a request that still waits is told so.
    """

    def __init__(
        self,
        *,
        metrics: Metrics,
        length: int = QUEUE_LENGTH,
        timeout: float = QUEUE_TIMEOUT,
    ) -> None:
        self.length = length
        self.timeout = timeout
        self._metrics = metrics
        self._lines: dict[Hashable, deque[_Waiter]] = {}  # none of them is empty
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def lease_now(self, try_lease: Callable[[], T], *, key: Hashable) -> T:
        """Return what ``try_lease`` returns, unless others wait for the same already.

        Raises:
            AllFull: it would have to wait: call ``lease`` for that.
            NoCandidate: as ``lease``.
        """
        if key in self._lines:
            raise AllFull(f"{len(self._lines[key])} requests for the same wait already")
        return try_lease()

    async def lease(
        self,
        try_lease: Callable[[], T],
        *,
        key: Hashable,
        since: float | None = None,
        deadline: float | None = None,
    ) -> T:
        """Return what ``try_lease`` returns, waiting while all that could serve are full.

        Cancel it when the client goes away: its place is then free at once.

        Args:
            try_lease: picks and counts in one synchronous step; raises AllFull while it can't.
            key: what the request asks for; those with equal keys are served in order.
            since: when the request came, if it waited before: it stands before those that came
                later. Seconds on trio's clock, as all times here.
            deadline: ``timeout`` after ``since`` if that is sooner.

        Raises:
            Overloaded: the room is full, or no lease was had before the deadline.
            RetriesSpent: from ``try_lease``, for longer than ``RETRY_WAIT``.
            NoCandidate: from ``try_lease``: nobody can serve it, full or not.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            return self.lease_now(try_lease, key=key)
        except AllFull as exc:
            self._check_room(exc)
        since = trio.current_time() if since is None else since
        due = since + self.timeout
        return await self._wait(
            try_lease, key, since, due if deadline is None else min(due, deadline)
        )

    def wake(self) -> None:
        """Let the first of each kind try again: capacity may have come free."""
        for line in self._lines.values():
            line[0].woken.set()

    def _check_room(self, full: AllFull) -> None:
        if self._waiting < self.length:
            return
        self._metrics.queue_refused.inc()
        raise Overloaded(
            f"{self._waiting} requests wait already, and no more may (--queue-length): {full}",
            retry_after=max(1, math.ceil(self.timeout / 2)),
        ) from full

    async def _wait(self, try_lease: Callable[[], T], key: Hashable, since: float, due: float) -> T:
        began, outcome = trio.current_time(), "gone"
        with self._place(key, since) as waiter:
            try:
                with trio.move_on_at(due):
                    lease = await self._turn(waiter, key, try_lease)
                    outcome = "served"
                    return lease
                outcome = "timeout"
            except NoCandidate:
                outcome = "unserved"
                raise
            finally:
                waited = trio.current_time() - began
                self._metrics.queue_wait_seconds.labels(outcome=outcome).observe(waited)
        raise Overloaded(
            f"no peer had room within {trio.current_time() - since:.1f} s, and {self._waiting} "
            f"more requests wait: {waiter.full or 'those before it were not served either'}",
            retry_after=max(1, math.ceil(self.timeout / 4)),
        ) from waiter.full

    async def _turn(self, waiter: _Waiter, key: Hashable, try_lease: Callable[[], T]) -> T:
        """Wait for the first place of the line, and there for a lease."""
        give_up_retry = trio.current_time() + RETRY_WAIT
        while True:
            # The event is renewed before trying: what comes free from then on is not missed.
            waiter.woken = trio.Event()
            if self._lines[key][0] is not waiter:
                await waiter.woken.wait()
                continue
            try:
                return try_lease()
            except AllFull as exc:
                waiter.full = exc
                if isinstance(exc, RetriesSpent) and trio.current_time() >= give_up_retry:
                    raise
            with trio.move_on_after(_RECHECK):
                await waiter.woken.wait()

    @contextmanager
    def _place(self, key: Hashable, since: float) -> Iterator[_Waiter]:
        """Hold a place in the line until the block is left; then wake who is first."""
        waiter = _Waiter(since)
        line = self._lines.setdefault(key, deque())
        # Nearly all come last; one that was called and got nothing goes back to where it was.
        at = next((i for i, other in enumerate(line) if other.since > since), len(line))
        line.insert(at, waiter)
        self._count(+1)
        try:
            yield waiter
        finally:
            line.remove(waiter)
            self._count(-1)
            if line:
                line[0].woken.set()
            else:
                del self._lines[key]

    def _count(self, change: int) -> None:
        self._waiting += change
        self._metrics.queue_length.set(self._waiting)
