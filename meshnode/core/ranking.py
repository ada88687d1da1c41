"""Who can serve one service, kept in the order of the policy, so that a pick needs no search.

A mesh of thousands changes by a few peers between two requests. Moving those few costs
microseconds; ranking all of them for every request would cost milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from meshnode.core.peer_view import Group, Standing


class Ranking:
    """The standings of all peers that offer one service."""

    __slots__ = ("_placed", "crowded", "ejected", "full", "out", "proven", "ready", "suspects")

    def __init__(self) -> None:
        self.ready: list[Standing] = []  # those that can be picked, the best first
        self.crowded: list[Standing] = []  # newcomers that have a request, the best first
        self.suspects: list[Standing] = []  # for when nobody else is left, the best first
        self.proven: set[str] = set()  # peer IDs of those in ``ready`` that are no newcomers
        self.full: dict[str, Standing] = {}  # the others by peer ID
        self.ejected: dict[str, Standing] = {}
        self.out: dict[str, Standing] = {}
        self._placed: dict[str, Standing] = {}  # everybody

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def max_ejected(self) -> int:
        """How many may be put aside: half of those that could serve, so that it is never all."""
        return (len(self._placed) - len(self.out)) // 2

    @property
    def held_back(self) -> Iterable[Standing]:
        """Those that can't be picked."""
        for group in (self.full, self.ejected, self.out):
            yield from group.values()

    def place(self, standing: Standing) -> None:
        """Put a peer where its numbers of now belong."""
        peer_id = standing.peer_id
        self.remove(peer_id)
        self._placed[peer_id] = standing
        match standing.group:
            case Group.READY:
                insort(self.ready, standing)
                if standing.is_proven:
                    self.proven.add(peer_id)
            case Group.CROWDED:
                insort(self.crowded, standing)
            case Group.SUSPECT:
                insort(self.suspects, standing)
            case Group.FULL:
                self.full[peer_id] = standing
            case Group.EJECTED:
                self.ejected[peer_id] = standing
            case Group.OUT:
                self.out[peer_id] = standing

    def remove(self, peer_id: str) -> None:
        """Take a peer out, if it is in."""
        placed = self._placed.pop(peer_id, None)
        if placed is None:
            return
        match placed.group:
            case Group.READY:
                del self.ready[bisect_left(self.ready, placed)]
                self.proven.discard(peer_id)
            case Group.CROWDED:
                del self.crowded[bisect_left(self.crowded, placed)]
            case Group.SUSPECT:
                del self.suspects[bisect_left(self.suspects, placed)]
            case Group.FULL:
                del self.full[peer_id]
            case Group.EJECTED:
                del self.ejected[peer_id]
            case Group.OUT:
                del self.out[peer_id]


def usable(standings: Iterable[Standing]) -> list[Standing]:
    """Return those of a few peers that can be picked, in the order given.

    Newcomers that have a request already are among them only if nobody proven can be picked,
    suspects only if nobody else can.
    """
    ready, crowded, suspects, proven = [], [], [], False
    for standing in standings:
        if standing.group is Group.READY:
            ready.append(standing)
            proven = proven or standing.is_proven
        elif standing.group is Group.CROWDED:
            crowded.append(standing)
        elif standing.group is Group.SUSPECT:
            suspects.append(standing)
    return ready if proven else [*ready, *crowded] or suspects
