"""Whoever dies, a request that can still be served is served, and a cut one says so at once."""

from __future__ import annotations

import signal
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep

import httpx
import openai
import pytest

from support.cluster import Cluster, Node, eventually
from support.faults import Client, Figures, by_peer_id, failures, start_hosts, wait_for

SLOW_ENGINE = ("--tokens-per-second", "40", "--tokens", "1000")


def test_kill_9_of_the_serving_peer_in_mid_stream(cluster: Cluster, figures: Figures) -> None:
    hosts = start_hosts(cluster, 4, *SLOW_ENGINE)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host0", "host3")
    noticed = []
    for _ in range(3):
        with Client(entry).stream() as stream:
            words = iter(stream)
            next(words)
            victim = by_peer_id(hosts, entry.decisions()[0]["picked"])
            hosts.remove(victim)
            killed = _kill_soon(victim)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                deque(words, maxlen=0)
            noticed.append(monotonic() - killed[0])
    figures.at_most("the client sees the error after", max(noticed) * 1000, 100, "ms")


def _kill_soon(victim: Node) -> list[float]:
    """Kill it in 0.3 s from now; the list then holds when."""
    killed: list[float] = []

    def kill() -> None:
        killed.append(monotonic())
        victim.child.kill()

    threading.Timer(0.3, kill).start()
    return killed


def test_kill_9_of_the_serving_peer_before_the_first_byte(
    cluster: Cluster, figures: Figures
) -> None:
    # The engine thinks for half a second, and its hosts die meanwhile, one after another.
    hosts = start_hosts(cluster, 5, "--first-token-delay", "0.5", engines=1)
    entry = cluster.entry(hosts[0])
    wait_for(entry, *(f"host{number}" for number in range(5)))
    client = Client(entry)
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(client.ask, f"number {number}", max_tokens=1) for number in range(100)]
        for victim in hosts[1:4]:
            sleep(0.5)
            eventually(lambda serving=victim: serving.in_flight() > 0, within=10)
            victim.kill()
        answers = [one.result() for one in asked]
    # The only token and the end leave together: who has the one and not the other was cut.
    begun = [one for one in answers if one.error is not None and one.words]
    assert [one for one in answers if one.error is not None and not one.words] == []
    again = sum(row["outcome"] not in ("complete", None) for row in entry.decisions())
    assert again > 0, "some were at a victim when it died"
    figures.at_most("of 100 requests failed", len(failures(answers)) - len(begun), 0, "")
    figures.note("were begun again elsewhere", again, "")
    figures.note("the slowest took", max(one.took for one in answers), "s")


def test_kill_9_of_the_bootstrap(cluster: Cluster, figures: Figures) -> None:
    hosts = start_hosts(cluster, 4, engines=1)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host1", "host2", "host3")
    hosts[0].kill()
    asked = Client(entry).ask_many(50)
    assert failures(asked) == []
    eventually(lambda: "host0" not in entry.online(), within=10)
    # The mesh outlives it: one that knows any other member joins, and is known to all.
    late = cluster.node("late", bootstrap=hosts[1])
    alive = {"host1", "host2", "host3", "laptop", "late"}
    began = monotonic()
    eventually(lambda: late.online() == entry.online() == alive, within=15)
    figures.at_most("of 50 requests failed", len(failures(asked)), 0, "")
    figures.note("a newcomer is known to all after", monotonic() - began, "s")


@pytest.mark.long
def test_30_percent_killed_at_once(cluster: Cluster, figures: Figures) -> None:
    hosts = start_hosts(cluster, 10, engines=1)
    entry = cluster.entry(hosts[0])
    wait_for(entry, *(f"host{number}" for number in range(10)), within=40)
    client = Client(entry)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.ask_many, 100, 4)
        sleep(0.5)
        victims = hosts[3:6]
        for victim in victims:
            victim.child.kill()
        killed_at = monotonic()
        survivors = [entry, *(host for host in hosts if host not in victims)]
        alive = {"laptop"} | {f"host{n}" for n in range(10) if n not in (3, 4, 5)}
        eventually(lambda: all(node.online() == alive for node in survivors), within=30)
        agreed = monotonic() - killed_at
        asked = asking.result()
    # Those that were being answered by a victim are cut, and said to be; nobody else is hurt.
    cut = [one for one in asked if one.error is not None]
    assert len(cut) <= 3 * 2, failures(asked)
    figures.at_most("all survivors agree after", agreed, 6, "s")
    figures.note("of 100 requests were cut in mid-stream", len(cut), "")


@pytest.mark.parametrize("seconds", [5, pytest.param(10, marks=pytest.mark.long)])
def test_sigstop_of_the_serving_peer(cluster: Cluster, figures: Figures, seconds: int) -> None:
    hosts = start_hosts(cluster, 3, engines=1)
    entry = cluster.entry(hosts[0])
    wait_for(entry, "host0", "host1", "host2")
    client = Client(entry)
    stopped = hosts[2]
    stopped.signal(signal.SIGSTOP)
    stopped_at = monotonic()
    try:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(client.ask_many, 60, 4)
            eventually(lambda: "host2" not in entry.online(), within=20)
            figures.at_most("missed after", monotonic() - stopped_at, 5, "s")
            asked = asking.result()
        sleep(max(0.0, stopped_at + seconds - monotonic()))
    finally:
        stopped.signal(signal.SIGCONT)
    resumed_at = monotonic()
    everybody = {"host0", "host1", "host2", "laptop"}
    eventually(lambda: entry.online() == stopped.online() == everybody, within=20)
    figures.note("back after", monotonic() - resumed_at, "s")
    assert failures(asked) == []
    figures.at_most("of 60 requests failed", len(failures(asked)), 0, "")
    figures.note("the slowest took", max(one.took for one in asked), "s")


def test_a_stop_of_three_seconds_evicts_nobody(cluster: Cluster) -> None:
    hosts = start_hosts(cluster, 3, engines=1)
    wait_for(hosts[0], "host1", "host2")
    hosts[1].signal(signal.SIGSTOP)
    try:
        sleep(3)
    finally:
        hosts[1].signal(signal.SIGCONT)
    sleep(2)
    for node in (hosts[0], hosts[2]):
        lost = [line for line in node.log() if line["event"] == "peer_offline"]
        assert lost == []


def test_sigterm_with_three_live_streams(cluster: Cluster, figures: Figures) -> None:
    hosts = start_hosts(cluster, 2, *SLOW_ENGINE)
    # By load alone, so that six streams are three on each.
    entry = cluster.entry(hosts[0], "--affinity", "off")
    wait_for(entry, "host0", "host1")
    # A newcomer gets one request at a time until three have gone well.
    assert failures(Client(entry).ask_many(20, 2)) == []
    answers: list[int] = []

    def read_whole() -> None:
        with Client(entry).stream(max_tokens=150) as stream:
            answers.append(sum(1 for c in stream if c.choices and c.choices[0].delta.content))

    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read_whole) for _ in range(6)]
        eventually(lambda: hosts[1].in_flight() == 3, within=15)
        hosts[1].signal(signal.SIGTERM)
        told_at = monotonic()
        eventually(lambda: entry.state_of("host1") in ("draining", "left"), within=5, every=0.005)
        figures.at_most("draining is known after", (monotonic() - told_at) * 1000, 100, "ms")
        # What comes now goes elsewhere.
        asked = Client(entry).ask_many(5)
        for one in reading:
            one.result()
    assert hosts[1].wait(40) == 0
    assert failures(asked) == []
    assert answers == [150] * 6
    figures.at_least("of 6 streams were complete", len(answers), 6, "")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_50_nodes_restarted_at_once(cluster: Cluster, figures: Figures) -> None:
    first = cluster.node("n0")
    port = first.addr.split("/")[4]
    nodes = [cluster.start_node(f"n{number}", bootstrap=first) for number in range(1, 50)]
    nodes = [first, *(node.wait_ready(within=200) for node in nodes)]
    everybody = {f"n{number}" for number in range(50)}
    eventually(lambda: all(node.online() == everybody for node in nodes), within=120, every=0.5)
    bootstrap, listen = first.addr, f"/ip4/127.0.0.1/tcp/{port}"
    for node in nodes:
        node.child.kill()
    for node in nodes:
        node.wait(20)
    again = [cluster.start_node("n0", listen=listen)]
    again += [cluster.start_node(f"n{number}", bootstrap=bootstrap) for number in range(1, 50)]
    for node in again:
        node.wait_ready(within=200)
    up_at = monotonic()
    eventually(lambda: all(node.online() == everybody for node in again), within=60, every=0.2)
    figures.at_most("all 50 know all, after the last was up", monotonic() - up_at, 10, "s")
