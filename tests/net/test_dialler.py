"""How soon a peer is dialled again, and at which of its addresses."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest
import trio

from meshnode.core.known_peers import KnownPeers
from meshnode.core.ledger import Ledger
from meshnode.errors import PeerUnreachable
from meshnode.net.dialler import (
    DIAL_TIMEOUT,
    FIRST_RETRY,
    LAST_RETRY,
    Backoff,
    Dialler,
    DialLimits,
)
from meshnode.net.libp2p.limits import DEFAULT_LIMITS
from meshnode.net.memory_mesh import MemoryMesh


def test_each_wait_is_about_twice_the_last_up_to_half_a_minute_and_a_reset_begins_anew() -> None:
    backoff = Backoff(random.Random(1))
    expected = FIRST_RETRY
    for _ in range(12):
        assert expected / 2 <= backoff.after_failure() <= expected
        expected = min(2 * expected, LAST_RETRY)
    backoff.reset()
    assert backoff.after_failure() <= FIRST_RETRY


def test_two_that_lost_the_same_peer_do_not_come_back_in_step() -> None:
    one, other = (Backoff(random.Random(seed)) for seed in (1, 2))
    assert all(one.after_failure() != other.after_failure() for _ in range(8))


class Dials(MemoryMesh):
    """A mesh that notes when which address was dialled, and how patiently."""

    dialled: list[tuple[float, str]]
    patience: float

    async def dial(self, addr: str, *, timeout: float, patience: float = 0.0) -> str:
        self.dialled.append((trio.current_time(), addr))
        self.patience = patience
        return await super().dial(addr, timeout=timeout, patience=patience)


def dialler_of(network, name: str = "me") -> tuple[Dialler, Dials, KnownPeers]:
    mesh = network.node(name)
    mesh.__class__ = Dials
    mesh.dialled = []
    known = KnownPeers()
    return Dialler(mesh, Ledger(mesh.peer_id), known, random.Random(1)), mesh, known


async def test_a_peer_that_fails_is_left_alone_for_longer_and_longer(network, autojump_clock):
    dialler, mesh, known = dialler_of(network)
    gone = network.node("gone")
    known.note(gone.peer_id, (f"{gone.transport_addr}/p2p/{gone.peer_id}",))
    while trio.current_time() < mesh_start(mesh) + 120:
        if dialler.may_try(gone.peer_id, trio.current_time()):
            with pytest.raises(PeerUnreachable):
                await dialler.connect(gone.peer_id, timeout=3)
        await trio.sleep(0.05)
    times = [at for at, _ in mesh.dialled]
    gaps = [later - sooner for sooner, later in pairwise(times)]
    assert 8 <= len(times) <= 16
    assert gaps[0] < 0.5
    assert min(gaps[-2:]) > 10


def mesh_start(mesh: Dials) -> float:
    return mesh.dialled[0][0] if mesh.dialled else trio.current_time()


async def test_the_address_that_worked_is_dialled_first_the_next_time(
    network, nursery, autojump_clock
):
    dialler, mesh, known = dialler_of(network)
    peer = network.node("peer")
    await nursery.start(mesh.run_forever)
    await nursery.start(peer.run_forever)
    wrong = f"/ip4/10.99.99.99/tcp/1/p2p/{peer.peer_id}"
    known.note(peer.peer_id, (wrong, peer.addrs[0]))
    await dialler.connect(peer.peer_id, timeout=3)
    assert [addr for _, addr in mesh.dialled] == [wrong, peer.addrs[0]]
    # In the next life too: what did not work stands no longer.
    assert known.addrs_of(peer.peer_id) == (peer.addrs[0],)

    mesh.dialled.clear()
    await mesh.disconnect(peer.peer_id, "a test")
    await dialler.connect(peer.peer_id, timeout=3)

    assert [addr for _, addr in mesh.dialled] == [peer.addrs[0]]
    nursery.cancel_scope.cancel()


async def test_the_wait_for_a_turn_is_not_the_peers_fault(network, nursery, autojump_clock):
    mesh, peer = network.node("me"), network.node("peer")
    for node in (mesh, peer):
        await nursery.start(node.run_forever)
    known = KnownPeers()
    known.note(peer.peer_id, (f"{peer.transport_addr}/p2p/{peer.peer_id}",))
    slots = trio.CapacityLimiter(1)
    limits = DialLimits(slots, timeout=3.0)
    dialler = Dialler(mesh, Ledger(mesh.peer_id), known, random.Random(1), limits)
    holder = object()
    await slots.acquire_on_behalf_of(holder)
    nursery.start_soon(partial(dialler.connect_in_turn, peer.peer_id, wanted=lambda: True))
    await trio.sleep(10)
    # Three times its time has passed in the queue; it is still in it, and nobody queues it twice.
    assert dialler.waiting == 1
    assert not dialler.may_try(peer.peer_id, trio.current_time())
    slots.release_on_behalf_of(holder)
    await trio.sleep(1)
    assert dialler.is_linked(peer.peer_id)
    assert dialler.waiting == 0
    nursery.cancel_scope.cancel()


async def test_a_bootstrap_may_be_slower_than_others_once_it_took_the_connection(
    network, nursery, autojump_clock
):
    dialler, mesh, known = dialler_of(network)
    boot, other = network.node("boot"), network.node("other")
    for member in (mesh, boot, other):
        await nursery.start(member.run_forever)
    await dialler.dial(f"{boot.transport_addr}/p2p/{boot.peer_id}")
    assert mesh.patience > 2 * DIAL_TIMEOUT
    # Either end that gave up sooner would have the crowd at a bootstrap begin anew.
    limits = DEFAULT_LIMITS
    assert mesh.patience <= min(limits.handshake_timeout, limits.membership_timeout)
    known.note(other.peer_id, (f"{other.transport_addr}/p2p/{other.peer_id}",))
    await dialler.connect(other.peer_id, timeout=3)
    assert mesh.patience == 0
    nursery.cancel_scope.cancel()


async def test_a_dial_that_nobody_wants_any_more_is_not_made_when_its_turn_comes(
    network, autojump_clock
):
    dialler, mesh, known = dialler_of(network)
    gone = network.node("gone")
    known.note(gone.peer_id, (f"{gone.transport_addr}/p2p/{gone.peer_id}",))
    await dialler.connect_in_turn(gone.peer_id, wanted=lambda: False)
    assert mesh.dialled == []
