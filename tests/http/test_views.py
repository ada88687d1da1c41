from __future__ import annotations

import json

from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.router import Router
from meshnode.http.views import decisions_view, peers_view
from meshnode.net.mesh import Link

PEER_KEYS = {
    *("peer_id", "name", "state", "online", "last_seen_s", "available_vram", "total_vram"),
    *("gpu_count", "in_flight", "services", "addrs", "connected", "rtt_ms", "version"),
    *("reason", "down_reason", "path", "via"),
}


class NoDice:
    def randrange(self, stop: int, /) -> int:
        raise AssertionError("no dice under this policy")


def node(peer_id: str, **more) -> NodeData:
    more.setdefault("services", (ServiceData(service_id="llm"),))
    return NodeData(id=peer_id, name=more.pop("name", peer_id), seq=1, **more)


def mesh_of(*nodes: NodeData) -> tuple[Ledger, Router]:
    ledger = Ledger("me")
    router = Router(ledger, self_id="me", policy="vram", rng=NoDice())
    for one in nodes:
        ledger.observe(one, now=100.0)
    return ledger, router


def view(ledger: Ledger, router: Router, *links: Link, now: float = 101.5):
    body = peers_view(ledger.entries(), router, links, self_id="me", now=now)
    return json.loads(json.dumps(body))  # what can't be JSON fails here


def test_this_node_comes_first_and_then_the_others_by_name():
    body = view(*mesh_of(node("b"), node("a"), node("me", name="z")))
    assert body["self"] == "me"
    assert [peer["peer_id"] for peer in body["peers"]] == ["me", "a", "b"]
    assert all(set(peer) >= PEER_KEYS for peer in body["peers"])


def test_unknown_values_are_null_and_a_full_gpu_is_not_unknown():
    body = view(*mesh_of(node("a"), node("b", total_vram=8), node("c", available_vram=2**60)))
    by_id = {peer["peer_id"]: peer for peer in body["peers"]}
    assert by_id["a"]["available_vram"] is None
    assert by_id["a"]["rtt_ms"] is None
    assert by_id["a"]["version"] is None
    assert (by_id["b"]["available_vram"], by_id["b"]["total_vram"]) == (0, 8)
    assert by_id["c"]["available_vram"] is None  # nobody has that much


def test_last_seen_is_an_age_on_our_clock():
    ledger, router = mesh_of(node("a", last_seen=123_456_789))
    (peer,) = view(ledger, router, now=101.5)["peers"]
    assert (peer["last_seen_s"], peer["online"], peer["state"]) == (1.5, True, "up")
    (peer,) = view(ledger, router, now=141.0)["peers"]
    assert (peer["last_seen_s"], peer["online"], peer["state"]) == (41.0, False, "offline")


def test_every_state_is_shown_with_its_reason():
    ledger, router = mesh_of(
        *(node(name) for name in ("me", "a", "b", "c")), node("d", state="leaving")
    )
    ledger.suspect("b", "no answer to a ping for 1.1 s", 100.5)
    ledger.mark_down("c", "link_lost: closed by peer", 100.5)
    shown = {p["peer_id"]: (p["state"], p["reason"]) for p in view(ledger, router)["peers"]}
    assert shown == {
        "me": ("up", "this node"),
        "a": ("up", "its announcement was heard"),
        "b": ("suspect", "no answer to a ping for 1.1 s"),
        "c": ("offline", "link_lost: closed by peer"),
        "d": ("left", "it said goodbye"),
    }


def test_in_flight_counts_our_leases_beside_what_others_hold():
    busy = ServiceData(service_id="llm", in_flight=2)
    ledger, router = mesh_of(node("a", services=(busy,)))
    with router.lease(now=101.0, service_id="llm"):
        (peer,) = view(ledger, router)["peers"]
        assert peer["in_flight"] == 3
        assert peer["services"][0]["in_flight"] == 3


def test_a_link_gives_its_round_trip():
    link = Link("a", None, dialled=True, since=100.0, last_received=101.0, rtt=0.00125)
    (peer,) = view(*mesh_of(node("a")), link)["peers"]
    assert (peer["connected"], peer["rtt_ms"]) == (True, 1.25)


def test_the_path_taken_is_shown():
    links = [
        Link("a", None, dialled=True, since=100.0, last_received=101.0, rtt=None),
        Link("b", None, dialled=True, since=100.0, last_received=101.0, rtt=None, via="r"),
    ]
    shown = view(*mesh_of(*(node(name) for name in ("me", "a", "b", "c"))), *links)["peers"]
    assert {peer["peer_id"]: (peer["path"], peer["via"]) for peer in shown} == {
        "me": (None, None),
        "a": ("direct", None),
        "b": ("relayed", "r"),
        "c": (None, None),
    }


def test_a_decision_shows_its_table_and_the_tier_that_decided():
    _, router = mesh_of(node("a", available_vram=8), node("b", available_vram=16))
    with router.lease(now=101.0, wall_time=1.0, service_id="llm"):
        (decision,) = decisions_view(router.decisions(), now=103.0)["decisions"]
    shown = json.loads(json.dumps(decision))
    assert (shown["picked"], shown["tier"], shown["age_s"]) == ("b", "vram", 2.0)
    assert shown["outcome"] is None
    assert [(row["peer_id"], row["available_vram"]) for row in shown["candidates"]] == [
        ("b", 16),
        ("a", 8),
    ]


def test_a_peer_that_was_put_aside_shows_why_and_for_how_long():
    class Even:
        def randrange(self, stop: int, /) -> int:
            return stop // 2

    ledger = Ledger("me")
    router = Router(ledger, self_id="me", policy="vram", rng=Even())
    for one in (node("bad", available_vram=2), node("good", available_vram=1)):
        ledger.observe(one, now=100.0)
    for _ in range(5):
        with router.lease(now=101.0, service_id="llm") as lease:
            lease.failed("reset", now=101.0)
    bad, good = view(ledger, router, now=102.0)["peers"]
    (service,) = bad["services"]
    assert service["circuit"] == "open"
    assert service["circuit_reason"] == "5 failures in a row (reset)"
    assert 3.5 <= service["ejected_for_s"] <= 4.5
    assert service["proven"] is False
    assert good["services"][0]["circuit"] == "closed"
    (service,) = view(ledger, router, now=107.0)["peers"][0]["services"]
    assert (service["circuit"], service["ejected_for_s"]) == ("half_open", None)
