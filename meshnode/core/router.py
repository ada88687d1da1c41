"""Which peer serves a request: the ledger, the load and the policy make a lease.

What holds here, in whatever order leases end and news arrive:

- Picking a peer and counting the request on it are one synchronous step, so that a burst sees
  its own picks and spreads.
- This node's count of its own leases on a peer is exact: raised by the pick, lowered once by the
  release, on every way out.
- A peer's load is that count plus what the peer says others hold. What an announcement says
  includes our own leases, so those are taken off; a tunnel reply leaves them out by itself.
- What a tunnel reply said stands until the peer's next announcement.
- Nobody is picked who is full, put aside for failures, or a newcomer that has a request already
  while somebody proven is ready. Never all are put aside.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from meshnode.core.candidates import Candidates
from meshnode.core.circuit import Circuit
from meshnode.core.clusterrouting import deciding_tier, pick_best_replica
from meshnode.core.decision import MAX_ROWS, CandidateRow, Decision, Policy, Tier
from meshnode.core.lease import Lease, Record
from meshnode.core.lease_book import Dice, Ejection, LeaseBook
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData
from meshnode.core.peer_view import Standing
from meshnode.core.ranking import Ranking
from meshnode.core.shortage import why_none_is_ready
from meshnode.errors import AllFull, NoCandidate

__all__ = ["CandidateRow", "Decision", "Dice", "Lease", "Policy", "Router", "Tier"]

# What the decisions page shows. Beside their tables, 200 of them stay under 3 MB.
MAX_DECISIONS = 200

# How often the "random" policy casts again when it hits somebody who can't serve.
_CASTS = 8


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of one decision; the fields are the arguments of ``Router.lease``."""

    now: float
    wall_time: float | None
    service_id: str
    target: str | None
    exclude: Collection[str]
    attempt: int
    is_retry: bool


class Router:
    """Picks a peer for each request of this node, and counts what it sent where.

    Args:
        ledger: who is online and what they announced.
        self_id: this node's peer ID; it is a candidate like any other if it offers the service.
        policy: "vram" lets the most free VRAM win among the least loaded; "rotate" takes turns
            among them; "random" casts ``rng`` over all that can serve.
        rng: dice for the "random" policy.
        max_decisions: how many decisions to remember.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        self_id: str,
        policy: Policy,
        rng: Dice,
        max_decisions: int = MAX_DECISIONS,
    ) -> None:
        self.self_id = self_id
        self.policy: Policy = policy
        self._ledger = ledger
        self._rng = rng
        self._candidates = Candidates(ledger, self_id)
        self._book = LeaseBook(self._candidates, rng)
        self._records: deque[Record] = deque(maxlen=max_decisions)
        self._last_pick = 0.0

    # Requests

    def lease(
        self,
        *,
        now: float,
        wall_time: float | None = None,
        service_id: str,
        target: str | None = None,
        exclude: Collection[str] = (),
        attempt: int = 1,
        is_retry: bool = False,
    ) -> Lease:
        """Pick the peer that serves this request, and count the request on it.

        Args:
            now: seconds on this node's monotonic clock.
            wall_time: Unix seconds, kept with the decision for display.
            service_id: the service that the request is for.
            target: a peer ID, or a name that only one peer has; nobody else will do.
            exclude: peer IDs that this request tried already.
            attempt: 1 for the first peer asked.
            is_retry: a peer failed this request already; one that was only busy did not.

        Raises:
            AllFull: those who could serve it have as many requests as they take just now.
            RetriesSpent: so many requests are retried already that one more may not be.
            NoCandidate: nobody can serve it; the text says why and what to do.
        """
        request = _Request(now, wall_time, service_id, target, exclude, attempt, is_retry)
        decision = self._decide(request, self._rng)
        return self.claim(decision)

    def explain(
        self,
        *,
        now: float,
        wall_time: float | None = None,
        service_id: str,
        target: str | None = None,
        exclude: Collection[str] = (),
        attempt: int = 1,
        is_retry: bool = False,
    ) -> Decision:
        """Return what ``lease`` would decide now; nothing is counted and no dice are cast.

        Raises:
            NoCandidate: as ``lease``.
        """
        request = _Request(now, wall_time, service_id, target, exclude, attempt, is_retry)
        return self._decide(request, None)

    def decisions(self) -> tuple[Decision, ...]:
        """Return the last decisions, the newest first."""
        return tuple(record.decision for record in reversed(self._records))

    # For whoever chooses by more than load (core/model_router), and whoever waits

    def watch(
        self, watcher: Callable[[str], None], *, on_load: Callable[[str], None] | None = None
    ) -> None:
        """Tell ``watcher`` of each peer whose news, load or being online changed.

        Args:
            on_load: told instead where nothing but this node's own requests changed it.
        """
        self._candidates.watch(watcher, on_load=on_load or watcher)

    def on_ejection(self, told: Callable[[Ejection], None]) -> None:
        """Tell ``told`` of each peer that is put aside for its failures."""
        self._book.on_ejection = told

    def on_use(self, told: Callable[[str], None]) -> None:
        """Tell ``told`` of each peer, this node included, at both ends of a lease on it."""
        self._book.on_use = told

    def standing(self, peer_id: str, service_id: str, now: float) -> Standing | None:
        """Return a peer's place in the order of the policy; None: offline, or not offered.

        Of several, ``ranking.usable`` says which can be picked.
        """
        return self._candidates.standing(peer_id, service_id, now)

    def claim(self, decision: Decision) -> Lease:
        """Count a request on the peer that ``decision`` picked, and remember the decision.

        Call it in the same synchronous step as the decision. The peer's standing has been asked.

        Raises:
            RetriesSpent: it is a retry, and too many requests are retried already.
        """
        if decision.is_retry:
            self._book.check_retry()
        picked = decision.picked
        assert picked is not None  # dice were at hand
        record = Record(decision)
        lease = self._book.open(record, picked)
        self._mark_used(picked, decision.at)
        self._records.append(record)
        return lease

    # News

    def report(
        self,
        peer_id: str,
        service_id: str,
        *,
        others_in_flight: int,
        available_vram: int | None,
        now: float,
    ) -> None:
        """Take the numbers of a tunnel reply; they stand until the peer's next announcement.

        Args:
            others_in_flight: requests that others than this node hold on the service there.
            available_vram: bytes; None leaves what is known.
        """
        entry = self._ledger.get(peer_id)
        if entry is None:
            return  # forgotten since the tunnel was opened
        view = self._candidates.view(entry.node)
        view.report(service_id, others_in_flight, available_vram, now)
        self._candidates.note(peer_id)

    def hear(self, node: NodeData) -> None:
        """Take an announcement's numbers, at once after the ledger has observed it.

        A lease takes in what the ledger knows anyway; hearing it at once only counts our own
        leases off at the right moment.
        """
        view = self._candidates.known(node.id)
        if view is not None and node.seq > view.node.seq:
            view.start_from(node)
            self._candidates.note(node.id)

    def forget(self, peer_id: str) -> None:
        """Drop what is known of a lost peer's load, but for our own leases that are still open.

        How its requests went is kept; but should it come back, it is tried at once.
        """
        view = self._candidates.known(peer_id)
        if view is not None:
            view.start_over()
            self._candidates.note(peer_id)

    # Counts

    def own_in_flight(self, peer_id: str, service_id: str | None = None) -> int:
        """Return this node's open requests on a peer, on one service or on all of them."""
        view = self._candidates.known(peer_id)
        if view is None:
            return 0
        if service_id is None:
            return view.own
        slot = view.slots.get(service_id)
        return 0 if slot is None else slot.own

    def in_flight(self, peer_id: str, service_id: str) -> int:
        """Return the load that the policy sees: our open requests there, and the others'."""
        entry = self._ledger.get(peer_id)
        if entry is None:
            return self.own_in_flight(peer_id, service_id)
        slot = self._candidates.view(entry.node).slot(service_id)
        return slot.own + slot.others

    @property
    def own_total(self) -> int:
        """This node's open requests, over all peers and services."""
        return self._book.own_total

    def circuit(self, peer_id: str, service_id: str) -> Circuit | None:
        """Return how this node's requests to a peer's service went; None if it sent none."""
        view = self._candidates.known(peer_id)
        slot = None if view is None else view.slots.get(service_id)
        return None if slot is None else slot.circuit

    def _mark_used(self, peer_id: str, now: float) -> None:
        if self.policy != "rotate":
            return  # left equal, so that the most free VRAM decides among equals
        # Picks within one tick of the clock have an order too, or they would not rotate.
        self._last_pick = max(now, math.nextafter(self._last_pick, math.inf))
        view = self._candidates.known(peer_id)
        assert view is not None  # it was just picked
        view.last_used = self._last_pick
        self._candidates.note(peer_id)

    # Deciding

    def _decide(self, request: _Request, dice: Dice | None) -> Decision:
        choice = self._choose(request)
        best = choice.best
        if not best:
            text = why_none_is_ready(request.service_id, request.target, list(choice.others()))
            raise AllFull(text) if choice.may_wait else NoCandidate(text)
        picked: Standing | None
        tier: Tier
        if self.policy == "random" and len(best) > 1:
            picked, tier = self._throw(dice, choice.pools, request), "random"
        else:
            picked, tier = _pick(best)
        return Decision(
            at=request.now,
            wall_time=request.wall_time,
            service_id=request.service_id,
            policy=self.policy,
            target=request.target,
            attempt=request.attempt,
            is_retry=request.is_retry,
            candidates=choice.table(picked),
            candidates_total=choice.total,
            picked=None if picked is None else picked.peer_id,
            tier=tier if request.target is None else "target",
        )

    def _choose(self, request: _Request) -> _Choice:
        """Find who can be picked for this request."""
        if request.target is not None:
            ranking = self._aim(request, request.target)
        else:
            ranking = self._candidates.ranking(request.service_id, request.now)
        crowded = ranking.crowded
        # While one that is proven is ready, a newcomer gets no second request at a time.
        if any(self._is_able(peer_id, request) for peer_id in ranking.proven):
            pools, passed_over = [ranking.ready], crowded
        else:
            pools, passed_over = [ranking.ready, crowded] if crowded else [ranking.ready], []
        best, tried = self._sort_out(pools, request)
        if best:
            passed_over = [*passed_over, *ranking.suspects[:MAX_ROWS]]
        elif ranking.suspects:
            # One may well be there; whoever it fails goes on to the next peer.
            pools = [ranking.suspects]
            best, tried_too = self._sort_out(pools, request)
            tried += tried_too
        may_wait = not best and any(self._is_able(peer_id, request) for peer_id in ranking.full)
        return _Choice(request.now, best, pools, tried, passed_over, ranking, may_wait)

    def _sort_out(
        self, pools: list[list[Standing]], request: _Request
    ) -> tuple[list[Standing], list[CandidateRow]]:
        """Return the best MAX_ROWS that this request can have, and those it tried already."""
        best: list[Standing] = []
        tried: list[CandidateRow] = []
        for standing in merge(*pools) if len(pools) > 1 else pools[0]:
            if standing.peer_id in request.exclude:
                tried.append(standing.row._replace(excluded="already tried"))
            elif self._candidates.is_online(standing.peer_id, request.now):
                best.append(standing)
                if len(best) == MAX_ROWS:
                    break
        return best, tried

    def _aim(self, request: _Request, target: str) -> Ranking:
        """Return the one peer that the caller asked for, as a ranking of one."""
        view = self._candidates.aimed(request.service_id, target, request.now)
        ranking = Ranking()
        ranking.place(view.standing(request.service_id, request.now, pinned=True))
        return ranking

    def _throw(
        self, dice: Dice | None, pools: list[list[Standing]], request: _Request
    ) -> Standing | None:
        """Cast the dice over all that can serve, however loaded; None without dice."""
        if dice is None:
            return None
        everybody = pools[0] if len(pools) == 1 else [*pools[0], *pools[1]]
        # Nearly all of them can, as a rule, so a few casts spare a search through thousands.
        for _ in range(_CASTS):
            standing = everybody[dice.randrange(len(everybody))]
            if self._is_able(standing.peer_id, request):
                return standing
        able = [standing for standing in everybody if self._is_able(standing.peer_id, request)]
        return able[dice.randrange(len(able))]

    def _is_able(self, peer_id: str, request: _Request) -> bool:
        return peer_id not in request.exclude and self._candidates.is_online(peer_id, request.now)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Who can be picked for one request, and who can't."""

    now: float
    best: list[Standing]  # of those that can be, the best MAX_ROWS
    pools: list[list[Standing]]  # among whom they are, the tried and the silent too
    tried: list[CandidateRow]
    passed_over: list[Standing]  # newcomers that have a request already, and suspects
    ranking: Ranking
    may_wait: bool  # nobody can be, but those who are full could a moment later

    @property
    def total(self) -> int:
        return len(self.ranking)

    def others(self) -> Iterator[CandidateRow]:
        """Yield the rows of those that can't be picked, with the reasons."""
        yield from self.tried
        for standing in self.passed_over:
            yield standing.row_at(self.now, passed_over=True)
        for standing in self.ranking.held_back:
            yield standing.row_at(self.now)

    def table(self, picked: Standing | None) -> tuple[CandidateRow, ...]:
        """Return the rows to remember: the best, whoever was picked, and then the others."""
        rows = [standing.row for standing in self.best]
        if picked is not None and len(rows) == MAX_ROWS and picked not in self.best:
            rows[-1] = picked.row
        rows += islice(self.others(), MAX_ROWS - len(rows))
        return tuple(rows)


def _pick(best: list[Standing]) -> tuple[Standing, Tier]:
    """Pick by the policy among the best, which are in its order already."""
    chosen = pick_best_replica(standing.candidate for standing in best)
    assert chosen is best[0].candidate  # one policy: its order and its pick agree
    runner_up = best[1].candidate if len(best) > 1 else None
    return best[0], deciding_tier(chosen, runner_up)
