"""Nodes that are told to go, as processes: no request of theirs is lost."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from support.cluster import Backend, Cluster, Node, eventually, read_to_end

TCP = ("--proxy-mode", "tcp")
MakeBackend = Callable[[Callable[[socket.socket], None]], Backend]


def stream_slowly(name: str, begun: list[str]) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        if not connection.recv(100):
            return  # a look at the service's health
        begun.append(name)
        for number in range(20):
            connection.sendall(f"{name} {number}\n".encode())
            connection.settimeout(0.1)
            try:
                connection.recv(1)
            except TimeoutError:
                continue

    return serve


def ask(node: Node) -> str:
    with socket.create_connection(node.proxy, timeout=30) as client:
        client.sendall(b"go")
        return read_to_end(client).decode()


def two_hosts(cluster: Cluster, backend: MakeBackend, begun: list[str]) -> tuple[Node, Node, Node]:
    hosts: list[Node] = []
    for name, vram in (("small", "8GiB"), ("big", "24GiB")):
        service = backend(stream_slowly(name, begun))
        told = ("--expose", f"raw={service.address}", "--health", "raw=tcp", "--vram", vram)
        hosts.append(cluster.node(name, *told, bootstrap=hosts[0] if hosts else None))
    entry = cluster.entry(hosts[0], *TCP, "--target", "big")
    eventually(lambda: entry.online() >= {"small", "big"}, within=15)
    return hosts[0], hosts[1], entry


def state_of(entry: Node, name: str) -> str:
    return next(str(row["state"]) for row in entry.peers() if row["name"] == name)


def test_sigterm_lets_three_live_streams_end_and_new_ones_go_elsewhere(
    cluster: Cluster, backend: MakeBackend
) -> None:
    begun: list[str] = []
    small, big, pinned = two_hosts(cluster, backend, begun)
    free = cluster.entry(small, *TCP, name="free")
    eventually(lambda: free.online() >= {"small", "big"}, within=15)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(ask, pinned) for _ in range(3)]
        eventually(lambda: begun.count("big") == 3, within=10)
        big.signal(signal.SIGTERM)
        eventually(lambda: state_of(free, "big") == "draining", within=5, every=0.02)
        assert ask(free).startswith("small")
        # All of it, to its last line.
        assert [stream.result().splitlines()[-1] for stream in streams] == ["big 19"] * 3
    assert big.wait(20) == 0
    assert begun.count("big") == 3
    eventually(lambda: state_of(free, "big") == "left", within=5)
    events = [line["event"] for line in big.log()]
    assert events.index("node_draining") < events.index("node_drained")


def test_meshnode_drain_waits_for_what_runs_and_tells_when_the_node_has_left(
    cluster: Cluster, backend: MakeBackend
) -> None:
    begun: list[str] = []
    _, big, pinned = two_hosts(cluster, backend, begun)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(ask, pinned)
        eventually(lambda: begun == ["big"], within=10)
        api = str(big.ready["api"])
        told = ("--api", api, "--state-dir", str(big.state_dir), "--json")
        done = cluster.run("drain", *told)
        assert done.returncode == 0, done.stderr
        assert stream.result().splitlines()[-1] == "big 19"
    answer = json.loads(done.stdout)
    assert (answer["state"], answer["cut"]) == ("left", 0)
    assert big.wait(20) == 0
    assert cluster.run("drain", "--api", api).returncode == 3


def test_a_second_signal_does_not_wait(cluster: Cluster, backend: MakeBackend) -> None:
    begun: list[str] = []
    _, big, pinned = two_hosts(cluster, backend, begun)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(ask, pinned)
        eventually(lambda: begun == ["big"], within=10)
        big.signal(signal.SIGTERM)
        eventually(lambda: "node_draining" in [line["event"] for line in big.log()], within=5)
        before = monotonic()
        big.signal(signal.SIGTERM)
        assert big.wait(20) == 128 + signal.SIGTERM
        assert monotonic() - before < 10
        # A cut answer never looks whole.
        assert isinstance(stream.exception(), OSError)


def test_a_service_manager_hears_ready_reload_and_stop(cluster: Cluster) -> None:
    path = str(cluster.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(60)
        node = cluster.node("managed", env={"NOTIFY_SOCKET": path})
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=up as 12D3")
        node.signal(signal.SIGHUP)
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(4096) == b"READY=1"
        node.signal(signal.SIGTERM)
        assert manager.recv(4096).startswith(b"STOPPING=1\nSTATUS=draining")
        assert node.wait(20) == 0
