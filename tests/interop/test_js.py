"""Our nodes beside js-libp2p 3: found by mDNS both ways, membership both ways, a tunnel.

Node 22 and the libraries come from npm; where they can't be had these tests are skipped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

from meshnode.core import token as tokens
from support.cluster import Backend, Cluster, Node, answer_with_hash, eventually
from support.foreign import PATIENCE, ForeignPeer
from support.lan import Lan, ip, within

LISTEN = "/ip4/0.0.0.0/tcp/4201"

# Some 100 MB of npm packages, an own Node among them, are installed first.
pytestmark = pytest.mark.slow


# The nodes must end before their network does.
@pytest.fixture
def cluster(lan: Lan, cluster: Cluster) -> Cluster:
    return cluster


MakeJs = Callable[..., ForeignPeer]


@pytest.fixture
def js_peer(js_program: list[str], lan: Lan, cluster: Cluster) -> Iterator[MakeJs]:
    made: list[ForeignPeer] = []

    def make(key: bytes | None = None) -> ForeignPeer:
        hexadecimal = (key or tokens.decode(cluster.token).key).hex()
        netns = lan.host()
        # js names no interface when it sends: it needs a route, as every host on a LAN has.
        ip("-n", netns, "route", "add", "224.0.0.0/4", "dev", "eth0")
        argv = ["ip", "netns", "exec", netns, *js_program, hexadecimal]
        made.append(ForeignPeer(argv))
        return made[-1]

    yield make
    for one in made:
        one.close()


def found_by(node: Node, peer_id: str) -> list[dict[str, Any]]:
    return [
        line
        for line in node.log()
        if line.get("event") == "mdns_found" and line.get("peer_id") == peer_id
    ]


def test_js_and_ours_find_each_other_by_mdns_and_become_members(
    cluster: Cluster, lan: Lan, js_peer: MakeJs
) -> None:
    netns = lan.host()
    ours = cluster.node("ours", "--log-level", "debug", listen=LISTEN, mdns=True, netns=netns)
    began = monotonic()
    js = js_peer()
    found = js.next_of("found", ours.peer_id)
    assert f"/ip4/{lan.addr(netns)}/tcp/4201" in " ".join(found["addrs"])
    eventually(lambda: found_by(ours, js.peer_id), within=PATIENCE)
    print(f"found both ways {monotonic() - began:.2f} s after js was started")
    # Ours dials whom it found, and js lets it in.
    assert js.next("member")["peer"] == ours.peer_id
    links = eventually(
        lambda: [k for k in ours.log() if k.get("event") == "link_up"], within=PATIENCE
    )
    assert links[0]["peer_id"] == js.peer_id
    lag = [line for line in ours.get("/metrics").splitlines() if "loop_lag_seconds_bucket" in line]
    print(*(line for line in lag if 'le="0.02"' in line or 'le="+Inf"' in line), sep="\n")


def test_js_dials_ours_and_sends_through_a_tunnel(
    cluster: Cluster, lan: Lan, js_peer: MakeJs
) -> None:
    netns = lan.host()
    backend = within(netns, lambda: Backend(answer_with_hash))
    try:
        ours = cluster.node(
            "ours", "--expose", f"hash={backend.address}", listen=LISTEN, netns=netns
        )
        js = js_peer()
        addr = f"/ip4/{lan.addr(netns)}/tcp/4201/p2p/{ours.peer_id}"
        assert js.do("dial", addr=addr) == {"event": "dial", "peer": ours.peer_id}
        assert js.do("ping", peer=ours.peer_id)["rtt_ms"] >= 0
        question = os.urandom(1_000_000)
        answer = js.tunnel(ours.peer_id, "hash", question)
        assert answer == {
            "event": "tunnel",
            "status": "ok",
            "answer": hashlib.sha256(question).hexdigest(),
        }
        assert js.tunnel(ours.peer_id, "nothing", b"x")["status"] == "no_such_service"
    finally:
        backend.close()


def test_a_js_peer_of_another_network_is_not_found_and_not_let_in(
    cluster: Cluster, lan: Lan, js_peer: MakeJs
) -> None:
    netns = lan.host()
    ours = cluster.node("ours", "--log-level", "debug", listen=LISTEN, mdns=True, netns=netns)
    stranger, friend = js_peer(key=b"\x01" * 32), js_peer()
    friend.next_of("found", ours.peer_id)
    eventually(lambda: found_by(ours, friend.peer_id), within=PATIENCE)
    assert not found_by(ours, stranger.peer_id)
    addr = f"/ip4/{lan.addr(netns)}/tcp/4201/p2p/{ours.peer_id}"
    assert "refused: wrong_token" in stranger.do("dial", addr=addr)["error"]
