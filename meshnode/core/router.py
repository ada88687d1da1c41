"""Which peer serves a request: the ledger, the load and the policy make a lease.

What holds here, in whatever order leases end and news arrive:

- Picking a peer and counting the request on it are one synchronous step, so that a burst sees
  its own picks and spreads.
- This node's count of its own leases on a peer is exact: raised by the pick, lowered once by the
  release, on every way out.
- A peer's load is that count plus what the peer says others hold. What an announcement says
  includes our own leases, so those are taken off; a tunnel reply leaves them out by itself.
- What a tunnel reply said stands until the peer's next announcement.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol

from meshnode.core.clusterrouting import deciding_tier, pick_best_replica
from meshnode.core.decision import MAX_ROWS, CandidateRow, Decision, Policy, Tier
from meshnode.core.lease import Lease, Record
from meshnode.core.ledger import Ledger, LedgerEntry
from meshnode.core.node_data import NodeData
from meshnode.core.peer_view import PeerView, Standing
from meshnode.core.ranking import Ranking
from meshnode.core.shortage import (
    why_ambiguous,
    why_no_target,
    why_nobody_offers,
    why_none_is_ready,
)
from meshnode.errors import NoCandidate

__all__ = ["CandidateRow", "Decision", "Dice", "Lease", "Policy", "Router", "Tier"]

# What the decisions page shows. Beside their tables, 200 of them stay under 3 MB.
MAX_DECISIONS = 200
# How many changes may pile up beyond the ledger's size before those of vanished peers are dropped.
_CHANGED_SLACK = 256

# How often the "random" policy casts again when it hits somebody who can't serve.
_CASTS = 8


class Dice(Protocol):
    """Where chance comes from; ``random.Random`` is one."""

    def randrange(self, stop: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of one decision; the fields are the arguments of ``Router.lease``."""

    now: float
    wall_time: float | None
    service_id: str
    target: str | None
    exclude: Collection[str]
    attempt: int


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
        self._views: dict[str, PeerView] = {}
        self._rankings: dict[str, Ranking] = {}  # for each service that was ever asked for
        self._changed: set[str] = set()  # peers to place anew before the next decision
        self._records: deque[Record] = deque(maxlen=max_decisions)
        self._last_pick = 0.0
        self._own_total = 0
        self._watchers: list[Callable[[str], None]] = []
        ledger.watch(self._note)

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
    ) -> Lease:
        """Pick the peer that serves this request, and count the request on it.

        Args:
            now: seconds on this node's monotonic clock.
            wall_time: Unix seconds, kept with the decision for display.
            service_id: the service that the request is for.
            target: a peer ID, or a name that only one peer has; nobody else will do.
            exclude: peer IDs that this request tried already.
            attempt: 1 for the first peer tried.

        Raises:
            NoCandidate: nobody can serve it; the text says why and what to do.
        """
        request = _Request(now, wall_time, service_id, target, exclude, attempt)
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
    ) -> Decision:
        """Return what ``lease`` would decide now; nothing is counted and no dice are cast.

        Raises:
            NoCandidate: as ``lease``.
        """
        request = _Request(now, wall_time, service_id, target, exclude, attempt)
        return self._decide(request, None)

    # For whoever chooses by more than load (core/model_router)

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Tell ``watcher`` of each peer whose news, load or being online changed."""
        self._watchers.append(watcher)

    def standing(self, peer_id: str, service_id: str, now: float) -> Standing | None:
        """Return a peer's place in the order of the policy; None: offline, or not offered."""
        entry = self._ledger.get(peer_id)
        if entry is None or now >= entry.online_until or entry.node.service(service_id) is None:
            return None
        return self._view(entry.node).standing(service_id)

    def claim(self, decision: Decision) -> Lease:
        """Count a request on the peer that ``decision`` picked, and remember the decision.

        Call it in the same synchronous step as the decision. The peer's standing has been asked.
        """
        picked, service_id = decision.picked, decision.service_id
        assert picked is not None  # dice were at hand
        self._count(picked, service_id, +1)
        self._mark_used(picked, decision.at)
        record = Record(decision)
        self._records.append(record)
        return Lease(
            record,
            peer_id=picked,
            service_id=service_id,
            is_local=picked == self.self_id,
            give_back=partial(self._count, picked, service_id, -1),
        )

    def decisions(self) -> tuple[Decision, ...]:
        """Return the last decisions, the newest first."""
        return tuple(record.decision for record in reversed(self._records))

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
        view = self._view(entry.node)
        view.report(service_id, others_in_flight, available_vram, now)
        self._note(peer_id)

    def hear(self, node: NodeData) -> None:
        """Take an announcement's numbers, at once after the ledger has observed it.

        A lease takes in what the ledger knows anyway; hearing it at once only counts our own
        leases off at the right moment.
        """
        view = self._views.get(node.id)
        if view is not None and node.seq > view.node.seq:
            view.start_from(node)
            self._note(node.id)

    def forget(self, peer_id: str) -> None:
        """Drop what is known of a peer's load, but for our own leases that are still open."""
        view = self._views.get(peer_id)
        if view is None:
            return
        view.last_used = 0.0
        view.start_from(view.node)
        self._note(peer_id)

    # Counts

    def own_in_flight(self, peer_id: str, service_id: str | None = None) -> int:
        """Return this node's open requests on a peer, on one service or on all of them."""
        view = self._views.get(peer_id)
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
        slot = self._view(entry.node).slot(service_id)
        return slot.own + slot.others

    @property
    def own_total(self) -> int:
        """This node's open requests, over all peers and services."""
        return self._own_total

    def _count(self, peer_id: str, service_id: str, change: int) -> None:
        self._views[peer_id].count(service_id, change)
        self._own_total += change
        self._note(peer_id)

    def _mark_used(self, peer_id: str, now: float) -> None:
        if self.policy != "rotate":
            return  # left equal, so that the most free VRAM decides among equals
        # Picks within one tick of the clock have an order too, or they would not rotate.
        self._last_pick = max(now, math.nextafter(self._last_pick, math.inf))
        self._views[peer_id].last_used = self._last_pick
        self._note(peer_id)

    # Deciding

    def _decide(self, request: _Request, dice: Dice | None) -> Decision:
        self._refresh(request.now)
        if request.target is None:
            ranking = self._ranking(request)
        else:
            ranking = self._aim(request, request.target)
        best, tried = self._sort_out(ranking.ready, request)
        if not best:
            held_back = [standing.row for standing in ranking.held_back.values()]
            raise NoCandidate(
                why_none_is_ready(request.service_id, request.target, [*tried, *held_back])
            )
        picked: Standing | None
        tier: Tier
        if self.policy == "random" and len(best) > 1:
            picked, tier = self._throw(dice, ranking.ready, request), "random"
        else:
            picked, tier = _pick(best)
        return Decision(
            at=request.now,
            wall_time=request.wall_time,
            service_id=request.service_id,
            policy=self.policy,
            target=request.target,
            attempt=request.attempt,
            candidates=_table(best, picked, tried, ranking),
            candidates_total=len(ranking),
            picked=None if picked is None else picked.peer_id,
            tier=tier if request.target is None else "target",
        )

    def _sort_out(
        self, ready: list[Standing], request: _Request
    ) -> tuple[list[Standing], list[CandidateRow]]:
        """Return the best MAX_ROWS that this request can have, and those it tried already."""
        best: list[Standing] = []
        tried: list[CandidateRow] = []
        for standing in ready:
            if standing.peer_id in request.exclude:
                tried.append(replace(standing.row, excluded="already tried"))
            elif self._is_online(standing.peer_id, request.now):
                best.append(standing)
                if len(best) == MAX_ROWS:
                    break
        return best, tried

    def _throw(
        self, dice: Dice | None, ready: list[Standing], request: _Request
    ) -> Standing | None:
        """Cast the dice over all that can serve, however loaded; None without dice."""
        if dice is None:
            return None
        # Nearly all of them can, as a rule, so a few casts spare a search through thousands.
        for _ in range(_CASTS):
            standing = ready[dice.randrange(len(ready))]
            if self._is_able(standing.peer_id, request):
                return standing
        able = [standing for standing in ready if self._is_able(standing.peer_id, request)]
        return able[dice.randrange(len(able))]

    def _is_able(self, peer_id: str, request: _Request) -> bool:
        return peer_id not in request.exclude and self._is_online(peer_id, request.now)

    def _is_online(self, peer_id: str, now: float) -> bool:
        entry = self._ledger.get(peer_id)
        return entry is not None and now < entry.online_until

    def _ranking(self, request: _Request) -> Ranking:
        """Return who offers the service, in order.

        Raises:
            NoCandidate: nobody who is online does.
        """
        service_id, now = request.service_id, request.now
        ranking = self._rankings.get(service_id)
        if ranking is None:
            ranking = Ranking()
            for entry in self._ledger.offering(service_id, now):
                ranking.place(self._view(entry.node).standing(service_id))
        if not any(self._is_online(s.peer_id, now) for s in ranking.ready) and not any(
            self._is_online(peer_id, now) for peer_id in ranking.held_back
        ):
            self._rankings.pop(service_id, None)
            raise NoCandidate(why_nobody_offers(self._ledger, service_id, now))
        self._rankings[service_id] = ranking
        return ranking

    def _aim(self, request: _Request, target: str) -> Ranking:
        """Return the one peer that the caller asked for, as a ranking of one.

        Raises:
            NoCandidate: it is not there, or its name is not its alone.
        """
        service_id, now = request.service_id, request.now
        named = self._ledger.get(target)
        # A peer ID goes before a name, so that no peer can pass for another by its name.
        if named is not None:
            offers = named.is_online_at(now) and named.node.service(service_id) is not None
            aimed = [named] if offers else []
        else:
            offering = self._ledger.offering(service_id, now)
            aimed = [entry for entry in offering if entry.node.name == target]
        if not aimed:
            raise NoCandidate(why_no_target(self._ledger, service_id, target, now))
        if len(aimed) > 1:
            raise NoCandidate(why_ambiguous(service_id, target, aimed))
        ranking = Ranking()
        ranking.place(self._view(aimed[0].node).standing(service_id))
        return ranking

    # Keeping up

    def _note(self, peer_id: str) -> None:
        """Remember that a peer changed; the next decision looks at it again."""
        for watcher in self._watchers:
            watcher(peer_id)
        if not self._rankings and peer_id not in self._views:
            return
        self._changed.add(peer_id)
        # A node that makes no requests never looks: drop those that the ledger dropped.
        if len(self._changed) > 2 * len(self._ledger) + _CHANGED_SLACK:
            for gone in [p for p in self._changed if self._ledger.get(p) is None]:
                self._follow(gone, None)
                self._changed.discard(gone)

    def _refresh(self, now: float) -> None:
        """Bring the rankings up to date with the ledger and with our own leases."""
        for peer_id in self._changed:
            entry = self._ledger.get(peer_id)
            online = entry is not None and now < entry.online_until
            self._follow(peer_id, entry if online else None)
        self._changed.clear()

    def _follow(self, peer_id: str, entry: LedgerEntry | None) -> None:
        """Place one peer in the rankings of the services that it offers; None: it is offline."""
        for service_id, ranking in self._rankings.items():
            if entry is None or entry.node.service(service_id) is None:
                ranking.remove(peer_id)
            else:
                ranking.place(self._view(entry.node).standing(service_id))
        if entry is None and self._ledger.get(peer_id) is None:
            view = self._views.get(peer_id)
            if view is not None and view.own == 0:
                del self._views[peer_id]

    def _view(self, node: NodeData) -> PeerView:
        """Return the view of a peer, up to date with the announcement in the ledger."""
        view = self._views.get(node.id)
        if view is None:
            view = self._views[node.id] = PeerView(node, node.usable_vram)
        elif view.node is not node:
            if view.node.seq == node.seq:
                view.node = node
            else:
                view.start_from(node)
        return view


def _pick(best: list[Standing]) -> tuple[Standing, Tier]:
    """Pick by the policy among the best, which are in its order already."""
    chosen = pick_best_replica(standing.candidate for standing in best)
    assert chosen is best[0].candidate  # one policy: its order and its pick agree
    runner_up = best[1].candidate if len(best) > 1 else None
    return best[0], deciding_tier(chosen, runner_up)


def _table(
    best: list[Standing], picked: Standing | None, tried: list[CandidateRow], ranking: Ranking
) -> tuple[CandidateRow, ...]:
    """Return the rows to remember: the best, whoever was picked, and then the excluded."""
    rows = [standing.row for standing in best]
    if picked is not None and len(best) == MAX_ROWS and picked not in best:
        rows[-1] = picked.row
    rows += tried[: MAX_ROWS - len(rows)]
    held_back = islice(ranking.held_back.values(), MAX_ROWS - len(rows))
    rows += [standing.row for standing in held_back]
    return tuple(rows)
