"""Clients and strangers in numbers: short, slow, idle, and without the token."""

from __future__ import annotations

import io
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from support.cluster import Cluster, eventually
from support.faults import Client, Figures, failures, start_hosts, wait_for

ENTRY_TCP = ("--proxy", "127.0.0.1:0", "--proxy-mode", "tcp")


def test_a_wrong_token(cluster: Cluster, figures: Figures) -> None:
    host = cluster.node("host")
    right = cluster.node("right", bootstrap=host)
    began = time.monotonic()
    stranger = cluster.start_node("stranger", bootstrap=host, token=cluster.new_token())
    assert stranger.wait(30) == 5
    took = time.monotonic() - began
    figures.at_most("refused after, the interpreter's own start included", took, 3, "s")
    assert any("token" in line for line in stranger.err)
    assert host.online() == {"host", "right"} == right.online()


def test_slow_clients_and_400_idle_strangers(cluster: Cluster, figures: Figures) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    (host,) = start_hosts(cluster, 1)
    entry = cluster.entry(host)
    wait_for(entry, "host0")
    try:
        with ExitStack() as idle:
            mesh_port = int(host.addr.split("/")[4])
            for _ in range(400):
                stranger = socket.create_connection(("127.0.0.1", mesh_port), timeout=20)
                idle.enter_context(stranger)
            for _ in range(100):
                slow = socket.create_connection(entry.proxy, timeout=20)
                idle.enter_context(slow)
                slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-")
            asked = Client(entry).ask_many(20)
            assert failures(asked) == []
            joiner = cluster.start_node("joiner", bootstrap=host)
            joiner.wait_ready()
            ready_at = time.monotonic()
            eventually(lambda: joiner.online() >= {"host0", "joiner"}, within=20)
            figures.at_most("a member joins within", time.monotonic() - ready_at, 1, "s")
            figures.note("slowest request meanwhile", max(one.took for one in asked), "s")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_10000_short_connections(cluster: Cluster, backend, figures: Figures) -> None:
    def answer(connection: socket.socket) -> None:
        if connection.recv(100):
            connection.sendall(b"pong")

    host = cluster.node("host", "--expose", f"raw={backend(answer).address}", "--health", "raw=off")
    entry = cluster.node("entry", *ENTRY_TCP, bootstrap=host)
    wait_for(entry, "host")

    def one(_: int) -> bool:
        with socket.create_connection(entry.proxy, timeout=60) as client:
            client.sendall(b"ping")
            client.shutdown(socket.SHUT_WR)
            return client.recv(100) == b"pong"

    processes = [psutil.Process(node.pid) for node in (host, entry)]
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(1_000)))  # what is only allocated once
        fds = _settled([p.num_fds for p in processes])
        rss = [p.memory_info().rss for p in processes]
        served = sum(pool.map(one, range(10_000)))
    figures.at_least("of 10,000 were served", served, 10_000, "")
    eventually(lambda: [p.num_fds() for p in processes] == fds, within=20)
    grown = max(p.memory_info().rss - before for p, before in zip(processes, rss, strict=True))
    figures.at_most("memory grew by", grown / 2**20, 20, "MiB")


def _fill(path: Path) -> None:
    """Write until no byte more fits."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _write_on(file)


def _write_on(file: io.RawIOBase) -> None:
    while file.write(b"x" * 4096):
        continue


def _settled(reads) -> list[int]:
    """The values once two looks in a row agree."""
    last: list[list[int]] = [[]]

    def look() -> list[int] | None:
        now = [read() for read in reads]
        same = now == last[0]
        last[0] = now
        return now if same else None

    return eventually(look, within=30, every=0.5)


def test_descriptors_exhausted_and_released(cluster: Cluster, figures: Figures) -> None:
    (host,) = start_hosts(cluster, 1)
    entry = cluster.start_node(
        "laptop", "--proxy", "127.0.0.1:0", bootstrap=host, max_files=256
    ).wait_ready()
    wait_for(entry, "host0")
    client = Client(entry)
    assert client.ask().error is None
    held = []
    try:
        for _ in range(400):
            try:
                held.append(socket.create_connection(entry.proxy, timeout=2))
            except OSError:
                break
        assert entry.get("/healthz"), "the control API keeps a reserve"
        assert entry.online() >= {"host0"}
    finally:
        for one in held:
            one.close()
    released_at = time.monotonic()
    eventually(lambda: client.ask().error is None, within=20)
    figures.at_most("normal again after", time.monotonic() - released_at, 1, "s")


def test_a_full_disk(cluster: Cluster, figures: Figures, tiny_disk: Path) -> None:
    host = cluster.node("host")
    state = tiny_disk / "state"
    node = cluster.node("full", "--state-dir", str(state), bootstrap=host)
    identity = (state / "identity.key").read_bytes()
    eventually(lambda: (state / "peers.json").exists(), within=40)
    known = (state / "peers.json").read_bytes()
    filler = tiny_disk / "filler"
    _fill(filler)
    others = [cluster.node(f"n{number}", bootstrap=host) for number in range(2)]
    wait_for(node, "n0", "n1")
    eventually(
        lambda: [line for line in node.log() if "No space left" in str(line.get("error"))],
        within=40,
    )
    assert (state / "peers.json").read_bytes() == known, "the old state stays"
    assert (state / "identity.key").read_bytes() == identity
    assert node.child.poll() is None and others[0].online() >= {"full"}
    filler.unlink()
    eventually(lambda: (state / "peers.json").read_bytes() != known, within=60)
    figures.at_most("files damaged", sum(1 for _ in state.glob("*damaged*")), 0, "")
