"""Backends that refuse or hang cost the others' clients nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median, quantiles
from time import monotonic
from typing import Any

import httpx
import openai

from support.cluster import Cluster, Node, eventually, read_to_end
from support.faults import Client, Figures, failures, start_hosts, wait_for


def test_a_refusing_backend(cluster: Cluster, figures: Figures) -> None:
    (good,) = start_hosts(cluster, 1)
    entry = cluster.entry(good)
    wait_for(entry, "host0")
    client = Client(entry)
    client.ask_many(10, 1)
    alone = median(one.took for one in client.ask_many(50, 1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead_port = taken.getsockname()[1]
    cluster.node(
        *("broken", "--vram", "80GiB", "--expose", f"llm=127.0.0.1:{dead_port}"),
        *("--health", "llm=off"),  # so that nobody is warned off
        bootstrap=good,
    )
    wait_for(entry, "broken")
    asked = client.ask_many(100, 1)
    assert failures(asked) == []
    figures.at_most("of 100 requests failed", len(failures(asked)), 0, "")
    more = (median(one.took for one in asked) - alone) * 1000
    figures.at_most("the median request takes longer by", more, 10, "ms")


def test_a_hung_backend(cluster: Cluster, backend, figures: Figures) -> None:
    """One entry node, two models: whoever asks for the one gets 504, the other's don't notice."""
    engine = EngineThatHangs()
    hung = backend(engine.serve)
    (good,) = start_hosts(cluster, 1)
    stuck = cluster.node("hung", "--expose", f"llm={hung.address}", bootstrap=good)
    entry = cluster.entry(good, "--first-byte-timeout", "2s")
    wait_for(entry, "host0", "hung")
    eventually(lambda: {"demo-model", "stuck-model"} <= models_at(entry), within=20)
    assert failures(Client(entry).ask_many(20, 2)) == []
    durations(entry, "stuck-model", 5)  # a newcomer gets one request at a time
    engine.hangs.set()
    before, meanwhile = [], []
    # In turns, as a machine's pace changes; pooled, as one in a hundred is rare.
    for _ in range(24 if figures.is_strict else 1):
        eventually(lambda: in_flight_at(entry, stuck) == 0, within=5)
        before += durations(entry, "demo-model", 60)
        with hanging_requests(entry, "stuck-model", 4):
            eventually(lambda: in_flight_at(entry, stuck) == 4, within=1, every=0.01)
            meanwhile += durations(entry, "demo-model", 60)
    figures.note("others' p99 before", _p99(before) * 1000, "ms")
    figures.note("others' p99 meanwhile", _p99(meanwhile) * 1000, "ms")
    grown = (_p99(meanwhile) / _p99(before) - 1) * 100
    figures.compare("others' p99 grows by", grown, 10, "%")
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda _: Client(entry, model="stuck-model").ask(), range(4)))
    assert all(isinstance(one.error, openai.APIStatusError) for one in ended), ended
    assert {one.error.status_code for one in ended} == {504}
    figures.at_most("504 after (limit 2 s)", max(one.took for one in ended), 2.5, "s")


class EngineThatHangs:
    """Lists a model and answers for it until it ``hangs``; health checks it always answers."""

    def __init__(self) -> None:
        self.hangs = threading.Event()

    def serve(self, connection: socket.socket) -> None:
        asked = connection.recv(1 << 16)
        if self.hangs.is_set() and not asked.startswith(b"GET "):
            read_to_end(connection)
            return
        body = b'{"object": "list", "data": [{"id": "stuck-model", "object": "model"}]}'
        connection.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )


def in_flight_at(entry: Node, host: Node) -> int:
    """Requests at the host, as the entry node counts them."""
    return sum(row["in_flight"] for row in entry.peers() if row["peer_id"] == host.peer_id)


def models_at(entry: Node) -> set[str]:
    with httpx.Client(timeout=10) as http:
        listed = http.get(f"{entry.base_url}/models").json()
    return {one["id"] for one in listed["data"]}


def durations(entry: Node, model: str, count: int) -> list[float]:
    """Seconds that each of ``count`` requests took, one after another.

    By a client that is made once: what making one costs is not the mesh's.
    """
    took = []
    with httpx.Client(timeout=10) as http:
        for _ in range(count):
            began = monotonic()
            answer = http.post(f"{entry.base_url}/chat/completions", json=_asking(model))
            took.append(monotonic() - began)
            assert answer.status_code == 200, answer.text
    return took


@contextmanager
def hanging_requests(entry: Node, model: str, count: int) -> Iterator[None]:
    """So many requests wait for an answer; those that ran out are not begun again."""
    body = json.dumps(_asking(model)).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    with ExitStack() as stack:
        for _ in range(count):
            connection = socket.create_connection(entry.proxy, timeout=10)
            stack.enter_context(connection)
            connection.sendall(head + body)
        yield


def _asking(model: str) -> dict[str, Any]:
    return {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}


def _p99(took: list[float]) -> float:
    return quantiles(took, n=100)[98]


def test_a_backend_that_dies_is_announced_so_at_once(cluster: Cluster, figures: Figures) -> None:
    hosts = start_hosts(cluster, 2)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host0", "host1")
    engine = next(p for p in cluster.processes if "host1" in p.argv and "up" not in p.argv)
    done = threading.Event()
    client, asked = Client(entry), []

    def ask_on() -> None:
        while not done.is_set():
            asked.append(client.ask())

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_on) for _ in range(2)]
        done.wait(0.5)
        engine.kill()
        done.wait(3)
        done.set()
        for one in asking:
            one.result()
    # One that was being answered by the engine is cut; whatever was to come is not.
    assert len(failures(asked)) <= 2
    row = next(row for row in entry.peers() if row["name"] == "host1")
    assert row["services"][0]["healthy"] is False
    figures.note(f"of {len(asked)} requests were cut in mid-stream", len(failures(asked)), "")
