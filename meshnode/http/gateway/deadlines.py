"""Ends waits for peers that last too long: one task for the requests of all clients.

A cancel scope for each attempt would cost as much as reading the request; here one costs an entry
in a table. In return an end comes up to ``LOOK_INTERVAL`` late.
"""

from __future__ import annotations

import trio

from meshnode.net.exchange import Exchange

# The limits are seconds to minutes: nobody notices a tenth more.
LOOK_INTERVAL = 0.1  # seconds


class Wait:
    """One wait for what a peer says."""

    __slots__ = ("due", "exchange", "is_over")

    def __init__(self, exchange: Exchange, due: float) -> None:
        self.exchange = exchange
        self.due = due  # trio.current_time(); may be moved while it lasts
        self.is_over = False  # it lasted too long: the exchange was reset, so that reading raises


class Deadlines:
    """Resets exchanges whose peers say nothing in time."""

    def __init__(self) -> None:
        self._waits: dict[Wait, None] = {}
        self._some = trio.Event()

    def __len__(self) -> int:
        return len(self._waits)

    def begin(self, exchange: Exchange, due: float) -> Wait:
        """Reset ``exchange`` at ``due``, unless ``end`` is called before."""
        wait = Wait(exchange, due)
        self._waits[wait] = None
        if len(self._waits) == 1:
            self._some.set()
        return wait

    def end(self, wait: Wait) -> None:
        """Let the exchange go on; twice is once."""
        self._waits.pop(wait, None)

    async def look_forever(self) -> None:
        """End what is overdue, until cancelled."""
        while True:
            if not self._waits:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(LOOK_INTERVAL)
            now = trio.current_time()
            for wait in [wait for wait in self._waits if wait.due <= now]:
                wait.is_over = True
                del self._waits[wait]
                wait.exchange.reset()
