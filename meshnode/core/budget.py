"""How often a node speaks: so seldom that all of them together stay within everybody's hearing.

Each of N nodes hears N announcements per interval. Past ``budget × base interval`` nodes (200 with
the defaults) the interval grows with N, so that the sum stays at the budget, and the online window
grows with the interval, so that as many announcements may be lost in a row as before:

    nodes     interval    window    heard
    100           10 s      40 s    10/s
    1,000         50 s     200 s    20/s
    10,000       500 s   2,000 s    20/s

Past 18,000 nodes the longest window that a reader grants bounds the interval, and the sum grows.
"""

from __future__ import annotations

from meshnode.core.node_data import MAX_ONLINE_WINDOW, MIN_ONLINE_WINDOW

# At 0.7 ms each, 1.4 % of a core.
ANNOUNCEMENTS_PER_SECOND = 20.0
# A beat comes up to a tenth late by its jitter, so this many may be lost and one still be in time.
_LOST_IN_A_ROW = 2
_LATEST_BEAT = 1.1  # of an interval


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
