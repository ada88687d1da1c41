"""Whether a service is well, from what looks at it and requests to it show.

The law here: a service that refuses, or says itself that it is not well, is taken out at once; one
that is only late is not, as long as it works: a busy engine answers health late, and declaring it
dead would throw its load on the others.
"""

from __future__ import annotations

# One late answer is an accident.
_DOUBTS = 2
# How long requests at work excuse silence. A long prompt on a slow GPU takes some seconds before
# its first token; a backend that hangs for longer is no busy one.
BUSY_GRACE = 15.0  # seconds


class Health:
    """The health of one service; times are seconds on this node's monotonic clock."""

    def __init__(self) -> None:
        self.is_healthy = True  # until the first look: who can't be asked yet is not accused
        self.reason: str | None = None  # why not, for people
        self._doubts = 0
        self._last_sign = float("-inf")

    def saw_life(self, now: float) -> None:
        """Note that the service did something for a request: bytes came from it."""
        self._last_sign = now

    def answered(self, now: float) -> bool:
        """Note that it answered as it should; return whether that changed its health."""
        changed = not self.is_healthy
        self.is_healthy, self.reason, self._doubts = True, None, 0
        self._last_sign = now
        return changed

    def failed(self, reason: str, *, is_certain: bool, is_busy: bool, now: float) -> bool:
        """Note that it did not; return whether that changed its health.

        Args:
            is_certain: it refused, or said so itself; not merely late or unreadable.
            is_busy: requests are open on it.
        """
        if not is_certain and is_busy and now - self._last_sign < BUSY_GRACE:
            return False
        self._doubts += 1
        if not self.is_healthy:
            self.reason = reason
            return False
        if not is_certain and self._doubts < _DOUBTS:
            return False
        self.is_healthy, self.reason = False, reason
        return True
