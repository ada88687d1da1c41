"""Our nodes beside go-libp2p: a member written from the protocols/ folder alone joins, both ways.

The Go program is built once, by conftest.py; without a Go toolchain or its modules these tests are
skipped.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshnode.core import token as tokens
from support.cluster import Backend, Cluster, Node, answer_with_hash, eventually, read_to_end
from support.foreign import PATIENCE, ForeignPeer

# Compiling go-libp2p takes minutes where nothing is cached.
pytestmark = pytest.mark.slow


MakeGo = Callable[..., ForeignPeer]


@pytest.fixture
def go_peer(go_program: str, cluster: Cluster) -> Iterator[MakeGo]:
    made: list[ForeignPeer] = []

    def make(key: bytes | None = None) -> ForeignPeer:
        token = tokens.decode(cluster.token)
        made.append(ForeignPeer([go_program, (key or token.key).hex(), token.network]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def hasher() -> Iterator[Backend]:
    backend = Backend(answer_with_hash)
    yield backend
    backend.close()


def row(node: Node, name: str) -> dict[str, Any]:
    return next((row for row in node.peers() if row["name"] == name), {})


def ask(node: Node, question: bytes) -> bytes:
    with socket.create_connection(node.proxy, timeout=PATIENCE) as connection:
        connection.sendall(question)
        connection.shutdown(socket.SHUT_WR)
        return read_to_end(connection)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_go_peer_that_dials_is_a_member_like_any_other(
    cluster: Cluster, go_peer: MakeGo, hasher: Backend
) -> None:
    ours = cluster.node("ours", "--vram", "8GiB", "--expose", f"hash={hasher.address}")
    go = go_peer()
    dialled = go.do("dial", addr=ours.addr)
    assert "error" not in dialled, dialled
    print(f"go connected in {dialled['connect_ms']} ms")

    heard = go.next_of("heard", ours.peer_id)
    assert (heard["name"], heard["services"], heard["vram"]) == ("ours", 1, 8 * 2**30)
    assert ours.addr in heard["addrs"]
    shown = eventually(lambda: row(ours, "gopher"), within=PATIENCE)
    assert shown["peer_id"] == go.peer_id
    assert (shown["online"], shown["connected"], shown["path"]) == (True, True, "direct")
    assert shown["available_vram"] == 2**40
    assert [service["service_id"] for service in shown["services"]] == ["go"]

    assert go.do("ping", peer=ours.peer_id)["rtt_ms"] > 0
    identified = go.do("protocols", peer=ours.peer_id)
    assert "/meshsub/1.1.0" in identified.get("protocols", ()), identified

    question = os.urandom(3_000_000)
    answer = go.tunnel(ours.peer_id, "hash", question)
    assert answer == {"event": "tunnel", "status": "ok", "answer": sha(question)}
    assert go.tunnel(ours.peer_id, "nothing", b"x")["status"] == "no_such_service"


def test_a_go_peer_that_is_dialled_serves_our_clients(cluster: Cluster, go_peer: MakeGo) -> None:
    go = go_peer()
    args = ("--proxy-mode", "tcp", "--service", "go")
    ours = cluster.node("ours", "--proxy", "127.0.0.1:0", *args, bootstrap=go.addr)
    assert go.next("member")["peer"] == ours.peer_id
    eventually(lambda: row(ours, "gopher").get("online"), within=PATIENCE)
    assert go.next_of("heard", ours.peer_id)["name"] == "ours"
    for size in (0, 10, 2_000_000):
        question = os.urandom(size)
        assert ask(ours, question).decode() == sha(question)
    assert ours.decisions()[0]["picked"] == go.peer_id


def test_news_of_a_go_peer_reaches_members_that_it_does_not_know(
    cluster: Cluster, go_peer: MakeGo
) -> None:
    first = cluster.node("first")
    second = cluster.node("second", bootstrap=first)
    go = go_peer()
    assert "error" not in go.do("dial", addr=first.addr)
    shown = eventually(lambda: row(second, "gopher"), within=PATIENCE)
    assert shown["peer_id"] == go.peer_id
    assert go.next_of("heard", second.peer_id)["name"] == "second"
    # The second then makes a link of its own, to the address that go announced.
    eventually(lambda: row(second, "gopher")["connected"], within=PATIENCE)


def test_a_wrong_key_is_named_on_both_sides(cluster: Cluster, go_peer: MakeGo) -> None:
    ours = cluster.node("ours")
    go = go_peer(key=b"\x01" * 32)
    assert "refused: wrong_token" in go.do("dial", addr=ours.addr)["error"]
    assert row(ours, "gopher") == {}
    refused = cluster.start_node("refused", bootstrap=go.addr)
    assert refused.wait(PATIENCE) == 5
    assert "wrong_token" in go.next("refused")["error"]


def test_what_is_cut_on_the_way_to_a_go_peer_does_not_look_whole(
    cluster: Cluster, go_peer: MakeGo
) -> None:
    def cut_short(connection: socket.socket) -> None:
        read_to_end(connection)
        connection.sendall(b"half an ans")
        # Closed with a reset, as by a process that was killed.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    backend = Backend(cut_short)
    try:
        ours = cluster.node("ours", "--expose", f"cut={backend.address}")
        go = go_peer()
        go.do("dial", addr=ours.addr)
        answer = go.tunnel(ours.peer_id, "cut", b"question")
        assert "error" in answer, answer
    finally:
        backend.close()


def test_a_go_peer_behind_our_relay_is_reached_through_it(
    cluster: Cluster, go_peer: MakeGo
) -> None:
    relay = cluster.node("relay", "--relay")
    go = go_peer()
    assert "error" not in go.do("dial", addr=relay.addr)
    reserved = go.do("reserve", addr=relay.addr)
    assert "error" not in reserved, reserved
    assert (reserved["limited"], 3500 < reserved["expires_s"] <= 3601) == (False, True)
    args = ("--proxy-mode", "tcp", "--service", "go", "--proxy", "127.0.0.1:0")
    ours = cluster.node("ours", *args, bootstrap=f"{relay.addr}/p2p-circuit/p2p/{go.peer_id}")
    eventually(lambda: row(ours, "gopher").get("online"), within=PATIENCE)
    question = os.urandom(1_000_000)
    assert ask(ours, question).decode() == sha(question)


def test_a_go_peer_reaches_one_of_ours_through_our_relay(
    cluster: Cluster, go_peer: MakeGo, hasher: Backend
) -> None:
    relay = cluster.node("relay", "--relay")
    # Port 1 answers to nobody: it can only dial out.
    host = cluster.node(
        *("host", "--expose", f"hash={hasher.address}"),
        *("--announce-addr", "/ip4/127.0.0.1/tcp/1"),
        bootstrap=relay,
    )
    circuit = f"{relay.addr}/p2p-circuit/p2p/{host.peer_id}"
    eventually(lambda: circuit in row(relay, "host").get("addrs", ()), within=PATIENCE)
    go = go_peer()
    assert "error" not in go.do("dial", addr=relay.addr)
    dialled = go.do("dial", addr=circuit)
    assert "p2p-circuit" in dialled["remote"], dialled
    eventually(lambda: row(host, "gopher").get("path") == "relayed", within=PATIENCE)
    assert go.do("ping", peer=host.peer_id)["rtt_ms"] > 0
    question = os.urandom(1_000_000)
    assert go.tunnel(host.peer_id, "hash", question)["answer"] == sha(question)
