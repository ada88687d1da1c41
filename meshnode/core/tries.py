"""What one request has tried so far, and whether another peer may be asked for it.

Two bounds. A request that breaks whatever serves it must not go round the mesh, so three failures
end it. A peer that is lost says nothing of the request, so it takes no place among the three; but
the client waits all the while, so five end it in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_MAX_FAILED = 3
_MAX_TRIED = 5
# Reasons that mean the peer itself is gone: it can't be reached, or its link died meanwhile.
_LOST = frozenset({"unreachable", "lost"})
# What a peer says of itself, and no failure: the client keeps its place, and may be served there
# a moment later.
NO_FAILURES = frozenset({"busy", "draining"})


@dataclass(frozen=True, slots=True)
class Tries:
    """The peers that were asked for one request and did not serve it."""

    passed_over: Mapping[str, str] = field(default_factory=dict)  # peer ID -> why for good
    count: int = 0  # peers that did not serve, those included that were only busy
    waiting_since: float | None = None  # when somebody was busy first

    def after(self, peer_id: str, reason: str, now: float) -> Tries:
        """Return these and one more that did not serve the request.

        Args:
            reason: a short word, e.g. "busy", "reset".
            now: seconds on this node's monotonic clock.
        """
        more = replace(self, count=self.count + 1)
        if reason in NO_FAILURES:
            return more.waiting(now)
        return replace(more, passed_over={**self.passed_over, peer_id: reason})

    def waiting(self, now: float) -> Tries:
        """Return these with the time since when the request waits for somebody to have room."""
        return self if self.waiting_since is not None else replace(self, waiting_since=now)

    def may_go_on(self, *, failing: int = 0) -> bool:
        """Say whether another peer may be asked.

        Args:
            failing: 1 to ask whether it still may once the peer that has the request now has
                failed it too.
        """
        tried = len(self.passed_over) + failing
        lost = sum(reason in _LOST for reason in self.passed_over.values())
        return tried < _MAX_TRIED and tried - lost < _MAX_FAILED

    def __str__(self) -> str:
        """Return the reasons, for people: "reset, lost"."""
        return ", ".join(self.passed_over.values())
