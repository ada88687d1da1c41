"""When relays are asked, reserved at and left, and relayed links straightened: on virtual time."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio

from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData
from meshnode.errors import PeerRefused, PeerUnreachable
from meshnode.net.mesh import Link, LinkEvent, LinkState
from meshnode.net.reachability import Reachability


class World:
    """A node called "me", and what relays answer it."""

    peer_id = "me"

    def __init__(self, *, seeks_relays: bool = True) -> None:
        self.ledger = Ledger("me")
        self.dials_back: set[str] = set()  # relays that can dial this node
        self.refusing: set[str] = set()
        self.dead: set[str] = set()
        self.held: dict[str, float] = {}
        self.asked: Counter[str] = Counter()
        self.changes = 0
        self.straightened: list[str] = []
        self.relayed: list[Link] = []
        self.direct_addrs: dict[str, tuple[str, ...]] = {}
        self._watchers = []
        self._seq = 0
        self.reachability = Reachability(
            self,
            self,
            self.ledger,
            self,
            rng=random.Random(1),
            on_change=self._changed,
            seeks_relays=seeks_relays,
        )

    def hear(self, name: str, *, relay: bool = True, window: int = 3600) -> None:
        self._seq += 1
        node = NodeData(id=name, seq=self._seq, relay=relay, online_window=window)
        self.ledger.observe(node, now=trio.current_time())

    def lose(self, name: str) -> None:
        """The link to a relay ends, and it is gone."""
        self.dead.add(name)
        self.held.pop(name, None)
        self.ledger.mark_down(name, "gone", trio.current_time())
        for watcher in self._watchers:
            watcher(LinkEvent(LinkState.DOWN, name, "gone"))

    def _changed(self) -> None:
        self.changes += 1

    # As Mesh

    def watch_links(self, watcher) -> None:
        self._watchers.append(watcher)

    def links(self) -> tuple[Link, ...]:
        return tuple(self.relayed)

    # As Connecting

    async def connect(self, peer_id: str, *, timeout: float) -> None:
        if peer_id in self.dead:
            raise PeerUnreachable("gone")

    async def connect_directly(self, peer_id: str, *, timeout: float) -> None:
        self.straightened.append(peer_id)
        raise PeerUnreachable("still behind its NAT")

    def direct_addrs_of(self, peer_id: str) -> tuple[str, ...]:
        return self.direct_addrs.get(peer_id, ())

    # As Relays

    @property
    def reserved(self) -> tuple[str, ...]:
        return tuple(self.held)

    async def is_dialable_from(self, peer_id: str, *, timeout: float) -> bool:
        self.asked[peer_id] += 1
        await trio.sleep(0.1)
        return peer_id in self.dials_back

    async def reserve(self, relay_id: str, *, timeout: float) -> float:
        if relay_id in self.refusing:
            raise PeerRefused("RESERVATION_REFUSED")
        self.held[relay_id] = trio.current_time()
        return 3600.0

    def release(self, relay_id: str) -> None:
        self.held.pop(relay_id, None)


@pytest.fixture
def run(nursery):
    def start(world: World) -> World:
        nursery.start_soon(world.reachability.keep_forever)
        return world

    return start


async def test_a_node_that_can_only_dial_out_reserves_at_two_relays_at_once(run, autojump_clock):
    world = run(World())
    await trio.sleep(5)
    for name in ("r1", "r2", "r3", "no relay"):
        world.hear(name, relay=name != "no relay")
    await trio.sleep(0.3)
    assert len(world.held) == 2
    assert set(world.held) <= {"r1", "r2", "r3"}
    await trio.sleep(100)
    assert len(world.held) == 2
    assert 1 <= world.changes <= 2
    assert sum(world.asked.values()) == 2


async def test_a_node_that_can_be_dialled_reserves_nowhere_and_asks_seldom(run, autojump_clock):
    world = run(World())
    world.dials_back = {f"r{n}" for n in range(20)}
    for name in sorted(world.dials_back):
        world.hear(name)
    await trio.sleep(1000)
    assert world.held == {}
    assert world.changes == 0
    assert len(world.asked) == 4
    assert max(world.asked.values()) <= 4


async def test_a_laptop_whose_own_network_reaches_it_reserves_where_it_is_not_reached(
    run, autojump_clock
):
    world = run(World())
    world.dials_back = {"at home"}
    world.hear("at home")
    world.hear("outside")
    await trio.sleep(2)
    assert set(world.held) == {"outside"}


async def test_a_reservation_is_renewed_long_before_it_ends(run, autojump_clock):
    world = run(World())
    world.hear("r1")
    await trio.sleep(1)
    first = world.held["r1"]
    await trio.sleep(340)
    assert 250 < world.held["r1"] - first < 340
    assert world.changes == 1


async def test_when_a_relay_dies_another_takes_its_place_at_once(run, autojump_clock):
    world = run(World())
    for name in ("r1", "r2", "r3"):
        world.hear(name)
    await trio.sleep(1)
    [spare] = {"r1", "r2", "r3"} - set(world.held)
    dead = next(iter(world.held))
    world.lose(dead)
    await trio.sleep(0.2)
    assert spare in world.held
    assert dead not in world.held
    assert len(world.held) == 2


async def test_a_relay_that_lost_the_link_only_is_asked_again_at_once(run, autojump_clock):
    world = run(World())
    world.hear("r1")
    await trio.sleep(1)
    world.held.clear()
    for watcher in world._watchers:
        watcher(LinkEvent(LinkState.DOWN, "r1", "flapped"))
    await trio.sleep(0.2)
    assert set(world.held) == {"r1"}


async def test_a_relay_that_is_full_is_asked_seldom_and_taken_once_it_has_room(run, autojump_clock):
    world = run(World())
    world.refusing = {"r1"}
    world.hear("r1")
    await trio.sleep(60)
    assert 3 <= world.asked["r1"] <= 8
    world.refusing.clear()
    await trio.sleep(130)
    assert set(world.held) == {"r1"}


async def test_who_becomes_reachable_gives_its_reservation_back(run, autojump_clock):
    world = run(World())
    world.hear("r1")
    await trio.sleep(1)
    assert set(world.held) == {"r1"}
    world.dials_back = {"r1"}
    await trio.sleep(340)
    assert world.held == {}
    assert world.changes == 2


async def test_a_relay_itself_seeks_none(run, autojump_clock):
    world = run(World(seeks_relays=False))
    world.hear("r1")
    await trio.sleep(60)
    assert not world.asked


async def test_a_relayed_link_is_tried_directly_now_and_then(run, autojump_clock):
    world = run(World())
    world.relayed = [
        Link("host", None, False, 0.0, 0.0, None, via="r1"),
        Link("direct", None, False, 0.0, 0.0, None),
        Link("tells nothing", None, False, 0.0, 0.0, None, via="r1"),
    ]
    world.direct_addrs = {"host": ("/ip4/192.0.2.1/tcp/1/p2p/host",), "direct": ("x",)}
    await trio.sleep(20)
    assert world.straightened == []  # what was just tried is not tried again at once
    await trio.sleep(600)
    assert set(world.straightened) == {"host"}
    assert 9 <= len(world.straightened) <= 21


async def test_new_addresses_are_tried_at_once(run, autojump_clock):
    world = run(World())
    world.relayed = [Link("host", None, False, 0.0, 0.0, None, via="r1")]
    world.direct_addrs = {"host": ("/ip4/192.0.2.1/tcp/1/p2p/host",)}
    await trio.sleep(5)
    world.direct_addrs = {"host": ("/ip4/198.51.100.1/tcp/1/p2p/host",)}
    await trio.sleep(1.5)
    assert world.straightened == ["host"]
