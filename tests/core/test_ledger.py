"""The ledger, one rule per test, in literal seconds."""

from __future__ import annotations

from typing import Any

import pytest

from meshnode.core.ledger import Ledger, Observation
from meshnode.core.node_data import NODE_ONLINE_WINDOW, NodeData, ServiceData


def node(
    peer_id: str = "a", seq: int = 1, *, service: str | None = "chat", **fields: Any
) -> NodeData:
    services = (ServiceData(service_id=service),) if service else ()
    return NodeData(id=peer_id, seq=seq, services=services, **fields)


def online(ledger: Ledger, now: float) -> set[str]:
    return {entry.peer_id for entry in ledger.online(now)}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger("self")


def test_a_peer_is_online_for_less_than_forty_seconds_of_silence(ledger: Ledger) -> None:
    assert NODE_ONLINE_WINDOW == 40.0
    assert ledger.observe(node(), now=100.0) is Observation.NEW
    entry = ledger.get("a")
    assert entry is not None
    assert entry.is_online_at(139.9)
    assert not entry.is_online_at(140.0)
    assert online(ledger, 139.9) == {"a"}
    assert online(ledger, 140.0) == set()


def test_a_newer_seq_is_a_sign_of_life(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), now=0.0)
    assert ledger.observe(node(seq=2), now=30.0) is Observation.NEWER
    assert online(ledger, 69.0) == {"a"}


@pytest.mark.parametrize("seq", [5, 4, 0])
def test_a_replayed_announcement_is_not_a_sign_of_life(ledger: Ledger, seq: int) -> None:
    ledger.observe(node(seq=5, name="now"), now=0.0)
    assert ledger.observe(node(seq=seq, name="then"), now=30.0) is Observation.STALE
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.last_seen, entry.node.name) == (0.0, "now")
    assert online(ledger, 40.0) == set()


@pytest.mark.parametrize("wall_clock_ms", [0, 1, 2**63, 2**64 - 1])
def test_the_senders_wall_clock_does_not_matter(ledger: Ledger, wall_clock_ms: int) -> None:
    ledger.observe(node(last_seen=wall_clock_ms), now=10.0)
    assert online(ledger, 49.0) == {"a"}
    assert online(ledger, 50.0) == set()


@pytest.mark.parametrize(
    ("announced", "seconds"), [(0, 10.0), (9, 10.0), (25, 25.0), (3600, 3600.0), (2**60, 3600.0)]
)
def test_the_announced_window_is_kept_within_ten_seconds_and_an_hour(
    ledger: Ledger, announced: int, seconds: float
) -> None:
    ledger.observe(node(online_window=announced), now=0.0)
    assert online(ledger, seconds - 0.5) == {"a"}
    assert online(ledger, seconds) == set()


def test_what_another_peer_relays_is_as_old_as_that_peer_says(ledger: Ledger) -> None:
    ledger.observe(node(), now=100.0, age=35.0)
    assert online(ledger, 104.0) == {"a"}
    assert online(ledger, 105.0) == set()


def test_a_relayed_record_never_moves_the_proof_of_life_back(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), now=100.0)
    assert ledger.observe(node(seq=2), now=101.0, age=50.0) is Observation.NEWER
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.last_seen, entry.node.seq) == (100.0, 2)


def test_a_record_relayed_too_late_is_known_and_offline(ledger: Ledger) -> None:
    assert ledger.observe(node(), now=100.0, age=41.0) is Observation.NEW
    assert ledger.get("a") is not None
    assert online(ledger, 100.0) == set()


@pytest.mark.parametrize("age", [float("nan"), float("inf"), 1e300])
def test_an_absurd_age_counts_as_very_old(ledger: Ledger, age: float) -> None:
    ledger.observe(node(), now=100.0, age=age)
    assert online(ledger, 100.0) == set()


def test_a_negative_age_is_no_loan_on_the_future(ledger: Ledger) -> None:
    ledger.observe(node(), now=100.0, age=-1000.0)
    assert online(ledger, 140.0) == set()


def test_silence_is_told_once(ledger: Ledger) -> None:
    ledger.observe(node("a"), now=0.0)
    ledger.observe(node("b"), now=5.0)
    assert ledger.expire(39.0) == []
    assert ledger.expire(40.0) == ["a"]
    assert ledger.expire(44.0) == []
    assert ledger.expire(45.0) == ["b"]
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.state, entry.down_reason) == ("offline", "silent")


def test_after_silence_a_newer_seq_is_a_return(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), now=0.0)
    ledger.expire(40.0)
    assert ledger.observe(node(seq=2), now=50.0) is Observation.RETURNED
    assert online(ledger, 50.0) == {"a"}


def test_news_heard_elsewhere_during_our_silence_brings_the_peer_back(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), now=0.0)
    ledger.expire(40.0)
    assert ledger.observe(node(seq=2), now=44.0, age=5.0) is Observation.RETURNED
    assert online(ledger, 78.0) == {"a"}
    assert online(ledger, 79.0) == set()


def test_bytes_from_a_silent_peer_bring_it_back(ledger: Ledger) -> None:
    ledger.observe(node(), now=0.0)
    ledger.expire(40.0)
    assert ledger.touch("a", 60.0) is True
    assert ledger.touch("a", 61.0) is False
    assert online(ledger, 100.0) == {"a"}


def test_bytes_from_an_unknown_peer_say_nothing(ledger: Ledger) -> None:
    assert ledger.touch("nobody", 0.0) is False
    assert len(ledger) == 0


def test_a_peer_marked_down_is_offline_at_once_and_keeps_its_first_reason(ledger: Ledger) -> None:
    ledger.observe(node(), now=0.0)
    assert ledger.mark_down("a", "ping timed out", 1.0) is True
    assert ledger.mark_down("a", "dial failed", 2.0) is False
    assert ledger.mark_down("nobody", "dial failed", 2.0) is False
    assert online(ledger, 1.0) == set()
    assert ledger.expire(50.0) == []
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.state, entry.down_reason) == ("offline", "ping timed out")


def test_a_peer_marked_down_comes_back_by_bytes_or_by_a_newer_seq(ledger: Ledger) -> None:
    ledger.observe(node("a"), now=0.0)
    ledger.observe(node("b"), now=0.0)
    ledger.mark_down("a", "cut", 1.0)
    ledger.mark_down("b", "cut", 1.0)
    assert ledger.touch("a", 2.0) is True
    assert ledger.observe(node("b", seq=1), now=2.0) is Observation.STALE
    assert ledger.observe(node("b", seq=2), now=2.0) is Observation.RETURNED
    assert online(ledger, 2.0) == {"a", "b"}


def test_news_heard_elsewhere_before_we_found_the_peer_dead_does_not_revive_it(
    ledger: Ledger,
) -> None:
    ledger.observe(node(seq=1), now=0.0)
    ledger.mark_down("a", "connection refused", 12.0)
    assert ledger.observe(node(seq=2), now=13.0, age=3.0) is Observation.NEWER
    assert online(ledger, 13.0) == set()
    assert ledger.observe(node(seq=3), now=16.0, age=3.0) is Observation.RETURNED
    assert online(ledger, 16.0) == {"a"}


def test_a_leaving_peer_is_gone_at_once_and_bytes_do_not_bring_it_back(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), now=0.0)
    assert ledger.observe(node(seq=2, state="leaving"), now=1.0) is Observation.LEFT
    assert ledger.touch("a", 1.5) is False
    assert ledger.mark_down("a", "closed", 1.5) is False
    assert online(ledger, 1.5) == set()
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.state, entry.state_at(99.0)) == ("left", "left")
    assert ledger.observe(node(seq=1), now=2.0) is Observation.STALE
    assert ledger.observe(node(seq=3), now=9.0) is Observation.RETURNED
    assert online(ledger, 9.0) == {"a"}


def test_a_goodbye_from_a_peer_never_heard_of_holds_its_seq(ledger: Ledger) -> None:
    assert ledger.observe(node(seq=9, state="leaving"), now=0.0) is Observation.LEFT
    assert ledger.observe(node(seq=8), now=1.0) is Observation.STALE


def test_a_draining_peer_is_online_and_says_so(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), now=0.0)
    ledger.observe(node(seq=2, state="draining"), now=1.0)
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.state, entry.state_at(2.0), entry.state_at(41.0)) == (
        "draining",
        "draining",
        "offline",
    )
    assert online(ledger, 2.0) == {"a"}


def test_a_forgotten_peer_is_not_brought_back_by_what_it_once_said(ledger: Ledger) -> None:
    ledger.observe(node(seq=7), now=0.0)
    ledger.forget("a", 1.0)
    assert ledger.get("a") is None
    assert online(ledger, 1.0) == set()
    assert ledger.observe(node(seq=7), now=2.0) is Observation.STALE
    assert ledger.observe(node(seq=8), now=3.0) is Observation.NEW


def test_a_forgotten_peers_seq_is_remembered_for_a_day(ledger: Ledger) -> None:
    ledger.observe(node(seq=7), now=0.0)
    ledger.forget("a", 0.0)
    assert ledger.seq_floor("a", 86_399.0) == 7
    assert ledger.seq_floor("a", 86_400.0) is None
    assert ledger.observe(node(seq=1), now=86_400.0) is Observation.NEW


def test_a_peer_offline_for_a_day_is_forgotten(ledger: Ledger) -> None:
    ledger.observe(node(seq=7), now=0.0)
    ledger.observe(node("self"), now=0.0)
    ledger.expire(86_399.0)
    assert ledger.get("a") is not None
    ledger.expire(86_400.0)
    assert ledger.get("a") is None
    assert ledger.get("self") is not None
    assert ledger.seq_floor("a", 86_401.0) == 7


def test_a_full_ledger_of_online_peers_admits_nobody() -> None:
    ledger = Ledger("self", max_entries=2)
    ledger.observe(node("a"), now=0.0)
    ledger.observe(node("b"), now=0.0)
    assert ledger.observe(node("c"), now=1.0) is Observation.FULL
    assert online(ledger, 1.0) == {"a", "b"}
    assert ledger.observe(node("a", seq=2), now=2.0) is Observation.NEWER


def test_the_longest_gone_makes_room_first_and_its_seq_is_kept() -> None:
    ledger = Ledger("self", max_entries=3)
    ledger.observe(node("a", seq=5), now=0.0)
    ledger.observe(node("b"), now=10.0)
    ledger.observe(node("c"), now=60.0)
    assert ledger.observe(node("d"), now=60.0) is Observation.NEW
    assert {entry.peer_id for entry in ledger.entries()} == {"b", "c", "d"}
    assert ledger.observe(node("a", seq=5), now=61.0) is Observation.STALE


def test_nobody_makes_room_for_a_newcomer_who_is_gone_already() -> None:
    ledger = Ledger("self", max_entries=1)
    ledger.observe(node("a"), now=0.0)
    assert ledger.observe(node("b"), now=100.0, age=60.0) is Observation.FULL
    assert ledger.observe(node("c", state="leaving"), now=100.0) is Observation.FULL
    assert ledger.get("a") is not None


def test_this_node_always_has_its_place() -> None:
    ledger = Ledger("self", max_entries=1)
    ledger.observe(node("a"), now=0.0)
    assert ledger.observe(node("self"), now=0.0) is Observation.NEW
    assert ledger.mark_down("self", "no", 1.0) is False
    ledger.forget("self", 1.0)
    assert online(ledger, 1.0) == {"a", "self"}


def test_tombstones_are_bounded_and_the_oldest_goes_first() -> None:
    ledger = Ledger("self", max_entries=2)
    for second, peer_id in enumerate("abc"):
        ledger.observe(node(peer_id, seq=9), now=float(second))
        ledger.forget(peer_id, float(second))
    assert [ledger.seq_floor(peer_id, 3.0) for peer_id in "abc"] == [None, 9, 9]


def test_the_services_of_the_newest_announcement_count(ledger: Ledger) -> None:
    ledger.observe(node("a", seq=1, service="chat"), now=0.0)
    ledger.observe(node("b", seq=1, service="embed"), now=0.0)
    assert ledger.services_online(0.0) == ("chat", "embed")
    ledger.observe(node("a", seq=2, service="embed"), now=1.0)
    assert ledger.offering("chat", 1.0) == []
    assert {entry.peer_id for entry in ledger.offering("embed", 1.0)} == {"a", "b"}
    ledger.mark_down("a", "cut", 2.0)
    assert {entry.peer_id for entry in ledger.offering("embed", 2.0)} == {"b"}
    assert ledger.offers_any(2.0)
    assert ledger.offering("embed", 40.0) == []
    assert not ledger.offers_any(40.0)


def test_a_peer_that_names_a_service_twice_is_listed_once(ledger: Ledger) -> None:
    twice = (ServiceData(service_id="chat"), ServiceData(service_id="chat"))
    ledger.observe(NodeData(id="a", seq=1, services=twice), now=0.0)
    assert len(ledger.offering("chat", 0.0)) == 1
    ledger.forget("a", 1.0)
    assert ledger.services_online(1.0) == ()


def test_watchers_hear_of_news_and_of_coming_and_going_and_not_of_mere_life(
    ledger: Ledger,
) -> None:
    told: list[str] = []
    ledger.watch(told.append)
    ledger.observe(node("a"), now=0.0)
    ledger.touch("a", 1.0)
    ledger.observe(node("a"), now=2.0)
    assert told == ["a"]
    ledger.mark_down("a", "cut", 3.0)
    ledger.touch("a", 4.0)
    ledger.expire(44.0)
    ledger.forget("a", 50.0)
    assert told == ["a"] * 5


def test_the_envelope_is_kept_as_it_came(ledger: Ledger) -> None:
    ledger.observe(node(seq=1), envelope=b"signed 1", now=0.0)
    ledger.observe(node(seq=2), envelope=b"signed 2", now=1.0)
    ledger.touch("a", 2.0)
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.envelope, entry.first_seen) == (b"signed 2", 0.0)


def test_a_suspect_stays_online_until_it_shows_life_or_is_found_dead(ledger: Ledger) -> None:
    told: list[str] = []
    ledger.observe(node("a"), now=0.0)
    ledger.watch(told.append)
    assert ledger.suspect("a", "no answer yet", 1.0) is True
    assert ledger.suspect("a", "no answer still", 2.0) is False
    assert ledger.suspect("nobody", "no answer", 2.0) is False
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.state_at(2.0), entry.reason_at(2.0)) == ("suspect", "no answer still")
    assert online(ledger, 2.0) == {"a"}
    assert told == ["a"]
    assert ledger.touch("a", 3.0) is False
    entry = ledger.get("a")
    assert entry is not None
    assert (entry.state_at(3.0), entry.reason_at(3.0)) == ("up", "bytes came over its link")
    assert told == ["a", "a"]


def test_bytes_from_before_the_suspicion_do_not_end_it(ledger: Ledger) -> None:
    ledger.observe(node("a"), now=0.0)
    ledger.suspect("a", "no answer", 5.0)
    ledger.touch("a", 4.0)
    assert ledger.observe(node("a", seq=2), now=6.0, age=2.0) is Observation.NEWER
    entry = ledger.get("a")
    assert entry is not None and entry.state == "suspect"
    ledger.observe(node("a", seq=3), now=7.0)
    entry = ledger.get("a")
    assert entry is not None and entry.state == "up"


def test_this_node_and_who_is_gone_are_never_suspect(ledger: Ledger) -> None:
    for peer_id in ("self", "a", "b"):
        ledger.observe(node(peer_id), now=0.0)
    ledger.mark_down("a", "cut", 1.0)
    ledger.observe(node("b", seq=2, state="leaving"), now=1.0)
    assert not any(ledger.suspect(peer_id, "no answer", 2.0) for peer_id in ("self", "a", "b"))


def test_a_suspect_that_is_found_dead_or_stays_silent_is_offline_for_that_reason(
    ledger: Ledger,
) -> None:
    for peer_id in ("a", "b"):
        ledger.observe(node(peer_id), now=0.0)
        ledger.suspect(peer_id, "no answer", 1.0)
    ledger.mark_down("a", "ping_timeout: 4 s", 2.0)
    ledger.expire(40.0)
    reasons = [(e.state_at(40.0), e.reason_at(40.0)) for e in ledger.entries()]
    assert reasons == [("offline", "ping_timeout: 4 s"), ("offline", "silent")]


def test_every_state_has_its_reason(ledger: Ledger) -> None:
    ledger.observe(node("a"), now=10.0)
    ledger.observe(node("b"), now=10.0, age=3.0)
    ledger.observe(node("c", state="draining"), now=10.0)
    ledger.observe(node("d", state="leaving"), now=10.0)
    assert [(e.state_at(11.0), e.reason_at(11.0)) for e in ledger.entries()] == [
        ("up", "its announcement was heard"),
        ("up", "a member handed on its announcement"),
        ("draining", "it takes no new work"),
        ("left", "it said goodbye"),
    ]


def test_what_this_node_slept_through_is_nobodys_silence(ledger: Ledger) -> None:
    ledger.observe(node("a"), now=0.0)
    ledger.observe(node("b"), now=0.0)
    ledger.mark_down("b", "cut", 5.0)
    ledger.forgive(60.0, 70.0)
    assert online(ledger, 99.0) == {"a"}
    assert online(ledger, 100.0) == set()
    ledger.forgive(1e9, 99.0)
    entry = ledger.get("a")
    assert entry is not None and entry.last_seen == 99.0
