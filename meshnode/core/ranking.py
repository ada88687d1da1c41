"""Who can serve one service, kept in the order of the policy, so that a pick needs no search.

A mesh of thousands changes by a few peers between two requests. Moving those few costs
microseconds; ranking all of them for every request would cost milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from meshnode.core.peer_view import Standing


class Ranking:
    """The standings of all peers that offer one service."""

    __slots__ = ("_placed", "held_back", "ready")

    def __init__(self) -> None:
        self.ready: list[Standing] = []  # those that can be picked, the best first
        self.held_back: dict[str, Standing] = {}  # those that can't, by peer ID
        self._placed: dict[str, Standing] = {}  # those in ``ready``, by peer ID

    def __len__(self) -> int:
        return len(self.ready) + len(self.held_back)

    def place(self, standing: Standing) -> None:
        """Put a peer where its numbers of now belong."""
        self.remove(standing.peer_id)
        if standing.row.excluded is None:
            insort(self.ready, standing)
            self._placed[standing.peer_id] = standing
        else:
            self.held_back[standing.peer_id] = standing

    def remove(self, peer_id: str) -> None:
        """Take a peer out, if it is in."""
        placed = self._placed.pop(peer_id, None)
        if placed is not None:
            del self.ready[bisect_left(self.ready, placed)]
        else:
            self.held_back.pop(peer_id, None)
