"""How often a node speaks: so seldom that all of them together stay within everybody's hearing.

Each of N nodes hears N announcements per interval. Past ``budget × base interval`` nodes (200 with
the defaults) the interval grows with N, so that the sum stays at the budget, and the online window
grows with the interval, so that as many announcements may be lost in a row as before:

    nodes     interval    window    heard
    100           10 s      40 s    10/s
    1,000         50 s     200 s    20/s
    10,000       500 s   2,000 s    20/s

Past 18,000 nodes the longest window that a reader grants bounds the interval, and the sum grows.

Between two beats a node tells changes of its load and memory. Each has its share of what all may
hear, so that the sum stays bounded though everybody's load changes all the time; and one whose load
seldom changes tells it at once, as its share has waited for it. What decides whether a node can be
used at all (its state, health, services, addresses) is not held back.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from meshnode.core.node_data import MAX_ONLINE_WINDOW, MIN_ONLINE_WINDOW

# At 0.7 ms each, 1.4 % of a core.
ANNOUNCEMENTS_PER_SECOND = 20.0
# A beat comes up to a tenth late by its jitter, so this many may be lost and one still be in time.
_LOST_IN_A_ROW = 2
_LATEST_BEAT = 1.1  # of an interval
# With changes; a node that tells one begins its next beat anew, so these are not on top of the 20.
CHANGES_PER_SECOND = 25.0
# Past this many nodes a change waits a little, for a thousand whose load changes at once.
_AT_ONCE_UP_TO = 200
_LONGEST_HEAD_START = 5.0  # seconds


def announce_interval(nodes: int, base: float, budget: float = ANNOUNCEMENTS_PER_SECOND) -> float:
    """Return the seconds between two announcements of one node.

    Args:
        nodes: how many are online, this one included.
        base: seconds between announcements in a small mesh.
        budget: announcements per second that a node shall hear at most.
    """
    longest = MAX_ONLINE_WINDOW / ((_LOST_IN_A_ROW + 1) * _LATEST_BEAT)
    return max(base, min(nodes / budget, longest))


def online_window(interval: float, base_interval: float, base_window: float) -> float:
    """Return the seconds of silence after which a node that announces each ``interval`` is gone.

    The window keeps its proportion to the interval, within what readers grant.
    """
    stretched = base_window * max(1.0, interval / base_interval)
    return min(max(stretched, MIN_ONLINE_WINDOW), MAX_ONLINE_WINDOW)


class Dice(Protocol):
    """Where chance comes from; ``random.Random`` is one."""

    def uniform(self, a: float, b: float, /) -> float: ...


class ChangePacer:
    """When one node may tell that its load changed.

    Times are seconds on this node's monotonic clock; ``nodes`` are those online, itself included.

    Args:
        rng: without dice, nodes that changed at once would speak at once for ever after.
        spacing: seconds between two announcements of one node, however small the mesh.
        budget: announcements per second that a node shall hear at most.
    """

    def __init__(
        self, rng: Dice, *, spacing: float = 1.0, budget: float = CHANGES_PER_SECOND
    ) -> None:
        self._rng = rng
        self._spacing = spacing
        self._budget = budget
        self._heard: deque[float] = deque(maxlen=max(1, int(budget)))
        self._not_before = float("-inf")

    def share(self, nodes: int) -> float:
        """Return the seconds between two changes of one node if all change all the time."""
        return max(self._spacing, nodes / self._budget)

    def heard(self, now: float) -> None:
        """Count an announcement of another node."""
        self._heard.append(now)

    def said(self, nodes: int, now: float) -> None:
        """Count an announcement of this node."""
        share = self.share(nodes)
        jitter = self._rng.uniform(0.5, 1.5) if share > self._spacing else 1.0
        self._not_before = now + share * jitter

    def first_try(self, nodes: int, now: float) -> float:
        """Return when to try to tell a change that came about now."""
        head_start = min(max(0.0, nodes / _AT_ONCE_UP_TO - 1.0), _LONGEST_HEAD_START)
        return max(now + self._rng.uniform(0.0, head_start), self._not_before)

    def try_again(self, nodes: int, now: float) -> float:
        """Return when to try again; ``now`` if it may be told now, as few others speak."""
        crowded = len(self._heard) == self._heard.maxlen and now - self._heard[0] < 1.0
        share = self.share(nodes)
        if not crowded or share <= self._spacing:
            return now
        return now + self._rng.uniform(0.0, share)
