"""Who can serve one model, kept in the order of the policy, so that a pick needs no search."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from typing import NamedTuple

from meshnode.core.decision import CandidateRow, Tier
from meshnode.core.model_index import Place
from meshnode.core.peer_view import Group, Standing


class Candidate(NamedTuple):
    """One service that may have the model; peer and service IDs make every order total."""

    # Requests in flight, whether the model must be loaded first, last use, less free VRAM.
    rank: tuple[int, bool, float, int]
    peer_id: str
    service_id: str
    standing: Standing
    loaded: bool
    place: Place
    row: CandidateRow  # the standing's

    @property
    def in_flight(self) -> int:
        return self.rank[0]


def candidate(standing: Standing, service_id: str, loaded: bool) -> Candidate:
    """Return a standing as a candidate for one model."""
    in_flight, last_used, less_vram = standing.rank
    # Here and not in each decision, as that shows fifty of them and a request changes one.
    # By position: _replace costs three times as much.
    row = CandidateRow(*standing.row[:9], service_id, loaded)
    peer_id = standing.peer_id
    shown = Standing(standing.rank, peer_id, standing.candidate, row, *standing[4:])
    rank = (in_flight, not loaded, last_used, less_vram)
    return Candidate(rank, peer_id, service_id, shown, loaded, (peer_id, service_id), row)


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

    __slots__ = ("_by_peer", "_placed", "_proven", "crowded", "held_back", "ready", "serial")

    def __init__(self) -> None:
        self.ready: list[Candidate] = []  # those that can be picked, the best first
        self.crowded: list[Candidate] = []  # newcomers that have a request, the best first
        self.held_back: dict[Place, Candidate] = {}
        self.serial = 0  # of the last change that it took in
        self._proven = 0  # how many in ``ready`` are no newcomers
        self._placed: dict[Place, Candidate] = {}  # everybody
        self._by_peer: dict[str, list[Place]] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def able(self, may: Callable[[Candidate], bool] | None) -> Sequence[Candidate]:
        """Return those that can be picked, the best first; the others are ``passed_over``.

        While one that is proven is among them, a newcomer gets no second request at a time.

        Args:
            may: whether the request can have one; None: it can have any.
        """
        if may is None and (self._proven or not self.crowded):
            return self.ready
        ready = [each for each in self.ready if may is None or may(each)]
        if any(each.standing.is_proven for each in ready):
            return ready
        crowded = [each for each in self.crowded if may is None or may(each)]
        return list(merge(ready, crowded)) if crowded else ready

    def find(self, place: Place, able: Sequence[Candidate]) -> Candidate | None:
        """Return who stands at a place, if it is among those that are ``able``."""
        each = self._placed.get(place)
        if each is None or each.standing.group not in (Group.READY, Group.CROWDED):
            return None
        if able is self.ready:
            return each if each.standing.group is Group.READY else None
        return each if each in able else None

    def put(self, peer_id: str, candidates: Iterable[Candidate]) -> None:
        """Put a peer's services where their numbers of now belong; none takes the peer out."""
        for place in self._by_peer.pop(peer_id, ()):
            self._take_out(self._placed.pop(place))
        for each in candidates:
            self._by_peer.setdefault(peer_id, []).append(each.place)
            self._placed[each.place] = each
            if each.standing.group is Group.READY:
                insort(self.ready, each)
                self._proven += each.standing.is_proven
            elif each.standing.group is Group.CROWDED:
                insort(self.crowded, each)
            else:
                self.held_back[each.place] = each

    def _take_out(self, each: Candidate) -> None:
        if each.standing.group is Group.READY:
            del self.ready[bisect_left(self.ready, each)]
            self._proven -= each.standing.is_proven
        elif each.standing.group is Group.CROWDED:
            del self.crowded[bisect_left(self.crowded, each)]
        else:
            del self.held_back[each.place]

    def excluded(
        self, may: Callable[[Candidate], bool], able: Sequence[Candidate], now: float
    ) -> Iterator[CandidateRow]:
        """Yield the rows of those that can't be picked, with the reasons."""
        if able is not self.ready:
            for each in self.ready:
                if not may(each):
                    yield each.row._replace(excluded="already tried")
        for each in self.crowded:
            if not may(each):
                yield each.row._replace(excluded="already tried")
            elif able is self.ready or each not in able:
                yield each.standing.row_at(now, passed_over=True)
        for each in self.held_back.values():
            yield each.standing.row_at(now)
