"""Every peer as this node sees it: its load and its deeds, and for each service who goes first.

What changes is only noted; the next decision looks at those peers again. So news cost next to
nothing while nobody asks, and a decision costs what changed since the last one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from meshnode.core.ledger import Ledger, LedgerEntry
from meshnode.core.node_data import NodeData
from meshnode.core.peer_view import PeerView, Standing
from meshnode.core.ranking import Ranking
from meshnode.core.shortage import why_ambiguous, why_no_target, why_nobody_offers
from meshnode.errors import NoCandidate

# How many changes may pile up beyond the ledger's size before those of vanished peers are dropped.
_CHANGED_SLACK = 256


class Candidates:
    """The views of all peers, and the rankings of the services that were ever asked for."""

    def __init__(self, ledger: Ledger, self_id: str) -> None:
        self.ledger = ledger
        self.self_id = self_id
        self._views: dict[str, PeerView] = {}
        self._rankings: dict[str, Ranking] = {}
        self._changed: set[str] = set()  # peers to place anew before the next decision
        self._due: list[tuple[float, str]] = []  # a heap: when time alone changes a peer
        self._in_due: set[tuple[float, str]] = set()  # so that each stands in it once
        self._watchers: list[Callable[[str], None]] = []
        self._load_watchers: list[Callable[[str], None]] = []
        ledger.watch(self._note_news)

    # News

    def watch(self, watcher: Callable[[str], None], *, on_load: Callable[[str], None]) -> None:
        """Tell ``watcher`` of each peer with news, ``on_load`` of each whose load changed here."""
        self._watchers.append(watcher)
        self._load_watchers.append(on_load)

    def note(self, peer_id: str) -> None:
        """Remember that our requests changed a peer; the next decision looks at it again."""
        for watcher in self._load_watchers:
            watcher(peer_id)
        self._mark(peer_id)

    def _note_news(self, peer_id: str) -> None:
        for watcher in self._watchers:
            watcher(peer_id)
        self._mark(peer_id)

    def _mark(self, peer_id: str) -> None:
        if not self._rankings and peer_id not in self._views:
            return
        self._changed.add(peer_id)
        # A node that makes no requests never looks: drop those that the ledger dropped.
        if len(self._changed) > 2 * len(self.ledger) + _CHANGED_SLACK:
            for gone in [p for p in self._changed if self.ledger.get(p) is None]:
                self._follow(gone, None, 0.0)
                self._changed.discard(gone)

    # Peers

    def is_online(self, peer_id: str, now: float) -> bool:
        """Say whether the ledger has proof of life within the peer's window."""
        entry = self.ledger.get(peer_id)
        return entry is not None and now < entry.online_until

    def known(self, peer_id: str) -> PeerView | None:
        """Return the view of a peer that had one, though the ledger may have dropped it since."""
        return self._views.get(peer_id)

    def view(self, node: NodeData) -> PeerView:
        """Return the view of a peer, up to date with the announcement in the ledger."""
        view = self._views.get(node.id)
        if view is None:
            view = PeerView(node, node.usable_vram, is_self=node.id == self.self_id)
            self._views[node.id] = view
        elif view.node is not node:
            if view.node.seq == node.seq:
                view.node = node
            else:
                view.start_from(node)
        entry = self.ledger.get(node.id)
        view.suspicion = (entry.suspicion or "") if entry is not None else ""
        return view

    def standing(self, peer_id: str, service_id: str, now: float) -> Standing | None:
        """Return a peer's place in the order of the policy; None: offline, or not offered."""
        entry = self.ledger.get(peer_id)
        if entry is None or now >= entry.online_until or entry.node.service(service_id) is None:
            return None
        return self.view(entry.node).standing(service_id, now)

    # Services

    def ranking(self, service_id: str, now: float) -> Ranking:
        """Return who offers the service, in order.

        Raises:
            NoCandidate: nobody who is online does.
        """
        self._refresh(now)
        ranking = self._rankings.get(service_id)
        if ranking is None:
            ranking = self._rankings[service_id] = Ranking()
            for entry in self.ledger.offering(service_id, now):
                self._place(ranking, self.view(entry.node), service_id, now)
            self._let_back_surplus(service_id, ranking, now)
        if not self._anybody_online(ranking, now):
            self._rankings.pop(service_id, None)
            raise NoCandidate(why_nobody_offers(self.ledger, service_id, now))
        return ranking

    def aimed(self, service_id: str, target: str, now: float) -> PeerView:
        """Return the one peer that the caller asked for.

        Raises:
            NoCandidate: it is not there, or its name is not its alone.
        """
        self._refresh(now)
        named = self.ledger.get(target)
        # A peer ID goes before a name, so that no peer can pass for another by its name.
        if named is not None:
            offers = named.is_online_at(now) and named.node.service(service_id) is not None
            aimed = [named] if offers else []
        else:
            offering = self.ledger.offering(service_id, now)
            aimed = [entry for entry in offering if entry.node.name == target]
        if not aimed:
            raise NoCandidate(why_no_target(self.ledger, service_id, target, now))
        if len(aimed) > 1:
            raise NoCandidate(why_ambiguous(service_id, target, aimed))
        return self.view(aimed[0].node)

    def may_eject(self, service_id: str, now: float) -> bool:
        """Say whether one more of the service's peers may be put aside."""
        try:
            ranking = self.ranking(service_id, now)
        except NoCandidate:
            return False
        return len(ranking.ejected) < ranking.max_ejected

    def usual_opens(self, service_id: str, *, except_for: str) -> list[float]:
        """Return what opening the service usually takes at the other peers, in seconds."""
        opens = []
        for peer_id, view in self._views.items():
            slot = view.slots.get(service_id)
            if peer_id == except_for or slot is None or slot.circuit is None:
                continue
            usual = slot.circuit.usual_open
            if usual is not None:
                opens.append(usual)
        return opens

    # Keeping up

    def _anybody_online(self, ranking: Ranking, now: float) -> bool:
        return (
            any(self.is_online(standing.peer_id, now) for standing in ranking.ready)
            or any(self.is_online(standing.peer_id, now) for standing in ranking.crowded)
            or any(self.is_online(standing.peer_id, now) for standing in ranking.suspects)
            or any(self.is_online(standing.peer_id, now) for standing in ranking.held_back)
        )

    def _refresh(self, now: float) -> None:
        """Bring the rankings up to date with the ledger, with our own leases and with time."""
        while self._due and self._due[0][0] <= now:
            due = heapq.heappop(self._due)
            self._in_due.discard(due)
            self._changed.add(due[1])
        if not self._changed:
            return
        for peer_id in self._changed:
            entry = self.ledger.get(peer_id)
            online = entry is not None and now < entry.online_until
            self._follow(peer_id, entry if online else None, now)
        self._changed.clear()
        for service_id, ranking in self._rankings.items():
            self._let_back_surplus(service_id, ranking, now)

    def _follow(self, peer_id: str, entry: LedgerEntry | None, now: float) -> None:
        """Place one peer in the rankings of the services that it offers; None: it is offline."""
        for service_id, ranking in self._rankings.items():
            if entry is None or entry.node.service(service_id) is None:
                ranking.remove(peer_id)
            else:
                self._place(ranking, self.view(entry.node), service_id, now)
        if entry is None and self.ledger.get(peer_id) is None:
            view = self._views.get(peer_id)
            if view is not None and view.own == 0:
                del self._views[peer_id]

    def _place(self, ranking: Ranking, view: PeerView, service_id: str, now: float) -> None:
        standing = view.standing(service_id, now)
        ranking.place(standing)
        if standing.until is None:
            return
        due = (standing.until, standing.peer_id)
        if due not in self._in_due:
            self._in_due.add(due)
            heapq.heappush(self._due, due)

    def _let_back_surplus(self, service_id: str, ranking: Ranking, now: float) -> None:
        """Where others went and too many are put aside, end the ejections that are nearly over."""
        surplus = len(ranking.ejected) - ranking.max_ejected
        if surplus <= 0:
            return
        nearly_over = sorted(ranking.ejected.values(), key=lambda s: (s.until or 0.0, s.peer_id))
        for standing in nearly_over[:surplus]:
            view = self._views[standing.peer_id]
            view.circuit(service_id).let_back(now)
            ranking.place(view.standing(service_id, now))
