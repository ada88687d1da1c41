"""Whom to suspect when links fall silent: the peers, or this node itself.

One silent link says that its peer is gone. Most of them silent at once say, far more likely, that
this node's own cable is out, its own network is down, or it was itself asleep.
"""

from __future__ import annotations

from collections.abc import Collection

# One link alone can't tell whose fault it is.
_AT_LEAST = 2


def silent_links(last_heard: Collection[float], since: float) -> int:
    """Return how many links brought nothing since then.

    Args:
        last_heard: for each link, when bytes last came over it.
        since: a time after which every peer was asked for a sign of life; the same clock.
    """
    return sum(heard < since for heard in last_heard)


def seems_to_be_us(last_heard: Collection[float], since: float) -> bool:
    """Say whether more than half of the links fell silent at once; arguments as above."""
    silent = silent_links(last_heard, since)
    return silent >= _AT_LEAST and 2 * silent > len(last_heard)
