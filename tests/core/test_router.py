"""The router, one rule per test: who is picked, why, what is counted and what is said."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from meshnode.core.decision import MAX_ROWS, Decision
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.router import Policy, Router
from meshnode.errors import NoCandidate

GIB = 2**30


def node(
    peer_id: str,
    vram: int = 0,  # GiB
    *,
    seq: int = 1,
    services: tuple[ServiceData, ...] | None = None,
    in_flight: int = 0,
    limit: int = 0,
    healthy: bool = True,
    **fields: Any,
) -> NodeData:
    if services is None:
        services = (
            ServiceData(
                service_id="chat", in_flight=in_flight, max_in_flight=limit, healthy=healthy
            ),
        )
    fields.setdefault("name", f"host-{peer_id}")
    return NodeData(id=peer_id, seq=seq, available_vram=vram * GIB, services=services, **fields)


class Bench:
    """A router over a ledger that was told of some nodes at second 0."""

    def __init__(self, *nodes: NodeData, policy: Policy = "vram", **settings: Any) -> None:
        self.ledger = Ledger("self")
        self.router = Router(
            self.ledger, self_id="self", policy=policy, rng=random.Random(1), **settings
        )
        self.hear(*nodes, now=0.0)

    def hear(self, *nodes: NodeData, now: float) -> None:
        for each in nodes:
            self.ledger.observe(each, now=now)
            self.router.hear(each)

    def picks(self, count: int, now: float = 1.0) -> list[str]:
        return [self.router.lease(now=now, service_id="chat").peer_id for _ in range(count)]

    def refusal(self, **request: Any) -> str:
        with pytest.raises(NoCandidate) as caught:
            self.router.lease(**{"now": 1.0, "service_id": "chat", **request})
        return str(caught.value)

    def explain(self, **request: Any) -> Decision:
        return self.router.explain(**{"now": 1.0, "service_id": "chat", **request})


FOUR = (node("a", 8), node("b", 24), node("c", 16), node("d", 12))


# Picking


def test_a_burst_over_four_idle_peers_spreads_evenly_and_starts_with_the_most_vram() -> None:
    picks = Bench(*FOUR).picks(32)
    assert picks[:4] == ["b", "c", "d", "a"]
    assert Counter(picks) == {"a": 8, "b": 8, "c": 8, "d": 8}


def test_peers_equal_in_everything_are_taken_in_the_order_of_their_ids() -> None:
    assert Bench(node("b"), node("c"), node("a")).picks(3) == ["a", "b", "c"]


def test_requests_one_after_another_all_go_to_the_most_vram() -> None:
    bench = Bench(*FOUR)
    for _ in range(5):
        with bench.router.lease(now=1.0, service_id="chat") as lease:
            assert lease.peer_id == "b"


def test_rotation_takes_turns_even_within_one_tick_of_the_clock() -> None:
    bench = Bench(*FOUR, policy="rotate")
    picks = []
    for _ in range(8):
        with bench.router.lease(now=1.0, service_id="chat") as lease:
            picks.append(lease.peer_id)
    assert picks == ["b", "c", "d", "a"] * 2


def test_rotation_counts_a_turn_on_any_service_of_the_peer() -> None:
    both = (ServiceData(service_id="chat"), ServiceData(service_id="embed"))
    bench = Bench(node("a", services=both), node("b", services=both), policy="rotate")
    picks = []
    for service in ("chat", "embed", "embed", "chat"):
        with bench.router.lease(now=1.0, service_id=service) as lease:
            picks.append(lease.peer_id)
    assert picks == ["a", "b", "a", "b"]


def test_random_reaches_everybody_and_the_same_dice_pick_the_same() -> None:
    picks = Bench(*FOUR, policy="random").picks(60)
    assert set(picks) == {"a", "b", "c", "d"}
    assert picks == Bench(*FOUR, policy="random").picks(60)


def test_random_skips_the_excluded_even_if_they_are_nearly_all() -> None:
    nodes = [node(f"p{i:03}") for i in range(200)]
    bench = Bench(*nodes, policy="random")
    tried = {n.id for n in nodes[:-2]}
    picks = {
        bench.router.lease(now=1.0, service_id="chat", exclude=tried).peer_id for _ in range(20)
    }
    assert picks == {"p198", "p199"}


def test_this_node_is_a_candidate_when_it_offers_the_service() -> None:
    bench = Bench(node("self", 24), node("a", 8))
    with bench.router.lease(now=1.0, service_id="chat") as lease:
        assert (lease.peer_id, lease.is_local) == ("self", True)
    with bench.router.lease(now=1.0, service_id="chat", exclude={"self"}) as lease:
        assert (lease.peer_id, lease.is_local) == ("a", False)


def test_vram_that_is_not_credible_counts_as_unknown() -> None:
    liar = node("liar", 2**33)
    more_than_all = node("more", 48, total_vram=24 * GIB)
    bench = Bench(liar, more_than_all, node("honest", 1))
    assert bench.picks(1) == ["honest"]
    bench.router.report("liar", "chat", others_in_flight=0, available_vram=2**63, now=1.0)
    assert bench.explain(exclude={"honest"}).candidates[0].available_vram == 0


# The deciding tier


@pytest.mark.parametrize(
    ("nodes", "policy", "tier"),
    [
        ([node("a")], "vram", "only"),
        ([node("a")], "random", "only"),
        ([node("a", 8, in_flight=1), node("b", 24)], "vram", "in_flight"),
        ([node("a", 8), node("b", 24)], "vram", "vram"),
        ([node("a", 8), node("b", 8)], "vram", "first_listed"),
        ([node("a", 8), node("b", 24)], "random", "random"),
        ([node("a", 8), node("b", 24, healthy=False)], "vram", "only"),
    ],
)
def test_the_decision_names_the_tier(nodes: list[NodeData], policy: Policy, tier: str) -> None:
    bench = Bench(*nodes, policy=policy)
    with bench.router.lease(now=1.0, service_id="chat") as lease:
        assert lease.decision.tier == tier


def test_rotation_names_last_used_once_somebody_was_used() -> None:
    bench = Bench(node("a", 8), node("b", 24), policy="rotate")
    tiers = []
    for _ in range(2):
        with bench.router.lease(now=1.0, service_id="chat") as lease:
            tiers.append(lease.decision.tier)
    assert tiers == ["vram", "last_used"]


def test_a_target_decides_whatever_the_policy_says() -> None:
    bench = Bench(*FOUR)
    for target in ("a", "host-a"):
        with bench.router.lease(now=1.0, service_id="chat", target=target) as lease:
            assert (lease.peer_id, lease.decision.tier) == ("a", "target")


# What is counted


def test_a_lease_counts_from_the_pick_and_gives_back_once() -> None:
    bench = Bench(node("a"))
    lease = bench.router.lease(now=1.0, service_id="chat")
    assert bench.router.own_in_flight("a", "chat") == bench.router.own_total == 1
    lease.release()
    lease.release()
    with lease:
        pass
    assert bench.router.own_in_flight("a", "chat") == bench.router.own_total == 0


def test_an_exception_inside_the_block_gives_the_lease_back() -> None:
    bench = Bench(node("a"))
    with pytest.raises(ZeroDivisionError), bench.router.lease(now=1.0, service_id="chat"):
        raise ZeroDivisionError
    assert bench.router.own_in_flight("a") == 0


def test_a_lease_outlives_its_peer_in_ledger_and_router() -> None:
    bench = Bench(node("a"), node("b"))
    lease = bench.router.lease(now=1.0, service_id="chat")
    bench.ledger.forget("a", 2.0)
    bench.router.forget("a")
    assert bench.picks(1, now=3.0) == ["b"]
    assert bench.router.own_in_flight("a", "chat") == 1
    lease.release()
    assert bench.router.own_in_flight("a", "chat") == 0


def test_what_a_peer_announces_includes_our_leases_and_they_count_once() -> None:
    bench = Bench(node("a"), node("b"))
    bench.picks(4)
    bench.hear(node("a", seq=2, in_flight=5), now=2.0)
    assert bench.router.in_flight("a", "chat") == 5
    row = bench.explain(target="a").candidates[0]
    assert (row.own_in_flight, row.others_in_flight, row.in_flight) == (2, 3, 5)


def test_an_announcement_from_before_our_leases_does_not_make_others_negative() -> None:
    bench = Bench(node("a"))
    bench.picks(3)
    bench.hear(node("a", seq=2, in_flight=1), now=2.0)
    row = bench.explain().candidates[0]
    assert (row.own_in_flight, row.others_in_flight) == (3, 0)


def test_an_announcement_that_only_the_ledger_heard_counts_too() -> None:
    bench = Bench(node("a"), node("b"))
    lease = bench.router.lease(now=1.0, service_id="chat", target="a")
    bench.ledger.observe(node("a", seq=2, in_flight=3), now=2.0)
    assert bench.router.in_flight("a", "chat") == 3
    lease.release()
    assert bench.router.in_flight("a", "chat") == 2


def test_a_tunnel_reply_counts_others_alone_and_stands_until_the_next_announcement() -> None:
    bench = Bench(node("a", 24), node("b", 8))
    lease = bench.router.lease(now=1.0, service_id="chat")
    bench.router.report("a", "chat", others_in_flight=2, available_vram=6 * GIB, now=1.5)
    row = bench.explain(target="a").candidates[0]
    assert (row.in_flight, row.available_vram, row.reported_at) == (3, 6 * GIB, 1.5)
    lease.release()
    bench.hear(node("a", 24, seq=1, in_flight=9), now=2.0)  # a replay
    assert bench.router.in_flight("a", "chat") == 2
    bench.hear(node("a", 20, seq=2), now=3.0)
    row = bench.explain(target="a").candidates[0]
    assert (row.in_flight, row.available_vram, row.reported_at) == (0, 20 * GIB, None)


def test_a_report_without_vram_leaves_the_announced_figure() -> None:
    bench = Bench(node("a", 24))
    bench.router.report("a", "chat", others_in_flight=1, available_vram=None, now=1.0)
    row = bench.explain().candidates[0]
    assert (row.others_in_flight, row.available_vram) == (1, 24 * GIB)


def test_a_report_steers_the_very_next_pick() -> None:
    bench = Bench(node("a", 24), node("b", 8))
    bench.router.report("a", "chat", others_in_flight=1, available_vram=24 * GIB, now=1.0)
    assert bench.picks(1) == ["b"]


def test_a_report_of_a_peer_forgotten_meanwhile_is_dropped() -> None:
    bench = Bench(node("a"))
    bench.ledger.forget("a", 1.0)
    bench.router.report("a", "chat", others_in_flight=1, available_vram=None, now=1.0)
    assert bench.router.in_flight("a", "chat") == 0


def test_forgetting_a_peers_load_goes_back_to_what_it_announced() -> None:
    bench = Bench(node("a", 24, in_flight=1), policy="rotate")
    bench.picks(1)
    bench.router.report("a", "chat", others_in_flight=7, available_vram=0, now=1.0)
    bench.router.forget("a")
    bench.router.forget("nobody")
    row = bench.explain().candidates[0]
    assert (row.own_in_flight, row.others_in_flight) == (1, 0)
    assert (row.available_vram, row.last_used) == (24 * GIB, 0.0)


# Following the ledger


def test_a_peer_that_joins_later_takes_part_at_once() -> None:
    bench = Bench(node("a", 8))
    assert bench.picks(1) == ["a"]
    bench.hear(node("b", 24), now=2.0)
    assert bench.picks(1, now=2.0) == ["b"]


def test_a_peer_that_is_down_silent_or_leaving_is_picked_no_more() -> None:
    bench = Bench(*FOUR)
    assert bench.explain().picked == "b"
    bench.ledger.mark_down("b", "cut", 1.0)
    assert bench.explain().picked == "c"
    bench.hear(node("c", seq=2, state="leaving"), now=1.0)
    assert bench.explain().picked == "d"
    bench.hear(node("a", seq=2), now=30.0)
    assert bench.explain(now=40.0).picked == "a"  # although expire() was not called yet
    bench.ledger.touch("b", 41.0)
    assert bench.explain(now=41.0).picked == "b"


def test_a_peer_that_stops_offering_the_service_is_picked_no_more() -> None:
    bench = Bench(node("a", 24), node("b", 8))
    assert bench.explain().picked == "a"
    bench.hear(node("a", seq=2, services=(ServiceData(service_id="embed"),)), now=2.0)
    assert bench.explain(now=2.0).picked == "b"


def test_a_peer_at_its_limit_gets_nothing_until_a_request_ends() -> None:
    bench = Bench(node("a", 24, limit=2), node("b", 8))
    first = bench.router.lease(now=1.0, service_id="chat")
    assert bench.picks(3) == ["b", "a", "b"]
    assert bench.picks(2) == ["b", "b"]
    first.release()
    assert bench.picks(1) == ["a"]


def test_what_the_router_knows_is_bounded_by_the_ledger() -> None:
    bench = Bench(node("stays"))
    bench.picks(1)
    for i in range(2000):
        now = 2.0 + i
        bench.hear(node(f"p{i}"), node("stays", seq=2 + i), now=now)
        bench.explain(now=now, target=f"p{i}")
        bench.ledger.forget(f"p{i}", now)
    assert set(bench.router._candidates._views) == {"stays", "p1999"}
    for i in range(2000):  # and without a request that would look at the changes
        bench.hear(node(f"q{i}"), now=3000.0)
        bench.router.in_flight(f"q{i}", "chat")
        bench.ledger.forget(f"q{i}", 3000.0)
    assert len(bench.router._candidates._changed) < 300
    assert len(bench.router._candidates._views) < 300


# What is remembered


def test_the_decision_keeps_the_table_that_it_saw() -> None:
    bench = Bench(
        node("a", 8),
        node("b", 24, in_flight=2),
        node("c", 16),
        node("d", state="draining"),
        node("e", healthy=False),
        node("f", limit=3, in_flight=3),
    )
    lease = bench.router.lease(
        now=1.0, wall_time=1.7e9, service_id="chat", exclude=["a"], attempt=2
    )
    decision = lease.decision
    assert (decision.at, decision.wall_time, decision.attempt) == (1.0, 1.7e9, 2)
    assert (decision.service_id, decision.policy, decision.target) == ("chat", "vram", None)
    assert (decision.picked, decision.tier, decision.candidates_total) == ("c", "in_flight", 6)
    assert [(row.peer_id, row.excluded) for row in decision.candidates] == [
        ("c", None),
        ("b", None),
        ("a", "already tried"),
        ("f", "at its limit of 3"),
        ("d", "draining"),
        ("e", "unhealthy"),
    ]
    assert decision.candidates[0].in_flight == 0  # before it was counted
    assert decision.candidates[1].name == "host-b"


@pytest.mark.parametrize("policy", ["vram", "random"])
def test_of_a_thousand_candidates_the_best_fifty_and_the_pick_are_remembered(
    policy: Policy,
) -> None:
    nodes = [node(f"p{i:04}", i % 64, in_flight=i % 3) for i in range(1000)]
    bench = Bench(*nodes, policy=policy)
    for _ in range(20):
        with bench.router.lease(now=1.0, service_id="chat") as lease:
            decision = lease.decision
            assert (len(decision.candidates), decision.candidates_total) == (MAX_ROWS, 1000)
            assert decision.picked in {row.peer_id for row in decision.candidates}
    shown = [(row.in_flight, -row.available_vram, row.peer_id) for row in decision.candidates[:49]]
    assert shown == sorted((i % 3, -(i % 64) * GIB, f"p{i:04}") for i in range(1000))[:49]


def test_the_outcome_is_written_into_the_list_whether_settled_before_or_after_release() -> None:
    bench = Bench(node("a"))
    first = bench.router.lease(now=1.0, service_id="chat")
    second = bench.router.lease(now=2.0, service_id="chat")
    third = bench.router.lease(now=3.0, service_id="chat")
    first.settle("ok", duration=0.25, retries=1)
    first.release()
    second.release()
    assert second.decision.outcome == "released"
    second.settle("reset", duration=2.0)
    assert [(d.at, d.outcome, d.duration, d.retries) for d in bench.router.decisions()] == [
        (3.0, None, None, None),
        (2.0, "reset", 2.0, None),
        (1.0, "ok", 0.25, 1),
    ]
    third.release()


def test_only_the_last_decisions_are_remembered() -> None:
    bench = Bench(node("a"), max_decisions=3)
    for second in range(5):
        bench.router.lease(now=float(second), service_id="chat").release()
    assert [d.at for d in bench.router.decisions()] == [4.0, 3.0, 2.0]


@pytest.mark.parametrize("policy", ["vram", "rotate"])
def test_explaining_foretells_the_next_lease_and_changes_nothing(policy: Policy) -> None:
    bench = Bench(*FOUR, policy=policy)
    for _ in range(6):
        foretold = bench.explain()
        assert bench.explain() == foretold
        assert bench.router.lease(now=1.0, service_id="chat").decision == foretold
    assert len(bench.router.decisions()) == bench.router.own_total == 6


def test_explaining_casts_no_dice() -> None:
    bench, twin = (Bench(*FOUR, policy="random") for _ in range(2))
    decision = bench.explain()
    assert (decision.picked, decision.tier, len(decision.candidates)) == (None, "random", 4)
    assert bench.picks(10) == twin.picks(10)


# What is said when nobody can serve


def test_an_empty_mesh_says_so() -> None:
    assert Bench().refusal() == (
        "no peer offers the service 'chat', nor any other (0 online); start a node with "
        "`--expose chat=HOST:PORT`, or wait until one has joined"
    )


def test_a_service_that_nobody_offers_names_those_on_offer() -> None:
    assert Bench(node("a")).refusal(service_id="embed") == (
        "no peer offers the service 'embed'; online are: chat; choose one of those, or start a "
        "node with `--expose embed=HOST:PORT`"
    )


def test_a_service_whose_peers_are_all_gone_says_that() -> None:
    bench = Bench(node("a"), node("b"))
    bench.picks(1)
    assert bench.refusal(now=50.0).startswith(
        "none of the 2 peers that offered the service 'chat' is online"
    )


def test_peers_that_are_all_unable_are_counted_by_reason() -> None:
    bench = Bench(node("a"), node("b"), node("c", healthy=False), node("d", limit=1, in_flight=1))
    assert bench.refusal(exclude={"a", "b"}) == (
        "none of the 4 online peers that offer the service 'chat' can take a request now: "
        "2 already tried, 1 at its limit of 1, 1 unhealthy; try again later, or add a node "
        "that exposes it"
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nobody", "no peer has the peer ID or the name 'nobody'"),
        ("gone", "the peer 'gone' is offline, last heard 1 s ago"),
        ("left", "the peer 'left' has left, last heard 1 s ago"),
        ("host-embed", "does not offer the service 'chat', but: embed"),
        ("idle", "does not offer the service 'chat', but: nothing"),
        (
            "twin",
            "2 peers that offer the service 'chat' are called 'twin'; name the one you "
            "mean by its peer ID (t1, t2)",
        ),
        ("sick", "the peer 'sick' can't take a request for the service 'chat' now: unhealthy"),
    ],
)
def test_a_target_that_will_not_do_is_told_apart(target: str, says: str) -> None:
    bench = Bench(
        node("gone"),
        node("left", state="leaving"),
        node("embed", services=(ServiceData(service_id="embed"),)),
        node("idle", services=()),
        node("t1", name="twin"),
        node("t2", name="twin"),
        node("sick", healthy=False),
    )
    bench.ledger.mark_down("gone", "cut", 0.5)
    assert says in bench.refusal(target=target)


def test_a_target_that_was_tried_already_is_not_tried_again() -> None:
    assert "already tried" in Bench(node("a")).refusal(target="a", exclude={"a"})


def test_a_peer_cannot_pass_for_another_by_taking_its_id_for_a_name() -> None:
    bench = Bench(node("a"), node("thief", name="a"))
    assert bench.router.lease(now=1.0, service_id="chat", target="a").peer_id == "a"
    bench.ledger.mark_down("a", "cut", 2.0)
    assert "'a' is offline" in bench.refusal(target="a", now=2.0)


# What a choice by more than load builds on


def test_a_watcher_hears_of_news_of_load_and_of_loss() -> None:
    bench = Bench(node("a", 8))
    told: list[str] = []
    bench.router.watch(told.append)
    bench.hear(node("b", 16), now=1.0)
    assert told == ["b"]
    with bench.router.lease(now=1.0, service_id="chat"):
        assert told == ["b", "b"]  # counted in
    assert told == ["b", "b", "b"]  # and out
    bench.ledger.mark_down("a", "gone", now=2.0)
    assert told[-1] == "a"


def test_a_standing_is_that_of_an_online_peer_that_offers_the_service() -> None:
    bench = Bench(node("a", 8, in_flight=2))
    standing = bench.router.standing("a", "chat", 1.0)
    assert standing is not None and standing.row.in_flight == 2
    assert bench.router.standing("a", "other", 1.0) is None
    assert bench.router.standing("nobody", "chat", 1.0) is None
    assert bench.router.standing("a", "chat", 40.0) is None


def test_a_claimed_decision_counts_like_a_lease_and_stands_among_the_decisions() -> None:
    bench = Bench(*FOUR)
    decision = bench.explain()._replace(picked="d", model="llama3", tier="loaded")
    with bench.router.claim(decision) as lease:
        assert (lease.peer_id, lease.service_id) == ("d", "chat")
        assert bench.router.own_in_flight("d", "chat") == bench.router.own_total == 1
        assert bench.router.decisions()[0].model == "llama3"
    assert bench.router.own_total == 0


# Suspects


def test_a_suspect_is_held_back_while_anybody_else_can_serve() -> None:
    bench = Bench(node("a", 8, limit=2), node("b", 24))
    bench.ledger.suspect("b", "no answer to a ping", 1.0)
    assert bench.picks(1) == ["a"]
    rows = {row.peer_id: row.excluded for row in bench.explain().candidates}
    assert rows == {"a": None, "b": "suspect: no answer to a ping"}
    assert bench.picks(2) == ["a", "b"]  # the first is at its limit then


def test_a_suspect_is_tried_last_and_serves_where_nobody_else_is_there() -> None:
    bench = Bench(node("a", 8), node("b", 24))
    bench.ledger.suspect("a", "no answer to a ping", 1.0)
    assert bench.explain(exclude=("b",)).picked == "a"
    bench.ledger.suspect("b", "no answer to a ping", 1.0)
    assert bench.picks(2) == ["b", "a"]
    assert bench.explain(target="a").picked == "a"
    assert "2 already tried" in bench.refusal(exclude=("a", "b"))


def test_a_suspect_that_shows_life_has_its_place_again() -> None:
    bench = Bench(node("a", 8), node("b", 24))
    bench.ledger.suspect("b", "no answer to a ping", 1.0)
    assert bench.explain().picked == "a"
    bench.ledger.touch("b", 1.0)
    assert bench.explain().picked == "b"


def test_dice_are_cast_over_those_who_are_not_suspect() -> None:
    bench = Bench(*FOUR, policy="random")
    for peer_id in "abc":
        bench.ledger.suspect(peer_id, "no answer to a ping", 1.0)
    assert set(bench.picks(20)) == {"d"}
    bench.ledger.suspect("d", "no answer to a ping", 1.0)
    assert set(bench.picks(40)) == set("abcd")
