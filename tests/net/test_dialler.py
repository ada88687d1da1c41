"""In which order a peer's addresses are tried, and for how long: on virtual time."""

from __future__ import annotations

import random

import pytest
import trio

from meshnode.core.known_peers import KnownPeers
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData
from meshnode.errors import PeerUnreachable
from meshnode.net.dialler import Dialler
from meshnode.net.mesh import Link

DIRECT = ("/ip4/10.0.0.1/tcp/1/p2p/host", "/ip4/10.0.0.2/tcp/1/p2p/host")
RELAYED = "/ip4/192.0.2.1/tcp/1/p2p/relay/p2p-circuit/p2p/host"


class FakeMesh:
    """Answers at some addresses, hangs at the others."""

    peer_id = "me"

    def __init__(self, *answering: str) -> None:
        self.answering = set(answering)
        self.tried: list[tuple[float, str]] = []
        self.up: dict[str, Link] = {}

    def links(self) -> tuple[Link, ...]:
        return tuple(self.up.values())

    async def dial(self, addr: str, *, timeout: float) -> str:
        self.tried.append((trio.current_time(), addr))
        if addr not in self.answering:
            await trio.sleep(timeout)
            raise PeerUnreachable("it hangs")
        via = "relay" if "circuit" in addr else None
        self.up["host"] = Link("host", None, True, 0.0, 0.0, None, via=via)
        return "host"

    def addrs_tried(self) -> list[str]:
        return [addr for _, addr in self.tried]


def dialler_for(mesh: FakeMesh, *addrs: str) -> Dialler:
    ledger = Ledger("me")
    ledger.observe(NodeData(id="host", seq=1, addrs=addrs), now=trio.current_time())
    return Dialler(mesh, ledger, KnownPeers(), random.Random(1))


async def test_a_direct_address_is_tried_before_a_relay_wherever_it_stands(autojump_clock):
    mesh = FakeMesh(DIRECT[1], RELAYED)
    await dialler_for(mesh, RELAYED, DIRECT[1]).connect("host")
    assert mesh.addrs_tried() == [DIRECT[1]]
    assert mesh.up["host"].via is None


@pytest.mark.parametrize("timeout", [1.0, 3.0])
async def test_addresses_that_hang_leave_time_for_the_relay(autojump_clock, timeout):
    mesh = FakeMesh(RELAYED)
    await dialler_for(mesh, *DIRECT, RELAYED).connect("host", timeout=timeout)
    assert mesh.up["host"].via == "relay"
    assert mesh.tried[-1][0] - mesh.tried[0][0] == pytest.approx(timeout / 2)


async def test_what_hung_a_moment_ago_is_not_waited_for_again(autojump_clock):
    mesh = FakeMesh(RELAYED)
    dialler = dialler_for(mesh, *DIRECT, RELAYED)
    await dialler.connect("host")
    mesh.up.clear()
    mesh.tried.clear()
    await dialler.connect("host", timeout=1.0)
    assert mesh.addrs_tried() == [RELAYED]
    mesh.up.clear()
    mesh.tried.clear()
    await trio.sleep(61)
    await dialler.connect("host")
    assert mesh.addrs_tried()[0] == DIRECT[0]


async def test_without_a_relay_the_whole_time_is_for_direct_addresses(autojump_clock):
    mesh = FakeMesh()
    began = trio.current_time()
    with pytest.raises(PeerUnreachable):
        await dialler_for(mesh, *DIRECT).connect("host")
    assert trio.current_time() - began == pytest.approx(3.0)


async def test_a_relayed_link_is_replaced_over_direct_addresses_alone(autojump_clock):
    mesh = FakeMesh(RELAYED)
    dialler = dialler_for(mesh, *DIRECT, RELAYED)
    await dialler.connect("host")
    mesh.tried.clear()
    with pytest.raises(PeerUnreachable):
        await dialler.connect_directly("host", timeout=6.0)
    assert mesh.addrs_tried() == list(DIRECT)
    mesh.answering.add(DIRECT[1])
    await dialler.connect_directly("host", timeout=6.0)
    assert mesh.up["host"].via is None
