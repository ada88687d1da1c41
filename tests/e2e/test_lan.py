"""Two hosts on one local network find each other with a token alone.

The hosts are network namespaces joined by a bridge, so that nothing but the wire is shared.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from support.cluster import Cluster, Node, eventually

LISTEN = "/ip4/0.0.0.0/tcp/4201"


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


class Lan:
    """A bridge in a namespace of its own, and hosts at its ports."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.switch = f"mn{self.tag}s"
        self.namespaces: list[str] = []

    def open(self) -> None:
        self._namespace(self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.switch, "link", "set", "br0", "up")

    def host(self) -> str:
        """Add a host at 10.77.0.N; return its namespace."""
        number = len(self.namespaces)
        name = f"mn{self.tag}{number}"
        self._namespace(name)
        port = f"port{number}"
        peer = ("peer", "name", port, "netns", self.switch)
        ip("-n", name, "link", "add", "eth0", "type", "veth", *peer)
        ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        return name

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self.namespaces.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    def close(self) -> None:
        for name in self.namespaces:
            ip("netns", "del", name)


@pytest.fixture
def lan() -> Iterator[Lan]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the ip command")
    lan = Lan()
    try:
        lan.open()
    except OSError as exc:
        lan.close()
        pytest.skip(f"network namespaces are not permitted here: {exc}")
    yield lan
    lan.close()


# The nodes must end before their network does.
@pytest.fixture
def cluster(lan: Lan, cluster: Cluster) -> Cluster:
    return cluster


def meet(*nodes: Node) -> float:
    """Wait until all know all; return how long that took."""
    names = {node.state_dir.name.removeprefix("state-") for node in nodes}
    began = monotonic()
    eventually(lambda: all(node.online() >= names for node in nodes), within=10, every=0.02)
    return monotonic() - began


def test_two_hosts_with_a_token_alone_meet_within_two_seconds(cluster: Cluster, lan: Lan) -> None:
    hosts = [lan.host(), lan.host()]
    nodes = [
        cluster.start_node(name, listen=LISTEN, mdns=True, netns=netns)
        for name, netns in zip("ab", hosts, strict=True)
    ]
    for node in nodes:
        node.wait_ready()
    took = meet(*nodes)
    print(f"met {took:.2f} s after both were ready")
    assert took < 2
    [link] = [row for row in nodes[0].peers() if row["name"] == "b"]
    assert link["connected"]


def test_a_host_that_comes_later_meets_one_that_was_alone(cluster: Cluster, lan: Lan) -> None:
    old = cluster.node("old", listen=LISTEN, mdns=True, netns=lan.host())
    threading.Event().wait(3)  # its first, frequent questions are over
    young = cluster.node("young", listen=LISTEN, mdns=True, netns=lan.host())
    took = meet(old, young)
    print(f"met {took:.2f} s after the second was ready")
    assert took < 2


def test_other_networks_and_hosts_without_mdns_meet_nobody(cluster: Cluster, lan: Lan) -> None:
    other = cluster.new_token()
    nodes = [
        cluster.start_node("a", listen=LISTEN, mdns=True, netns=lan.host()),
        cluster.start_node("stranger", listen=LISTEN, mdns=True, netns=lan.host(), token=other),
        cluster.start_node("silent", listen=LISTEN, mdns=False, netns=lan.host()),
        cluster.start_node("b", listen=LISTEN, mdns=True, netns=lan.host()),
    ]
    for node in nodes:
        node.wait_ready()
    meet(nodes[0], nodes[3])
    threading.Event().wait(3)
    assert [node.online() for node in nodes] == [{"a", "b"}, {"stranger"}, {"silent"}, {"a", "b"}]
    assert not [
        line for node in nodes for line in node.log() if line.get("event") == "membership_refused"
    ]
