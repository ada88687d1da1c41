"""Backends that refuse or hang cost the others' clients nothing."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles

import openai

from support.cluster import Cluster, read_to_end
from support.faults import Asked, Client, Figures, failures, start_hosts, wait_for


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
    def accept_and_say_nothing(connection: socket.socket) -> None:
        read_to_end(connection)

    hung = backend(accept_and_say_nothing)
    (good,) = start_hosts(cluster, 1)
    cluster.node(
        "hung", "--expose", f"stuck={hung.address}", "--health", "stuck=off", bootstrap=good
    )
    entry = cluster.entry(good, "--service", "llm")
    stuck = cluster.entry(
        good, "--service", "stuck", "--first-byte-timeout", "2s", name="stuck-entry"
    )
    wait_for(entry, "host0", "hung")
    wait_for(stuck, "host0", "hung")
    client = Client(entry)
    client.ask_many(20, 2)
    count = 100 if figures.is_strict else 30
    before = _p99(client.ask_many(count, 2))
    with ThreadPoolExecutor(4) as pool:
        hanging = [pool.submit(Client(stuck).ask) for _ in range(4)]
        meanwhile = _p99(client.ask_many(count, 2))
        ended = [one.result() for one in hanging]
    assert all(isinstance(one.error, openai.APIStatusError) for one in ended), ended
    assert {one.error.status_code for one in ended} == {504}
    figures.at_most("504 after (limit 2 s)", max(one.took for one in ended), 2.5, "s")
    figures.note("others' p99 before", before * 1000, "ms")
    figures.note("others' p99 meanwhile", meanwhile * 1000, "ms")
    figures.compare("others' p99 grows by", (meanwhile / before - 1) * 100, 10, "%")


def _p99(asked: list[Asked]) -> float:
    assert failures(asked) == []
    return quantiles((one.took for one in asked), n=100)[98]


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
