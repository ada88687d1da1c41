"""A token rotated under load, and a peer kept out: real processes that take up changed files."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from support.cluster import Cluster, Node, eventually, read_to_end


def start(cluster: Cluster, name: str, token_file: Path, *args: str, **settings) -> Node:
    return cluster.start_node(name, "--token-file", str(token_file), *args, token="", **settings)


def write_lists(path: Path, *peers: str) -> Path:
    path.write_text("# one a line\n" + "".join(f"{peer}\n" for peer in peers))
    return path


def taken(node: Node) -> int:
    """How often the node took up changed keys or lists."""
    return sum(line["event"] == "belonging_changed" for line in node.log())


@pytest.fixture
def echo(backend) -> str:
    """A service that sends back what it gets, until its client's end."""

    def serve(connection: socket.socket) -> None:
        while piece := connection.recv(65536):
            connection.sendall(piece)

    return backend(serve).address


def test_a_token_is_rotated_without_a_restart_and_without_breaking_a_stream(
    cluster: Cluster, echo: str
) -> None:
    tokens = [cluster.folder / f"token-{name}" for name in ("host", "entry", "left-behind")]
    for path in tokens:
        path.write_text(cluster.token + "\n")
    host = start(cluster, "host", tokens[0], "--expose", f"echo={echo}").wait_ready()
    entry = start(
        cluster, "entry", tokens[1], "--proxy", "127.0.0.1:0", "--proxy-mode", "tcp", bootstrap=host
    ).wait_ready()
    left_behind = start(cluster, "left-behind", tokens[2], bootstrap=host).wait_ready()
    everybody = {"host", "entry", "left-behind"}
    eventually(lambda: host.online() == entry.online() == everybody, within=20)

    def have_taken(changes: int) -> bool:
        return all(taken(node) == changes for node in (host, entry))

    assert cluster.run("token", "rotate", str(tokens[0])).returncode == 0
    shutil.copy(tokens[0], tokens[1])
    eventually(lambda: have_taken(1), within=10)
    with socket.create_connection(entry.proxy, timeout=20) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        assert cluster.run("token", "rotate", str(tokens[0]), "--finish").returncode == 0
        shutil.copy(tokens[0], tokens[1])
        eventually(lambda: have_taken(2), within=10)
        eventually(lambda: host.online() == {"host", "entry"}, within=10)
        client.sendall(b"after")
        assert client.recv(100) == b"after"
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""
    # A member may have passed on what another said in the moment before it went too: then that one
    # counts as online until its window of 40 s ends.
    eventually(lambda: left_behind.online() == {"left-behind"}, within=60)


def test_a_peer_on_the_block_list_is_out_at_once_and_back_when_it_is_taken_off(
    cluster: Cluster,
) -> None:
    blocked = cluster.folder / "blocked"
    write_lists(blocked)
    host = cluster.node("host", "--block-peers-file", str(blocked))
    friend = cluster.node("friend", bootstrap=host)
    foe = cluster.node("foe", bootstrap=host)
    everybody = {"host", "friend", "foe"}
    eventually(lambda: all(n.online() == everybody for n in (host, friend, foe)), within=20)
    write_lists(blocked, foe.peer_id)
    eventually(lambda: host.online() == {"host", "friend"}, within=5)
    (row,) = [row for row in host.peers() if row["name"] == "foe"]
    assert not row["connected"] and "block-list" in row["down_reason"]
    # What others relay of it is not heard either.
    assert friend.online() >= {"host", "friend", "foe"}
    write_lists(blocked)
    eventually(lambda: host.online() == everybody, within=30)


def test_a_list_with_an_error_in_it_changes_nothing_and_is_told(cluster: Cluster) -> None:
    allowed = cluster.folder / "allowed"
    write_lists(allowed)
    host = cluster.node("host", "--allow-peers-file", str(allowed))
    allowed.write_text("# nobody yet\nnot a peer\n")
    eventually(lambda: [e for e in host.log() if e["event"] == "settings_not_taken"], within=5)
    (told,) = [e for e in host.log() if e["event"] == "settings_not_taken"]
    assert "line 2" in told["error"] and str(allowed) in told["error"]
    stranger = cluster.start_node("stranger", bootstrap=host)
    stranger.wait_ready()
    eventually(lambda: any("allow-list" in line for line in stranger.err), within=10)
    assert host.online() == {"host"}
