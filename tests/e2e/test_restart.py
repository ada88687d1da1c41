"""Real processes that are killed and started again: who finds whom, and by what."""

from __future__ import annotations

import json
from time import monotonic
from typing import Any

import pytest

from support.cluster import Cluster, Node, eventually

GIB = 2**30
INTERVAL = 10.0  # seconds between announcements


def remembered(node: Node) -> set[str]:
    """Peer IDs in the node's peers.json."""
    file = node.state_dir / "peers.json"
    if not file.exists():
        return set()
    return {row["peer_id"] for row in json.loads(file.read_text())["peers"]}


def row_of(node: Node, name: str) -> dict[str, Any]:
    return next((row for row in node.peers() if row["name"] == name), {})


def linked(node: Node) -> set[str]:
    """Names of the peers that it has a connection to, itself included."""
    return {row["name"] for row in node.peers() if row["connected"]}


def test_a_node_comes_back_without_any_bootstrap_by_the_peers_it_remembers(
    cluster: Cluster,
) -> None:
    boot = cluster.node("boot")
    others = [cluster.node(name, bootstrap=boot) for name in ("a", "b")]
    a, b = others
    for node in others:
        eventually(lambda node=node: node.online() == {"boot", "a", "b"}, within=15)
    eventually(lambda: {boot.peer_id, a.peer_id} <= remembered(b), within=15)
    boot.kill()
    b.kill()

    again = cluster.node("b")

    assert again.peer_id == b.peer_id
    # The last word of the dead may still go around for a while, and be taken for a life sign.
    eventually(lambda: a.online() == again.online() - {"boot"} == {"a", "b"}, within=10)
    assert row_of(again, "a")["connected"]
    assert (b.state_dir / "peers.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_peers_file_is_set_aside_and_said_and_the_node_goes_on(
    cluster: Cluster,
) -> None:
    boot = cluster.node("boot")
    state = cluster.folder / "state-a"
    state.mkdir()
    (state / "peers.json").write_bytes(b'{"schema_version": 1, "peers": [{"peer')

    node = cluster.node("a", bootstrap=boot)

    eventually(lambda: node.online() == {"boot", "a"}, within=10)
    (warning,) = [line for line in node.log() if line["event"] == "peers_file_damaged"]
    assert warning["level"] == "warning"
    assert "no JSON" in warning["error"]
    assert (state / "peers.json.damaged-1").read_bytes().endswith(b'{"peer')
    eventually(lambda: remembered(node) == {boot.peer_id}, within=15)


def test_a_state_folder_that_takes_no_file_is_a_warning_and_the_node_goes_on(
    cluster: Cluster,
) -> None:
    boot = cluster.node("boot")
    # In the way of the file, even for root.
    (cluster.folder / "state-a" / "peers.json").mkdir(parents=True)

    node = cluster.node("a", bootstrap=boot)

    eventually(lambda: node.online() == {"boot", "a"}, within=10)
    said = eventually(
        lambda: [line for line in node.log() if line["event"] == "peers_not_saved"], within=15
    )
    assert said[0]["level"] == "warning"
    assert "bootstrap" in said[0]["advice"]


@pytest.mark.parametrize("clock_offset", [0.0, -3600.0])
def test_the_same_key_on_the_same_port_is_heard_again_within_one_interval(
    cluster: Cluster, clock_offset: float
) -> None:
    host = cluster.node("host")
    before = cluster.node("other", "--vram", "8GiB", bootstrap=host)
    eventually(lambda: row_of(host, "other").get("total_vram") == 8 * GIB, within=15)
    before.kill()
    eventually(lambda: host.online() == {"host"}, within=5)

    listen = before.addr.partition("/p2p/")[0]
    after = cluster.node(
        "other", "--vram", "7GiB", bootstrap=host, listen=listen, clock_offset=clock_offset
    )
    up = monotonic()

    assert after.addr == before.addr
    # Not merely believed alive: what it says now is taken in, though its clock says it is old.
    eventually(lambda: row_of(host, "other")["total_vram"] == 7 * GIB, within=INTERVAL)
    assert monotonic() - up <= INTERVAL
    assert host.online() == after.online() == {"host", "other"}


def test_the_bootstrap_and_then_half_of_the_rest_die_and_nobody_is_ever_alone(
    cluster: Cluster,
) -> None:
    names = [f"n{number}" for number in range(8)]
    boot = cluster.node(names[0])
    others = [cluster.start_node(name, bootstrap=boot) for name in names[1:]]
    for node in others:
        node.wait_ready()
    for node in others:
        eventually(lambda node=node: node.online() == set(names), within=20)

    boot.kill()
    left = dict(zip(names[1:], others, strict=True))
    for victim in [None, *names[1:4]]:
        if victim is not None:
            left.pop(victim).kill()
        for node in left.values():
            eventually(lambda node=node: node.online() == linked(node) == set(left), within=10)
