"""The ledger against a model that is too simple to be wrong, under any order of events.

Times are whole seconds, so that both reckon the same ages exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshnode.core.ledger import Ledger, Observation
from meshnode.core.node_data import NodeData, ServiceData

MAX_ENTRIES = 4
TOMBSTONE_TTL = 500.0
PEERS = ["self", "a", "b", "c", "d", "e", "f"]
STATES = ["up", "up", "up", "draining", "leaving"]
SERVICES = ["chat", "embed"]


@dataclass
class Peer:
    """What the model knows of one peer."""

    seq: int
    state: str
    window: int
    services: frozenset[str]
    last_seen: float
    down_at: float | None = None  # found dead then
    silent: bool = False  # expire() said so
    suspected_at: float | None = None

    def online(self, now: float) -> bool:
        gone = self.state == "leaving" or self.down_at is not None or self.silent
        window = min(max(self.window, 10), 3600)
        return not gone and now - self.last_seen < window


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ledger = Ledger("self", max_entries=MAX_ENTRIES, tombstone_ttl=TOMBSTONE_TTL)
        self.peers: dict[str, Peer] = {}
        self.tombs: dict[str, tuple[int, float]] = {}  # seq, until; the oldest first
        self.told: set[str] = set()
        self.ledger.watch(self.told.add)

    # The model's own rules

    def bury(self, peer_id: str) -> None:
        self.tombs.pop(peer_id, None)
        self.tombs[peer_id] = (self.peers.pop(peer_id).seq, self.now + TOMBSTONE_TTL)
        while len(self.tombs) > MAX_ENTRIES:
            del self.tombs[next(iter(self.tombs))]

    def floor(self, peer_id: str) -> int:
        if peer_id in self.peers:
            return self.peers[peer_id].seq
        seq, until = self.tombs.get(peer_id, (-1, 0.0))
        return seq if self.now < until else -1

    def make_room(self, peer_id: str, newcomer: Peer) -> bool:
        if len(self.peers) < MAX_ENTRIES or peer_id == "self":
            return True
        offline = [p for p in self.peers if not self.peers[p].online(self.now) and p != "self"]
        if not newcomer.online(self.now) or not offline:
            return False
        self.bury(min(offline, key=lambda p: self.peers[p].last_seen))
        return True

    def expect(self, peer_id: str, new: Peer) -> Observation:
        if new.seq <= self.floor(peer_id):
            return Observation.STALE
        old = self.peers.get(peer_id)
        if old is None:
            if not self.make_room(peer_id, new):
                return Observation.FULL
            self.tombs.pop(peer_id, None)
            self.peers[peer_id] = new
            return Observation.LEFT if new.state == "leaving" else Observation.NEW
        was_online = old.online(self.now)
        if old.down_at is not None and new.last_seen < old.down_at:
            new.down_at = old.down_at
        if old.suspected_at is not None and new.last_seen < old.suspected_at:
            new.suspected_at = old.suspected_at
        new.last_seen = max(new.last_seen, old.last_seen)
        self.peers[peer_id] = new
        if new.state == "leaving":
            return Observation.LEFT
        return (
            Observation.RETURNED if new.online(self.now) and not was_online else Observation.NEWER
        )

    # What may happen

    @rule(seconds=st.sampled_from([0, 1, 5, 9, 10, 39, 40, 41, 120, 499, 500, 3600]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(
        peer_id=st.sampled_from(PEERS),
        seq=st.integers(0, 12),
        state=st.sampled_from(STATES),
        window=st.sampled_from([0, 9, 10, 40, 41, 3600, 3601, 2**64 - 1]),
        services=st.frozensets(st.sampled_from(SERVICES)),
        age=st.sampled_from([0, 0, 0, 3, 9, 39, 40, 5000]),
        wall_clock_ms=st.sampled_from([0, 1, 2**64 - 1]),
    )
    def observe(
        self,
        peer_id: str,
        seq: int,
        state: str,
        window: int,
        services: frozenset[str],
        age: int,
        wall_clock_ms: int,
    ) -> None:
        node = NodeData.model_validate(
            {
                "ID": peer_id,
                "Seq": seq,
                "State": state,
                "OnlineWindow": window,
                "LastSeen": wall_clock_ms,
                "Services": tuple(ServiceData(service_id=s) for s in sorted(services)),
            }
        )
        self.told.clear()
        expected = self.expect(peer_id, Peer(seq, state, window, services, self.now - age))
        assert self.ledger.observe(node, now=self.now, age=float(age)) is expected
        heard = expected not in (Observation.STALE, Observation.FULL)
        assert (peer_id in self.told) == heard

    @rule(peer_id=st.sampled_from(PEERS))
    def the_next_announcement(self, peer_id: str) -> None:
        seq = self.floor(peer_id) + 1
        self.observe(peer_id, seq, "up", 40, frozenset({"chat"}), 0, 0)

    @rule(peer_id=st.sampled_from(PEERS))
    def bytes_arrive(self, peer_id: str) -> None:
        peer = self.peers.get(peer_id)
        returns = False
        if peer is not None and peer.state != "leaving":
            returns = not peer.online(self.now)
            peer.last_seen, peer.down_at, peer.silent = self.now, None, False
            peer.suspected_at = None
        assert self.ledger.touch(peer_id, self.now) is returns

    @rule(peer_id=st.sampled_from(PEERS))
    def found_dead(self, peer_id: str) -> None:
        peer = self.peers.get(peer_id)
        was_online = peer is not None and peer_id != "self" and peer.online(self.now)
        if peer is not None and was_online:
            peer.down_at, peer.suspected_at = self.now, None
        assert self.ledger.mark_down(peer_id, "dial failed", self.now) is was_online

    @rule(peer_id=st.sampled_from(PEERS))
    def suspected(self, peer_id: str) -> None:
        peer = self.peers.get(peer_id)
        is_news = False
        if peer is not None and peer_id != "self" and peer.online(self.now):
            is_news = peer.suspected_at is None
            peer.suspected_at = self.now if peer.suspected_at is None else peer.suspected_at
        assert self.ledger.suspect(peer_id, "no answer", self.now) is is_news

    @rule(peer_id=st.sampled_from(PEERS))
    def forget(self, peer_id: str) -> None:
        if peer_id in self.peers and peer_id != "self":
            self.bury(peer_id)
        self.ledger.forget(peer_id, self.now)

    @rule()
    def expire(self) -> None:
        silent = set()
        for peer_id, peer in self.peers.items():
            gone = peer.state == "leaving" or peer.down_at is not None or peer.silent
            if not gone and not peer.online(self.now):
                # Who was relayed too late was never online, so it can't fall silent either.
                peer.silent, peer.suspected_at = True, None
                silent.add(peer_id)
        told = set(self.ledger.expire(self.now))
        assert told <= silent
        for peer_id in silent - told:
            entry = self.ledger.get(peer_id)
            assert entry is None or not entry.is_online_at(self.now)
        for peer_id in [
            p
            for p, peer in self.peers.items()
            if p != "self"
            and not peer.online(self.now)
            and self.now - peer.last_seen >= TOMBSTONE_TTL
        ]:
            self.bury(peer_id)
        self.tombs = {p: t for p, t in self.tombs.items() if self.now < t[1]}

    # What always holds

    @invariant()
    def the_same_peers_are_known(self) -> None:
        assert {e.peer_id for e in self.ledger.entries()} == set(self.peers)
        for peer_id, peer in self.peers.items():
            entry = self.ledger.get(peer_id)
            assert entry is not None
            assert entry.node.seq == peer.seq
            assert entry.last_seen == peer.last_seen <= self.now
            assert entry.is_online_at(self.now) == peer.online(self.now)
            if entry.is_online_at(self.now):
                suspect = peer.suspected_at is not None
                assert entry.state_at(self.now) == ("suspect" if suspect else peer.state)
            else:
                left = peer.state == "leaving"
                assert entry.state_at(self.now) == ("left" if left else "offline")

    @invariant()
    def the_same_peers_are_online_and_offer_the_same(self) -> None:
        online = {p for p, peer in self.peers.items() if peer.online(self.now)}
        listed = [entry.peer_id for entry in self.ledger.online(self.now)]
        assert sorted(listed) == sorted(online)
        for service in SERVICES:
            offering = [e.peer_id for e in self.ledger.offering(service, self.now)]
            assert sorted(offering) == sorted(
                p for p in online if service in self.peers[p].services
            )

    @invariant()
    def everything_is_bounded(self) -> None:
        # This node's own entry has a place beyond the bound.
        assert len(self.ledger) <= MAX_ENTRIES + 1
        assert len(self.ledger._tombstones) <= MAX_ENTRIES
        assert len(self.ledger._live) <= len(self.ledger)
        assert set(self.ledger._live_by_service) <= set(SERVICES)

    @invariant()
    def no_old_seq_can_be_news(self) -> None:
        for peer_id in PEERS:
            floor = self.ledger.seq_floor(peer_id, self.now)
            assert (-1 if floor is None else floor) == self.floor(peer_id)


TestLedgerUnderAnyOrderOfEvents = LedgerMachine.TestCase
TestLedgerUnderAnyOrderOfEvents.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
