"""Bounds on connections that have not proven membership: as arithmetic, then on sockets."""

from __future__ import annotations

import gc

import pytest
import trio
from libp2p import new_host
from libp2p.network.config import ConnectionConfig
from libp2p.network.exceptions import SwarmException
from multiaddr import Multiaddr

from meshnode.errors import PeerUnreachable
from meshnode.net.libp2p.door import Door
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.tcp import open_tcp, parse_tcp_addr

LIMITS = Limits(max_pending=5, max_pending_per_ip=2, max_pending_on_loopback=4)


def nothing() -> None: ...


def test_one_address_has_few_pending_connections():
    door = Door(LIMITS)
    assert door.knock("192.0.2.1", nothing, now=0.0)
    assert door.knock("192.0.2.1", nothing, now=0.0)
    assert door.knock("192.0.2.1", nothing, now=0.0) is None
    assert door.knock("192.0.2.2", nothing, now=0.0)
    assert len(door) == 3


def test_loopback_has_more_and_all_together_have_a_bound():
    door = Door(LIMITS)
    for ip in ("127.0.0.1",) * 4 + ("::1",):
        assert door.knock(ip, nothing, now=0.0)
    assert door.knock("192.0.2.1", nothing, now=0.0) is None


def test_who_leaves_makes_room_once():
    door = Door(LIMITS)
    first = door.knock("192.0.2.1", nothing, now=0.0)
    door.knock("192.0.2.1", nothing, now=0.0)
    assert first is not None
    door.leave(first)
    door.leave(first)
    assert len(door) == 1
    assert door.knock("192.0.2.1", nothing, now=0.0)
    assert door.knock("192.0.2.1", nothing, now=0.0) is None


def test_an_idle_one_makes_room_for_a_newcomer_and_a_young_one_does_not():
    door = Door(LIMITS)
    turned_away = []
    door.knock("192.0.2.1", lambda: turned_away.append("first"), now=0.0)
    door.knock("192.0.2.1", lambda: turned_away.append("second"), now=0.5)
    assert door.knock("192.0.2.1", nothing, now=0.9) is None
    assert door.knock("192.0.2.1", nothing, now=1.1)
    assert turned_away == ["first"]
    assert len(door) == 2


def test_the_idlest_of_all_makes_room_when_the_door_is_full():
    door = Door(LIMITS)
    turned_away = []
    for number in range(5):
        ip = f"192.0.2.{number}"
        door.knock(ip, lambda ip=ip: turned_away.append(ip), now=float(number))
    assert door.knock("192.0.2.9", nothing, now=5.0)
    assert turned_away == ["192.0.2.0"]
    assert len(door) == 5


def test_no_address_is_remembered_after_its_connections():
    door = Door(LIMITS)
    for number in range(10):
        knock = door.knock(f"192.0.2.{number}", nothing, now=0.0)
        assert knock is not None
        door.leave(knock)
    assert not door._pending


async def test_an_idle_socket_is_closed_after_the_handshake_limit(make_node, run_nodes):
    node = make_node(limits=Limits(handshake_timeout=0.1))
    with trio.fail_after(5):
        async with run_nodes(node), await open_tcp(parse_tcp_addr(node.addrs[0])) as idle:
            while await idle.receive_some():
                pass
    assert node.memberships("timeout") == 1


async def test_a_crowd_of_idle_sockets_shuts_nobody_out(make_node, run_nodes):
    hub, member = make_node(), make_node()
    with trio.fail_after(10):
        async with run_nodes(hub, member, linked=False):
            crowd = [await open_tcp(parse_tcp_addr(hub.addrs[0])) for _ in range(250)]
            began = trio.current_time()
            await member.dial(hub.addrs[0], timeout=3)
            assert trio.current_time() - began < 1
            for socket in crowd:
                await trio.aclose_forcefully(socket)


async def test_a_crowd_beyond_the_bound_is_turned_away_as_it_idles(make_node, run_nodes):
    limits = Limits(max_pending_on_loopback=8, pending_yields_after=0.1)
    hub, member = make_node(limits=limits), make_node()
    with trio.fail_after(10):
        async with run_nodes(hub, member, linked=False):
            crowd = [await open_tcp(parse_tcp_addr(hub.addrs[0])) for _ in range(20)]
            while len(hub._gate._door) < 8:
                await trio.lowlevel.checkpoint()
            with pytest.raises(PeerUnreachable):
                await member.dial(hub.addrs[0], timeout=1)
            await trio.testing.wait_all_tasks_blocked(0.1)
            await member.dial(hub.addrs[0], timeout=1)
            for socket in crowd:
                await trio.aclose_forcefully(socket)
    assert hub.memberships("crowded") >= 12


async def test_connections_that_ended_take_no_room(make_node, run_nodes):
    # The library keeps a slot and a task for each inbound connection of its whole life.
    hub = make_node(limits=Limits(max_links=2, max_pending=2, max_pending_on_loopback=2))
    guest = make_node()
    with trio.fail_after(20):
        async with run_nodes(hub, guest, linked=False):
            for _ in range(30):
                await guest.dial(hub.addrs[0], timeout=2)
                await guest.disconnect(hub.peer_id, "test")
                while hub.links():
                    await trio.lowlevel.checkpoint()
            assert len(hub._gate._door) == 0
            assert not hub._swarm.all_conns
            assert not hub._swarm.connections


@pytest.mark.stock
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_library_refuses_everybody_after_a_number_of_connections():
    config = ConnectionConfig(
        max_connections=3, min_connections=0, low_watermark=0, high_watermark=3
    )
    hub, guest = new_host(connection_config=config), new_host()
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    with trio.fail_after(20):
        async with hub.run(listen), guest.run(listen):
            network = guest.get_network()
            refused = 0
            for _ in range(4):
                with trio.move_on_after(0.5) as scope:
                    addr = hub.get_transport_addrs()[0]
                    try:
                        conn = await network.dial_addr(addr, hub.get_id())
                    except SwarmException:
                        refused += 1
                        continue
                    await conn.close()
                refused += scope.cancelled_caught
            assert refused == 1
            await guest.close()
            await hub.close()
    gc.collect()  # the sockets it forgot, before some later test finds them
