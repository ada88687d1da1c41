"""The main job with real processes: a request reaches the best free GPU and comes back whole."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import openai
import pytest

from support.cluster import Backend, Cluster, Node, answer_with_hash, eventually, read_to_end
from support.openai_client import open_client

TCP = ("--proxy-mode", "tcp")  # for what is not HTTP
MakeBackend = Callable[[Callable[[socket.socket], None]], Backend]


def client_of(node: Node) -> openai.OpenAI:
    return open_client(node.base_url, timeout=30)


def chat(client: openai.OpenAI, text: str = "hello") -> str:
    """One streamed chat; returns the reply, which names the engine."""
    stream = client.chat.completions.create(
        model="demo-model", messages=[{"role": "user", "content": text}], stream=True
    )
    with stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def wait_for(node: Node, *names: str) -> None:
    eventually(lambda: node.online() >= set(names), within=15)


def test_the_openai_client_streams_from_the_host_with_most_free_memory(cluster: Cluster) -> None:
    hosts = cluster.hosts(8, 16, 24)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host8", "host16", "host24")
    with client_of(entry) as client:
        assert [model.id for model in client.models.list()] == ["demo-model"]
        assert "host24" in chat(client)
    decision = entry.decisions()[0]
    assert decision["picked"] == hosts[2].peer_id
    assert decision["tier"] == "vram"
    assert {row["name"] for row in decision["candidates"]} == {"host8", "host16", "host24"}


def test_eight_at_once_spread_over_all_three_hosts(cluster: Cluster) -> None:
    # Slow enough that none has ended when the last begins, also on a busy machine.
    hosts = cluster.hosts(8, 16, 24, engine_args=("--first-token-delay", "3"))
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host8", "host16", "host24")
    begin = Barrier(8, timeout=30)

    def ask(number: int) -> str:
        with client_of(entry) as client:
            begin.wait()
            return chat(client, f"number {number}")

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(8)))
    served = Counter(
        name for reply in replies for name in ("host8", "host16", "host24") if name in reply
    )
    assert sorted(served.values()) == [2, 3, 3], served


def test_after_kill_9_of_the_chosen_host_the_next_fifty_requests_all_succeed(
    cluster: Cluster,
) -> None:
    hosts = cluster.hosts(8, 24)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host8", "host24")
    with client_of(entry) as client:
        assert "host24" in chat(client)
    hosts[1].kill()
    for _ in range(50):
        # A new connection each time, as a choice is made for each connection.
        with client_of(entry) as client:
            assert "host8" in chat(client)


def test_a_client_that_half_closes_still_gets_its_answer(
    cluster: Cluster, backend: MakeBackend
) -> None:
    service = backend(answer_with_hash)
    host = cluster.node("host", "--expose", f"raw={service.address}")
    entry = cluster.entry(host, *TCP)
    wait_for(entry, "host")
    with socket.create_connection(entry.proxy, timeout=20) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == hashlib.sha256(b"question").hexdigest().encode()


def test_a_backend_that_half_closes_first_still_hears_the_client(
    cluster: Cluster, backend: MakeBackend
) -> None:
    heard: list[bytes] = []
    done = threading.Event()

    def greet_then_listen(connection: socket.socket) -> None:
        connection.sendall(b"greeting")
        connection.shutdown(socket.SHUT_WR)
        said = read_to_end(connection)
        if said:  # a look at the service's health says nothing
            heard.append(said)
            done.set()

    host = cluster.node("host", "--expose", f"raw={backend(greet_then_listen).address}")
    entry = cluster.entry(host, *TCP)
    wait_for(entry, "host")
    with socket.create_connection(entry.proxy, timeout=20) as client:
        assert read_to_end(client) == b"greeting"
        client.sendall(b"said after the backend's end")
    assert done.wait(20)
    assert heard == [b"said after the backend's end"]


def test_a_cut_answer_never_looks_whole(cluster: Cluster, backend: MakeBackend) -> None:
    started = threading.Event()

    def answer_without_end(connection: socket.socket) -> None:
        connection.sendall(b"half of an ans")
        started.set()
        read_to_end(connection)

    host = cluster.node("host", "--expose", f"raw={backend(answer_without_end).address}")
    entry = cluster.entry(host, *TCP)
    wait_for(entry, "host")
    with socket.create_connection(entry.proxy, timeout=20) as client:
        assert started.wait(20)
        assert client.recv(100) == b"half of an ans"
        host.kill()
        with pytest.raises(ConnectionResetError):
            client.recv(100)


def test_a_body_of_200_mb_arrives_whole(cluster: Cluster, backend: MakeBackend) -> None:
    host = cluster.node("host", "--expose", f"raw={backend(answer_with_hash).address}")
    entry = cluster.entry(host, *TCP)
    wait_for(entry, "host")
    block, digest = os.urandom(1 << 20), hashlib.sha256()
    with socket.create_connection(entry.proxy, timeout=60) as client:
        for _ in range(200):
            client.sendall(block)
            digest.update(block)
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == digest.hexdigest().encode()


def test_two_hundred_streams_at_once(cluster: Cluster, backend: MakeBackend) -> None:
    together = threading.Barrier(200, timeout=60)
    served: list[bytes] = []

    def echo_when_all_are_here(connection: socket.socket) -> None:
        question = connection.recv(100)
        if not question:
            return  # a look at the service's health
        served.append(question)
        together.wait()
        connection.sendall(question)

    service = backend(echo_when_all_are_here)
    plain = ("--expose", f"raw={service.address}", "--health", "raw=tcp")
    first = cluster.node("host-a", *plain)
    cluster.node("host-b", *plain, bootstrap=first)
    entry = cluster.entry(first, *TCP)
    wait_for(entry, "host-a", "host-b")
    with ExitStack() as open_clients:
        clients = []
        for number in range(200):
            client = socket.create_connection(entry.proxy, timeout=60)
            clients.append(open_clients.enter_context(client))
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert read_to_end(client) == b"%d" % number
    assert len(served) == 200
    picked = Counter(decision["picked"] for decision in entry.decisions())
    assert sorted(picked.values()) == [100, 100], "two equal hosts share the load"
    eventually(lambda: all(row["in_flight"] == 0 for row in entry.peers()), within=10)


def test_sigterm_leaves_nothing_behind_and_the_others_drop_the_node_within_a_second(
    cluster: Cluster,
) -> None:
    hosts = cluster.hosts(8, 24)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host8", "host24")
    leaver = hosts[1]
    port = int(leaver.addr.split("/")[4])
    leaver.signal(signal.SIGTERM)
    eventually(
        lambda: "host24" not in entry.online() and "host24" not in hosts[0].online(), within=1
    )
    assert leaver.wait(10) == 0
    row = next(row for row in entry.peers() if row["name"] == "host24")
    assert row["state"] == "left"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{leaver.ready['api']}/healthz", timeout=5)
    # What can be lost is gone; the identity stays.
    assert {path.name for path in leaver.state_dir.iterdir()} <= {"identity.key", "peers.json"}


def test_nobody_to_serve_is_said_in_a_whole_answer(cluster: Cluster) -> None:
    lonely = cluster.node("laptop", "--proxy", "127.0.0.1:0")
    request = urllib.request.Request(
        f"http://{lonely.ready['proxy']}/v1/chat/completions", data=b"x" * 3_000_000
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 503
    assert b"Sorry, waiting for nodes to connect" in refused.value.read()


def test_a_refusing_backend_costs_the_client_nothing(cluster: Cluster) -> None:
    engine = cluster.engine("good")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead_port = taken.getsockname()[1]
    broken = cluster.node("broken", "--vram", "80GiB", "--expose", f"llm=127.0.0.1:{dead_port}")
    cluster.node("good", "--vram", "8GiB", "--expose", f"llm={engine.address}", bootstrap=broken)
    entry = cluster.entry(broken)
    wait_for(entry, "broken", "good")
    for _ in range(20):
        with client_of(entry) as client:
            assert "good" in chat(client)


def test_a_target_is_kept_to_though_another_has_more_memory(cluster: Cluster) -> None:
    hosts = cluster.hosts(8, 24)
    entry = cluster.entry(hosts[0], "--target", "host8")
    wait_for(entry, "host8", "host24")
    for _ in range(3):
        with client_of(entry) as client:
            assert "host8" in chat(client)


def test_each_service_has_its_own_hosts(cluster: Cluster) -> None:
    chat_engine, embed_engine = cluster.engine("chatty"), cluster.engine("embedder")
    host = cluster.node(
        "host",
        "--expose",
        f"chat={chat_engine.address}",
        "--expose",
        f"embed={embed_engine.address}",
    )
    to_chat = cluster.entry(host, "--service", "chat", name="one")
    to_embed = cluster.entry(host, "--service", "embed", name="two")
    wait_for(to_chat, "host")
    wait_for(to_embed, "host")
    with client_of(to_chat) as client:
        assert "chatty" in chat(client)
    with client_of(to_embed) as client:
        assert "embedder" in chat(client)
