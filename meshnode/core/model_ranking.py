"""Who can serve one model, kept in the order of the policy, so that a pick needs no search."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from meshnode.core.decision import CandidateRow, Tier
from meshnode.core.model_index import Place
from meshnode.core.peer_view import Standing


class Candidate(NamedTuple):
    """One service that may have the model; peer and service IDs make every order total."""

    # Requests in flight, whether the model must be loaded first, last use, less free VRAM.
    rank: tuple[int, bool, float, int]
    peer_id: str
    service_id: str
    row: CandidateRow
    loaded: bool

    @property
    def place(self) -> Place:
        return (self.peer_id, self.service_id)

    @property
    def in_flight(self) -> int:
        return self.rank[0]


def candidate(standing: Standing, service_id: str, loaded: bool) -> Candidate:
    """Return a standing as a candidate for one model."""
    in_flight, last_used, less_vram = standing.rank
    row = replace(standing.row, service_id=service_id, loaded=loaded)
    rank = (in_flight, not loaded, last_used, less_vram)
    return Candidate(rank, standing.peer_id, service_id, row, loaded)


def deciding_tier(best: Candidate, runner_up: Candidate | None) -> Tier:
    """Say which tier set the best apart from the second best."""
    if runner_up is None:
        return "only"
    tiers: tuple[Tier, ...] = ("in_flight", "loaded", "last_used", "vram")
    for tier, one, other in zip(tiers, best.rank, runner_up.rank, strict=True):
        if one != other:
            return tier
    return "first_listed"


class ModelRanking:
    """The candidates for one model."""

    __slots__ = ("_by_peer", "_placed", "held_back", "ready", "serial")

    def __init__(self) -> None:
        self.ready: list[Candidate] = []  # those that can be picked, the best first
        self.held_back: dict[Place, Candidate] = {}
        self.serial = 0  # of the last change that it took in
        self._placed: dict[Place, Candidate] = {}  # those in ``ready``
        self._by_peer: dict[str, list[Place]] = {}

    def __len__(self) -> int:
        return len(self.ready) + len(self.held_back)

    @property
    def placed(self) -> Mapping[Place, Candidate]:
        """Those that can be picked, by place."""
        return self._placed

    def put(self, peer_id: str, candidates: Iterable[Candidate]) -> None:
        """Put a peer's services where their numbers of now belong; none takes the peer out."""
        for place in self._by_peer.pop(peer_id, ()):
            placed = self._placed.pop(place, None)
            if placed is not None:
                del self.ready[bisect_left(self.ready, placed)]
            else:
                del self.held_back[place]
        for each in candidates:
            self._by_peer.setdefault(peer_id, []).append(each.place)
            if each.row.excluded is None:
                insort(self.ready, each)
                self._placed[each.place] = each
            else:
                self.held_back[each.place] = each

    def excluded_rows(self) -> Iterator[CandidateRow]:
        """Yield the rows of those that can't be picked."""
        for each in self.held_back.values():
            yield each.row
