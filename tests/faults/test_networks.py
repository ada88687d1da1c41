"""Cables cut, networks parted, links fallen silent: namespaces joined by a bridge."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import pytest

from support.cluster import Cluster, Node, eventually
from support.faults import Client, Figures, failures
from support.lan import Lan, within

LISTEN = "/ip4/0.0.0.0/tcp/4201"
PARTED_FOR = 60.0  # seconds


@pytest.fixture
def cluster(lan: Lan, tmp_path: Path):
    """Its nodes end before their network does."""
    made = Cluster(tmp_path)
    yield made
    made.close()


def start(cluster: Cluster, lan: Lan, count: int) -> tuple[list[str], list[Node]]:
    """Hosts n0, n1, ... each in a namespace, each exposing an engine and serving a proxy."""
    spaces = [lan.host() for _ in range(count)]
    engines = [cluster.start_engine(f"n{n}", netns=netns) for n, netns in enumerate(spaces)]
    nodes: list[Node] = []
    for number, (netns, engine) in enumerate(zip(spaces, engines, strict=True)):
        engine.wait_ready()
        nodes.append(
            cluster.start_node(
                f"n{number}",
                *("--vram", "8GiB", "--expose", f"llm={engine.address}", "--proxy", "127.0.0.1:0"),
                bootstrap=_addr(nodes[0]) if nodes else None,
                listen=LISTEN,
                netns=netns,
            )
        )
        nodes[0].wait_ready()
    for node in nodes:
        node.wait_ready()
    everybody = {f"n{number}" for number in range(count)}
    eventually(lambda: all(node.online() == everybody for node in nodes), within=40)
    return spaces, nodes


def _is_linked_to_all(node: Node) -> bool:
    return all(row["connected"] for row in node.peers())


def _addr(node: Node) -> str:
    return next(addr for addr in node.ready["addrs"] if addr.startswith("/ip4/10.77."))


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_partition_of_a_minute_that_heals(cluster: Cluster, lan: Lan, figures: Figures) -> None:
    spaces, nodes = start(cluster, lan, 6)
    lan.part(*spaces[3:])
    parted_at = monotonic()
    sides = ({"n0", "n1", "n2"}, {"n3", "n4", "n5"})
    eventually(
        lambda: (
            all(node.online() == sides[0] for node in nodes[:3])
            and all(node.online() == sides[1] for node in nodes[3:])
        ),
        within=50,
    )
    figures.at_most("both sides agree on their halves after", monotonic() - parted_at, 20, "s")
    served = 0
    while monotonic() - parted_at < PARTED_FOR:
        for node in (nodes[1], nodes[4]):
            asked = within(str(node.netns), Client(node).ask)
            assert asked.error is None
            served += 1
        sleep(1)
    figures.note("requests served while parted, none failed", served, "")
    lan.heal(*spaces[3:])
    healed_at = monotonic()
    eventually(lambda: all(node.online() == sides[0] | sides[1] for node in nodes), within=60)
    figures.at_most("one mesh again after", monotonic() - healed_at, 10, "s")
    assert all(node.child.poll() is None for node in nodes)


def test_a_link_that_falls_silent(cluster: Cluster, lan: Lan, figures: Figures) -> None:
    spaces, nodes = start(cluster, lan, 3)
    # Whoever has no link to it yet is told of its loss, and looks for it: two seconds more.
    eventually(lambda: all(_is_linked_to_all(node) for node in nodes), within=20)
    lan.unplug(spaces[2])
    silent_at = monotonic()
    with ThreadPoolExecutor(1) as pool:
        ask = Client(nodes[0]).ask
        asking = pool.submit(lambda: within(spaces[0], lambda: [ask() for _ in range(20)]))
        eventually(
            lambda: "n2" not in nodes[0].online() and "n2" not in nodes[1].online(), within=30
        )
        figures.at_most("missed by both others after", monotonic() - silent_at, 5, "s")
        assert failures(asking.result()) == []
    lan.heal(spaces[2])
    back_at = monotonic()
    eventually(lambda: nodes[2].online() == nodes[0].online() == {"n0", "n1", "n2"}, within=30)
    figures.note("back after", monotonic() - back_at, "s")
