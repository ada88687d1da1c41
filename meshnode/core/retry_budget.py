"""How many requests may be tried again at once, so that retries never become a storm.

When a part of the mesh fails, everything sent there comes back and is sent elsewhere. Without a
bound that is the moment in which the rest gets twice its load, fails too, and so on.
"""

from __future__ import annotations

# Of what is in flight. Envoy's retry budget has the same default.
RETRY_SHARE = 0.2
# A quiet node has next to nothing in flight, and a fifth of that would be no retry at all.
RETRY_FLOOR = 3


class RetryBudget:
    """Counts the retries whose outcome is not known yet."""

    def __init__(self, share: float = RETRY_SHARE, floor: int = RETRY_FLOOR) -> None:
        self.open = 0
        self._share = share
        self._floor = floor

    def allowed(self, in_flight: int) -> int:
        """Return how many retries may be open while ``in_flight`` requests are, these included."""
        return max(self._floor, int(in_flight * self._share))

    def has_room(self, in_flight: int) -> bool:
        """Say whether one more retry may begin."""
        return self.open < self.allowed(in_flight)

    def begin(self) -> None:
        """Count a retry in; the caller asked ``has_room`` in the same synchronous step."""
        self.open += 1

    def end(self) -> None:
        """Count a retry out: it was served, failed, or was given up."""
        self.open -= 1
