"""Two hosts on one local network find each other with a token alone.

The hosts are network namespaces joined by a bridge, so that nothing but the wire is shared.
"""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from support.cluster import Cluster, Node, eventually
from support.lan import Lan

LISTEN = "/ip4/0.0.0.0/tcp/4201"


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
