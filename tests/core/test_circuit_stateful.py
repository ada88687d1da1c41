"""Peers that fail and recover in any order: who is put aside, and who is tried again."""

from __future__ import annotations

import contextlib
import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshnode.core.circuit import MAX_EJECTION
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.router import Lease, Router
from meshnode.errors import NoCandidate

PEERS = ["a", "b", "c", "d", "e"]
peers = st.sampled_from(PEERS)


class CircuitMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.seq = 0
        self.leases: list[Lease] = []
        self.online: set[str] = set()
        self.ledger = Ledger("self")
        self.router = Router(self.ledger, self_id="self", policy="vram", rng=random.Random(1))
        for peer_id in PEERS:
            self.announce(peer_id)

    @rule(peer_id=peers)
    def announce(self, peer_id: str) -> None:
        self.seq += 1
        services = (ServiceData(service_id="chat"),)
        node = NodeData(id=peer_id, seq=self.seq, services=services, online_window=3600)
        self.ledger.observe(node, now=self.now)
        self.router.hear(node)
        self.online.add(peer_id)

    @rule(peer_id=peers)
    def lose(self, peer_id: str) -> None:
        self.ledger.mark_down(peer_id, "cut", self.now)
        self.router.forget(peer_id)
        self.online.discard(peer_id)

    @rule(seconds=st.sampled_from([0.1, 4.4, 5.6, 20.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(peer_id=peers, times=st.integers(1, 6))
    def fail_in_a_row(self, peer_id: str, times: int) -> None:
        if peer_id not in self.online:
            return
        for _ in range(times):
            with self.router.lease(now=self.now, service_id="chat", target=peer_id) as lease:
                lease.failed("reset", now=self.now)

    @rule()
    def ask(self) -> None:
        states = {peer_id: self.state(peer_id) for peer_id in PEERS}
        trials = {lease.peer_id for lease in self.leases if lease.is_trial}
        request: dict[str, Any] = {"now": self.now, "service_id": "chat"}
        try:
            lease = self.router.lease(**request)
        except NoCandidate:
            # With somebody online, only trials under way can keep everybody from being asked.
            assert not self.online or trials & self.online
            return
        assert lease.peer_id in self.online
        assert states[lease.peer_id] != "open"
        if states[lease.peer_id] == "half_open":
            assert lease.is_trial
            assert lease.peer_id not in trials
        self.leases.append(lease)

    @rule(data=st.data(), verdict=st.sampled_from(["ok", "reset", None]))
    def end_one(self, data: st.DataObject, verdict: str | None) -> None:
        if not self.leases:
            return
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        was_trial = lease.is_trial and self.state(lease.peer_id) == "half_open"
        if verdict == "ok":
            lease.succeeded(0.01, now=self.now)
            if was_trial:
                assert self.state(lease.peer_id) == "closed"
        elif verdict is not None:
            lease.failed(verdict, now=self.now)
        lease.release()

    def state(self, peer_id: str) -> str:
        with contextlib.suppress(NoCandidate):  # let the router take in what changed
            self.router.explain(now=self.now, service_id="chat")
        circuit = self.router.circuit(peer_id, "chat")
        return "closed" if circuit is None else circuit.state_at(self.now)

    @invariant()
    def at_most_half_of_those_online_are_put_aside(self) -> None:
        aside = sum(self.state(peer_id) == "open" for peer_id in self.online)
        assert aside <= len(self.online) // 2

    @invariant()
    def nobody_is_put_aside_for_ever(self) -> None:
        for peer_id in PEERS:
            circuit = self.router.circuit(peer_id, "chat")
            if circuit is not None and circuit.until is not None:
                assert circuit.until <= self.now + MAX_EJECTION * 1.1


TestCircuitsUnderAnyOrderOfEvents = CircuitMachine.TestCase
TestCircuitsUnderAnyOrderOfEvents.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
