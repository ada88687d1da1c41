"""Stops all tasks of one node where they stand, as SIGSTOP stops a process, and lets them go on.

Timers run out meanwhile and messages arrive, but nothing is done about either until the node is
thawed; then everything is late at once, which is what a suspended laptop wakes up to.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import trio

_gate: ContextVar[FreezeGate | None] = ContextVar("meshnode_freeze_gate", default=None)


class FreezeGate:
    """Every task started within ``with gate.guarding():``, and all their children, obey it."""

    def __init__(self) -> None:
        self._waiting: list[trio.lowlevel.Task] = []
        self.is_frozen = False

    @contextmanager
    def guarding(self) -> Iterator[None]:
        token = _gate.set(self)
        try:
            yield
        finally:
            _gate.reset(token)

    def freeze(self) -> None:
        self.is_frozen = True

    def thaw(self) -> None:
        self.is_frozen = False
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            trio.lowlevel.reschedule(task)

    async def wait_thawed(self) -> None:
        """Wait, also through a cancel: a stopped process does not hear of it either."""
        while self.is_frozen:
            self._waiting.append(trio.lowlevel.current_task())
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)


class FreezeInstrument(trio.abc.Instrument):
    """Puts the gate around each new task that is to obey one; one for a whole run."""

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        gate = task.context.get(_gate)
        if gate is not None:
            task.coro = _Gated(task.coro, gate)  # type: ignore[assignment]


class _Gated:
    """A task's coroutine, which is not resumed while its gate is frozen."""

    def __init__(self, coro: Coroutine[Any, Any, object], gate: FreezeGate) -> None:
        self._coro = coro
        self._gate = gate
        self._thawing: Coroutine[object, object, None] | None = None
        self._late: object = None  # what the task shall be resumed with

    # Where the task stands: trio's locks and debugging aids ask.

    @property
    def cr_frame(self) -> object:
        return self._ask("cr_frame")

    @property
    def cr_running(self) -> object:
        return self._ask("cr_running")

    @property
    def cr_suspended(self) -> object:
        return self._ask("cr_suspended")

    def send(self, value: object) -> object:
        if self._thawing is None:
            if not self._gate.is_frozen:
                return self._coro.send(value)
            self._late, self._thawing = value, self._gate.wait_thawed()
            value = None
        try:
            return self._thawing.send(value)
        except StopIteration:
            late, self._late, self._thawing = self._late, None, None
            return self._coro.send(late)

    def throw(self, error: BaseException) -> object:
        return self._coro.throw(error)

    def close(self) -> None:
        self._coro.close()

    def _ask(self, name: str) -> object:
        asked: object = getattr(self._coro, name)
        return asked
