"""``meshnode forward`` with real processes: one port a peer, through joins, deaths and returns."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable

import pytest

from support.cluster import Backend, Cluster, Node, Process, eventually


def say_name(name: str) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        while piece := connection.recv(100):
            connection.sendall(name.encode() + b":" + piece)

    return serve


def asked(address: str) -> str:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"rpc")
        return connection.recv(100).decode()


def forward(cluster: Cluster, node: Node, *args: str) -> Process:
    argv = [sys.executable, "-m", "meshnode", "forward", "--service", "worker"]
    argv += ["--api", node.ready["api"], "--state-dir", str(node.state_dir), *args]
    process = Process(argv, cluster.env())
    cluster.processes.append(process)
    return process


@pytest.mark.timeout(180)
def test_each_worker_has_a_port_that_follows_it_through_death_and_return(
    cluster: Cluster, backend: Callable[..., Backend]
) -> None:
    workers = {name: backend(say_name(name)) for name in ("one", "two")}
    one = cluster.node("one", "--expose", f"worker={workers['one'].address}")
    two = cluster.node("two", "--expose", f"worker={workers['two'].address}", bootstrap=one)
    main = cluster.node("main", bootstrap=one)
    eventually(lambda: main.online() == {"one", "two", "main"}, within=20)
    env_file = cluster.folder / "servers.env"
    following = forward(cluster, main, "--env-file", str(env_file))
    eventually(lambda: following.out and following.out[-1].count(",") == 1, within=20)
    first = following.out[-1].split(",")
    assert [asked(address) for address in first] == ["one:rpc", "two:rpc"]
    assert env_file.read_text() == f"LLAMACPP_GRPC_SERVERS={','.join(first)}\n"
    rows = main.get("/api/p2p/workers")["nodes"]
    assert [row["tunnelAddress"] for row in rows] == first

    two.kill()
    eventually(lambda: following.out[-1] == first[0], within=20)
    assert env_file.read_text() == f"LLAMACPP_GRPC_SERVERS={first[0]}\n"
    with pytest.raises(ConnectionRefusedError):
        asked(first[1])

    cluster.node("two", "--expose", f"worker={workers['two'].address}", bootstrap=one)
    eventually(lambda: following.out[-1] == ",".join(first), within=30)
    assert asked(first[1]) == "two:rpc"

    following.signal(signal.SIGINT)
    assert following.wait(10) == 130
    with pytest.raises(ConnectionRefusedError):
        eventually(lambda: asked(first[0]) and None, within=10)


def test_as_json_each_line_names_the_peers(
    cluster: Cluster, backend: Callable[..., Backend]
) -> None:
    node = cluster.node("solo", "--expose", f"worker={backend(say_name('solo')).address}")
    following = forward(cluster, node, "--json")
    eventually(lambda: following.out and json.loads(following.out[-1])["forwards"], within=20)
    body = json.loads(following.out[-1])
    assert body["service"] == "worker"
    assert [row["name"] for row in body["forwards"]] == ["solo"]
    assert asked(body["forwards"][0]["address"]) == "solo:rpc"


def test_without_a_node_or_its_key_it_says_what_to_do(cluster: Cluster) -> None:
    result = cluster.run("forward", "--service", "worker", "--api", "127.0.0.1:9")
    assert result.returncode == 3
    assert "meshnode up" in result.stderr
    node = cluster.node("host")
    stranger = cluster.run(
        *("forward", "--service", "worker", "--api", node.ready["api"]),
        *("--state-dir", str(cluster.folder / "elsewhere")),
    )
    assert stranger.returncode == 2
    assert "api.key" in stranger.stderr


def test_a_node_on_a_unix_socket_is_asked_there_and_leaves_no_socket(cluster: Cluster) -> None:
    path = cluster.folder / "api.sock"
    node = cluster.node("host", "--api", f"unix:{path}")
    assert node.ready["api"] == f"unix:{path}"
    result = cluster.run("status", "--json", "--api", f"unix:{path}")
    assert json.loads(result.stdout)["name"] == "host", result.stderr
    node.signal(signal.SIGTERM)
    assert node.wait(15) == 0
    assert not path.exists()
    gone = cluster.run("status", "--api", f"unix:{path}")
    assert gone.returncode == 3
