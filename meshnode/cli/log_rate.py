"""How many log lines of one kind may be written, so that no stranger can fill a disk with them.

The law here: a kind of line that is new is written at once, whatever floods beside it; what was
left out is counted, and the next line of that kind says how many.
"""

from __future__ import annotations

from dataclasses import dataclass

# Some dozens in a burst are worth reading one by one: a mesh of fifty nodes that comes up.
BURST = 100
RATE = 5.0  # lines per second of one kind, after a burst
# Kinds are this program's own words and those of its libraries; beyond these they share one budget.
_MAX_KINDS = 512


@dataclass(slots=True)
class _Budget:
    lines: float
    at: float
    left_out: int = 0


class LogRate:
    """Gives each kind of line its budget; times are seconds on any monotonic clock."""

    def __init__(self, *, burst: int = BURST, rate: float = RATE) -> None:
        self._burst = burst
        self._rate = rate
        self._budgets: dict[str, _Budget] = {}

    def take(self, kind: str, now: float) -> int | None:
        """Return how many lines of this kind were left out before this one; None: leave it out."""
        if kind not in self._budgets and len(self._budgets) >= _MAX_KINDS:
            kind = ""
        budget = self._budgets.setdefault(kind, _Budget(float(self._burst), now))
        budget.lines = min(float(self._burst), budget.lines + (now - budget.at) * self._rate)
        budget.at = now
        if budget.lines < 1.0:
            budget.left_out += 1
            return None
        budget.lines -= 1.0
        left_out, budget.left_out = budget.left_out, 0
        return left_out
