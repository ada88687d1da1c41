"""The router against brute force: leases end in any order while peers come, go and report.

The model keeps plain numbers, and ranks every peer anew for every pick.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshnode.core.clusterrouting import ReplicaCandidate, pick_best_replica
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.router import Lease, Policy, Router
from meshnode.errors import AllFull, NoCandidate

PEERS = ["self", "a", "b", "c", "d"]
SERVICES = ["chat", "embed"]
peers = st.sampled_from(PEERS)
services = st.sampled_from(SERVICES)


@dataclass
class Offer:
    """What a peer announced of one service."""

    in_flight: int
    limit: int
    healthy: bool


@dataclass
class Peer:
    """What the model knows of one peer; counts of our leases are kept apart."""

    seq: int
    state: str
    vram: int
    last_seen: float
    offers: dict[str, Offer]
    others: dict[str, int] = field(default_factory=dict)
    down: bool = False
    answered: dict[str, tuple[str, float]] = field(default_factory=dict)  # until when it holds

    def online(self, now: float) -> bool:
        return self.state != "leaving" and not self.down and now - self.last_seen < 40


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ledger = Ledger("self")
        self.peers: dict[str, Peer] = {}
        self.leases: list[Lease] = []
        self.own: Counter[tuple[str, str]] = Counter()
        self.order: dict[str, int] = {}  # peer -> which pick was its last, where turns count
        self.picks = 0
        self.seqs: Counter[str] = Counter()
        self.successes: Counter[tuple[str, str]] = Counter()

    @initialize(policy=st.sampled_from(["vram", "rotate", "random"]))
    def start(self, policy: Policy) -> None:
        self.router = Router(
            self.ledger, self_id="self", policy=policy, rng=random.Random(1), max_decisions=5
        )
        # Start with a mesh at work, so that few steps are lost on building one.
        for peer_id in PEERS[:4]:
            offers = {service: Offer(0, 0, True) for service in SERVICES}
            self.announce(peer_id, "up", 8, offers, True)

    # What may happen

    @rule(seconds=st.sampled_from([0, 1, 20, 39, 40]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(
        peer_id=peers,
        state=st.sampled_from(["up", "up", "up", "draining", "leaving"]),
        vram=st.sampled_from([0, 8, 8, 24, 2**63]),
        offers=st.dictionaries(
            services,
            st.builds(
                Offer,
                st.integers(0, 4),
                st.sampled_from([0, 0, 1, 3]),
                st.sampled_from([True, True, False]),
            ),
        ),
        to_router=st.booleans(),
    )
    def announce(
        self, peer_id: str, state: Any, vram: int, offers: dict[str, Offer], to_router: bool
    ) -> None:
        self.seqs[peer_id] += 1
        listed = tuple(
            ServiceData(
                service_id=s, in_flight=o.in_flight, max_in_flight=o.limit, healthy=o.healthy
            )
            for s, o in offers.items()
        )
        node = NodeData(
            id=peer_id, seq=self.seqs[peer_id], state=state, available_vram=vram, services=listed
        )
        self.ledger.observe(node, now=self.now)
        # The router must see what the ledger saw, told or not; told twice is told once.
        if to_router:
            self.router.hear(node)
        self.router.in_flight(peer_id, "chat")
        self.router.hear(node)
        credible = vram if vram <= 2**44 else 0
        peer = self.peers[peer_id] = Peer(self.seqs[peer_id], state, credible, self.now, offers)
        for service in SERVICES:
            announced = offers[service].in_flight if service in offers else 0
            peer.others[service] = max(0, announced - self.own[peer_id, service])

    @rule(
        peer_id=peers,
        service=services,
        others=st.integers(0, 4),
        vram=st.sampled_from([None, 0, 9]),
    )
    def a_tunnel_replies(self, peer_id: str, service: str, others: int, vram: int | None) -> None:
        self.router.report(
            peer_id, service, others_in_flight=others, available_vram=vram, now=self.now
        )
        peer = self.peers.get(peer_id)
        if peer is not None:
            peer.others[service] = others
            peer.vram = peer.vram if vram is None else vram

    @rule(peer_id=peers)
    def bytes_arrive(self, peer_id: str) -> None:
        self.ledger.touch(peer_id, self.now)
        peer = self.peers.get(peer_id)
        if peer is not None and peer.state != "leaving":
            peer.last_seen, peer.down = self.now, False

    @rule(peer_id=peers)
    def found_dead(self, peer_id: str) -> None:
        if self.ledger.mark_down(peer_id, "cut", self.now):
            self.peers[peer_id].down = True

    @rule()
    def expire(self) -> None:
        self.ledger.expire(self.now)

    @rule(peer_id=st.sampled_from(PEERS[1:]))
    def forget(self, peer_id: str) -> None:
        self.ledger.forget(peer_id, self.now)
        self.router.forget(peer_id)
        if not any(lease.peer_id == peer_id for lease in self.leases):
            for service in SERVICES:  # the next decision drops what it did
                self.successes.pop((peer_id, service), None)
            with contextlib.suppress(NoCandidate):
                self.router.explain(now=self.now, service_id="chat")
        self.peers.pop(peer_id, None)
        self.order.pop(peer_id, None)

    @rule(service=services, exclude=st.frozensets(peers, max_size=2), explain_first=st.booleans())
    def lease(self, service: str, exclude: frozenset[str], explain_first: bool) -> None:
        self.look(service)
        able, full = self.able(service, exclude)
        request: dict[str, Any] = {"now": self.now, "service_id": service, "exclude": exclude}
        if not able:
            with pytest.raises(NoCandidate, match=r"service '(chat|embed)'") as caught:
                self.router.lease(**request)
            assert isinstance(caught.value, AllFull) == bool(full)
            return
        foretold = self.router.explain(**request) if explain_first else None
        lease = self.router.lease(**request)
        decision = lease.decision
        if self.router.policy == "random":
            assert lease.peer_id in {candidate.node_id for candidate in able}
            assert decision.tier == ("random" if len(able) > 1 else "only")
        else:
            best = pick_best_replica(able)
            assert best is not None
            assert lease.peer_id == best.node_id
            assert foretold in (None, decision)
            assert (decision.tier == "only") == (len(able) == 1)
        assert [r.peer_id for r in decision.candidates if r.excluded is None] == [
            c.node_id
            for c in sorted(able, key=lambda c: (c.in_flight, c.last_used, -c.available_vram))
        ]
        self.picked(lease)

    @rule(service=services, count=st.integers(2, 6))
    def a_burst(self, service: str, count: int) -> None:
        for _ in range(count):
            self.lease(service, frozenset(), False)

    @rule(peer_id=peers, more=st.integers(0, 3))
    def a_busy_peer_announces_its_load(self, peer_id: str, more: int) -> None:
        offers = {
            service: Offer(self.own[peer_id, service] + more, 0, True) for service in SERVICES
        }
        self.announce(peer_id, "up", 8, offers, False)

    @rule(service=services, wanted=peers, exclude=st.frozensets(peers, max_size=1))
    def lease_of_one(self, service: str, wanted: str, exclude: frozenset[str]) -> None:
        able = self.able_if_pinned(service, exclude)
        request: dict[str, Any] = {"now": self.now, "service_id": service, "target": wanted}
        if wanted not in able:
            with pytest.raises(NoCandidate):
                self.router.lease(**request, exclude=exclude)
            return
        lease = self.router.lease(**request, exclude=exclude)
        assert (lease.peer_id, lease.decision.tier) == (wanted, "target")
        self.picked(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), how=st.sampled_from(["release", "with", "raise", "twice", "settle"]))
    def a_request_ends(self, data: st.DataObject, how: str) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1), label="which"))
        if how == "with":
            with lease:
                pass
        elif how == "raise":
            with pytest.raises(ZeroDivisionError), lease:
                raise ZeroDivisionError
        else:
            if how == "settle":
                lease.settle("ok", duration=1.0)
            lease.release()
            if how == "twice":
                lease.release()
        assert lease.decision.outcome == ("ok" if how == "settle" else "released")
        self.own[lease.peer_id, lease.service_id] -= 1
        if lease.verdict == "ok":
            self.forget_answer(lease.peer_id, lease.service_id)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), verdicts=st.integers(1, 3))
    def requests_succeed(self, data: st.DataObject, verdicts: int) -> None:
        for _ in range(verdicts):
            lease = data.draw(st.sampled_from(self.leases), label="which")
            key = (lease.peer_id, lease.service_id)
            if lease.verdict is None:
                self.successes[key] = min(3, self.successes[key] + 1)
                self.forget_answer(*key)
            lease.succeeded(0.01, now=self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), reason=st.sampled_from(["reset", "reset", "busy", "draining"]))
    def a_request_fails(self, data: st.DataObject, reason: str) -> None:
        lease = data.draw(st.sampled_from(self.leases), label="which")
        key = (lease.peer_id, lease.service_id)
        peer = self.peers.get(lease.peer_id)
        if lease.verdict in (None, "ok") and reason in ("busy", "draining"):
            if peer is not None:
                hold = 1.0 if reason == "busy" else 10.0
                peer.answered[lease.service_id] = (reason, self.now + hold)
        elif lease.verdict == "ok":
            self.successes[key] -= 1
        lease.failed(reason, now=self.now)

    # The model's own rules

    def look(self, service: str) -> None:
        """Let the router take in what changed, so that its circuits can be asked."""
        with contextlib.suppress(NoCandidate):
            self.router.explain(now=self.now, service_id=service)

    def forget_answer(self, peer_id: str, service: str) -> None:
        if peer_id in self.peers:
            self.peers[peer_id].answered.pop(service, None)

    def offering(self, service: str, exclude: frozenset[str]) -> list[tuple[str, Peer, int, str]]:
        """Return who is online and well: peer ID, peer, load, and what it answered."""
        offering = []
        for peer_id in sorted(self.peers):
            peer = self.peers[peer_id]
            offer = peer.offers.get(service)
            if offer is None or not peer.online(self.now) or peer_id in exclude:
                continue
            load = self.own[peer_id, service] + peer.others[service]
            answer, until = peer.answered.get(service, ("", 0.0))
            answer = answer if self.now < until else ""
            if peer.state == "up" and offer.healthy and answer != "draining":
                at_limit = 0 < offer.limit <= load
                offering.append((peer_id, peer, load, "full" if at_limit or answer else ""))
        return offering

    def able_if_pinned(self, service: str, exclude: frozenset[str]) -> set[str]:
        return {p for p, _, _, full in self.offering(service, exclude) if not full}

    def able(self, service: str, exclude: frozenset[str]) -> tuple[list[ReplicaCandidate], bool]:
        """Return who can be picked, and whether somebody is full."""
        able, crowded, any_full, any_proven = [], set(), False, False
        for peer_id, peer, load, full in self.offering(service, exclude):
            circuit = self.router.circuit(peer_id, service)
            if circuit is not None and circuit.state_at(self.now) == "open":
                continue
            if full or (circuit is not None and circuit.in_trial):
                any_full = True
                continue
            proven = self.successes[peer_id, service] == 3
            any_proven = any_proven or proven
            if self.own[peer_id, service] and not proven and peer_id != "self":
                crowded.add(peer_id)
            last_used = self.order.get(peer_id, 0)
            able.append(
                ReplicaCandidate(
                    peer_id, in_flight=load, last_used=last_used, available_vram=peer.vram
                )
            )
        if any_proven:
            able = [candidate for candidate in able if candidate.node_id not in crowded]
        return able, any_full

    def picked(self, lease: Lease) -> None:
        self.leases.append(lease)
        self.own[lease.peer_id, lease.service_id] += 1
        if self.router.policy == "rotate":
            self.picks += 1
            self.order[lease.peer_id] = self.picks

    # What always holds

    @invariant()
    def our_leases_are_counted_exactly(self) -> None:
        if not hasattr(self, "router"):
            return
        assert self.router.own_total == len(self.leases)
        for peer_id in PEERS:
            for service in SERVICES:
                own = self.own[peer_id, service]
                assert self.router.own_in_flight(peer_id, service) == own >= 0
            assert self.router.own_in_flight(peer_id) == sum(
                self.own[peer_id, service] for service in SERVICES
            )

    @invariant()
    def the_load_is_ours_plus_what_the_peer_says_of_others(self) -> None:
        for peer_id, peer in self.peers.items():
            for service in SERVICES:
                load = self.own[peer_id, service] + peer.others[service]
                assert self.router.in_flight(peer_id, service) == load

    @invariant()
    def at_most_half_of_those_that_could_serve_are_put_aside(self) -> None:
        for service in SERVICES:
            self.look(service)
            could = [peer_id for peer_id, *_ in self.offering(service, frozenset())]
            circuits = [self.router.circuit(peer_id, service) for peer_id in could]
            ejected = sum(c is not None and c.state_at(self.now) == "open" for c in circuits)
            assert ejected <= len(could) // 2

    @invariant()
    def the_last_decisions_stand_newest_first(self) -> None:
        if not hasattr(self, "router"):
            return
        decisions = self.router.decisions()
        assert len(decisions) <= 5
        assert [d.at for d in decisions] == sorted((d.at for d in decisions), reverse=True)


TestRouterUnderAnyOrderOfEvents = RouterMachine.TestCase
TestRouterUnderAnyOrderOfEvents.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
