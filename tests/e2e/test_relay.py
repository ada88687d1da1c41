"""A GPU host that can only dial out serves a client that can't reach it, through a relay.

Host and client are network namespaces on two networks; only the relays are on both, and forward
nothing. The host listens where nobody else can come, and announces an address that answers to
nobody, as behind a NAT: whoever dials it waits in vain.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import threading
from time import monotonic
from typing import Any

import openai
import pytest

from support.cluster import (
    Backend,
    Cluster,
    Node,
    answer_with_hash,
    eventually,
    read_to_end,
)
from support.lan import Lan, ip, within

INSIDE, OUTSIDE = 1, 2
LISTEN = "/ip4/0.0.0.0/tcp/4201"
BEHIND_NAT = ("/ip4/127.0.0.1/tcp/0", "/ip4/10.77.9.9/tcp/4201")  # listened on, and announced


# The nodes must end before their network does.
@pytest.fixture
def cluster(lan: Lan, cluster: Cluster) -> Cluster:
    return cluster


class Hosts:
    """Relays on both networks, a host behind them on one, a client on the other."""

    def __init__(self, lan: Lan, cluster: Cluster) -> None:
        self.lan = lan
        self.cluster = cluster
        self.relays: list[Node] = []
        self.relay_netns = [lan.host(INSIDE, OUTSIDE), lan.host(INSIDE, OUTSIDE)]
        self.host_netns = lan.host(INSIDE)
        self.client_netns = lan.host(OUTSIDE)
        # Packets to nowhere are dropped on the way, and not refused at once.
        for netns, segment in ((self.host_netns, INSIDE), (self.client_netns, OUTSIDE)):
            gateway = lan.addr(self.relay_netns[0], segment)
            ip("-n", netns, "route", "add", "default", "via", gateway)

    def relay(self) -> Node:
        number = len(self.relays)
        bootstrap = self.bootstrap(INSIDE) if self.relays else None
        node = self.cluster.node(
            f"relay{number}",
            "--relay",
            listen=LISTEN,
            bootstrap=bootstrap,
            netns=self.relay_netns[number],
        )
        self.relays.append(node)
        return node

    def bootstrap(self, segment: int) -> str:
        ip_addr = self.lan.addr(self.relay_netns[0], segment)
        return f"/ip4/{ip_addr}/tcp/4201/p2p/{self.relays[0].peer_id}"

    def host(self, service: str) -> Node:
        listen, announced = BEHIND_NAT
        args = ("--announce-addr", announced, "--expose", f"llm={service}", "--vram", "24GiB")
        return self.cluster.node(
            "host", *args, listen=listen, bootstrap=self.bootstrap(INSIDE), netns=self.host_netns
        )

    def client(self) -> Node:
        return self.cluster.node(
            *("client", "--proxy", "127.0.0.1:0", "--proxy-mode", "tcp"),
            listen=LISTEN,
            bootstrap=self.bootstrap(OUTSIDE),
            netns=self.client_netns,
        )


@pytest.fixture
def hosts(lan: Lan, cluster: Cluster) -> Hosts:
    return Hosts(lan, cluster)


def row(node: Node, name: str) -> dict[str, Any]:
    return next((row for row in node.peers() if row["name"] == name), {})


def relays_of(row: dict[str, Any]) -> set[str]:
    return {addr.split("/")[6] for addr in row["addrs"] if "/p2p-circuit/" in addr}


def wait_relayed(client: Node, within_s: float = 15) -> dict[str, Any]:
    return eventually(
        lambda: found if (found := row(client, "host")).get("path") == "relayed" else None,
        within=within_s,
    )


def exchange(client: Node, netns: str, question: bytes) -> bytes:
    def ask() -> bytes:
        with socket.create_connection(client.proxy, timeout=20) as connection:
            connection.sendall(question)
            connection.shutdown(socket.SHUT_WR)
            return read_to_end(connection)

    return within(netns, ask)


def test_a_host_behind_nat_serves_the_openai_client_through_a_relay(hosts: Hosts) -> None:
    relay = hosts.relay()
    engine = hosts.cluster.start_engine("host", netns=hosts.host_netns).wait_ready()
    hosts.host(engine.address)
    began = monotonic()
    client = hosts.client()
    found = wait_relayed(client)
    print(f"relayed {monotonic() - began:.2f} s after the client was started")
    assert found["via"] == relay.peer_id
    assert row(client, "relay0")["path"] == "direct"
    assert row(client, "client")["path"] is None
    assert found["addrs"][-1].endswith(f"/p2p/{relay.peer_id}/p2p-circuit/p2p/{found['peer_id']}")

    def chat() -> str:
        with openai.OpenAI(
            base_url=client.base_url, api_key="unused", max_retries=0, timeout=30
        ) as api:
            stream = api.chat.completions.create(
                model="demo-model", messages=[{"role": "user", "content": "hello"}], stream=True
            )
            return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    assert "host" in within(hosts.client_netns, chat)
    assert client.decisions()[0]["picked"] == found["peer_id"]
    assert "meshnode_relay_circuits 1.0" in relay.get("/metrics")
    assert "meshnode_relay_reservations 1.0" in relay.get("/metrics")


def test_a_half_close_and_every_byte_go_through_the_relay(hosts: Hosts) -> None:
    hosts.relay()
    backend = within(hosts.host_netns, lambda: Backend(answer_with_hash))
    try:
        hosts.host(backend.address)
        client = hosts.client()
        wait_relayed(client)
        question = os.urandom(8_000_000)
        answer = exchange(client, hosts.client_netns, question)
        assert answer == hashlib.sha256(question).hexdigest().encode()
    finally:
        backend.close()


@pytest.mark.parametrize("victim", ["host", "relay"])
def test_an_answer_that_kill_9_cut_on_the_way_does_not_look_whole(
    hosts: Hosts, victim: str
) -> None:
    relay = hosts.relay()
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not stop.wait(0.05):
            connection.sendall(b"token ")

    backend = within(hosts.host_netns, lambda: Backend(drip))
    try:
        host = hosts.host(backend.address)
        client = hosts.client()
        wait_relayed(client)

        def ask() -> bytes:
            with socket.create_connection(client.proxy, timeout=20) as connection:
                connection.sendall(b"go")
                assert connection.recv(1) == b"t"
                (host if victim == "host" else relay).signal(signal.SIGKILL)
                with contextlib.suppress(ConnectionResetError):
                    read_to_end(connection)
                    return b"looked whole"
            return b"cut"

        assert within(hosts.client_netns, ask) == b"cut"
    finally:
        stop.set()
        backend.close()


def test_when_its_relay_dies_a_host_is_reached_through_another(hosts: Hosts) -> None:
    relays = [hosts.relay()]
    backend = within(hosts.host_netns, lambda: Backend(answer_with_hash))
    try:
        hosts.host(backend.address)
        client = hosts.client()
        assert wait_relayed(client)["via"] == relays[0].peer_id
        relays.append(hosts.relay())
        both = {relay.peer_id for relay in relays}
        eventually(
            lambda: (
                {a.split("/")[6] for a in row(client, "host")["addrs"] if "circuit" in a} == both
            ),
            within=20,
        )
        via = row(client, "host")["via"]
        dead = next(relay for relay in relays if relay.peer_id == via)
        left = next(relay for relay in relays if relay.peer_id != via)
        dead.signal(signal.SIGKILL)
        began = monotonic()
        eventually(lambda: row(client, "host").get("via") == left.peer_id, within=10)
        print(f"reached through the other relay {monotonic() - began:.2f} s after kill -9")
        assert row(client, "host")["online"]
        answer = exchange(client, hosts.client_netns, b"still there?")
        assert answer == hashlib.sha256(b"still there?").hexdigest().encode()
    finally:
        backend.close()
