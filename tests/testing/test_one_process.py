"""What nodes of one process share is done once, and nothing that is false is shared."""

from __future__ import annotations

import gc

import pytest
import trio

from meshnode.core import budget
from meshnode.errors import WireError
from meshnode.net.libp2p.envelope import seal
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.testing.fixtures import OpenSwarm
from meshnode.testing.one_process import OneProcess, OpenedEnvelopes, seldom_collecting

KEY = b"k" * 32


async def test_an_envelope_is_opened_by_the_first_for_all_and_a_false_one_by_nobody() -> None:
    process, opened = OneProcess(2), OpenedEnvelopes()
    listen = "/ip4/127.0.0.1/tcp/0"
    one, other = (
        process.mesh(identity_seed=bytes([n]) * 32, listen=listen, key=KEY) for n in (1, 2)
    )
    author = ephemeral_identity(b"a" * 32)
    envelope = seal(author, b"payload")
    first = opened.open(envelope, one)
    assert first == (author.peer_id, b"payload")
    assert opened.open(envelope, other) is first
    false = envelope[:-1] + bytes([envelope[-1] ^ 1])
    for mesh in (one, other):
        with pytest.raises(WireError):
            opened.open(false, mesh)


@pytest.mark.parametrize("n", [1, 20, 60])
async def test_a_swarm_that_one_process_can_hear_keeps_its_interval(n: int) -> None:
    assert OneProcess(n).stretch(10.0) == 1.0


async def test_a_large_swarm_begins_with_the_interval_that_it_would_come_to() -> None:
    process = OneProcess(200)
    interval = 10.0 * process.stretch(10.0)
    assert interval == budget.announce_interval(200, 10.0, process.announce_budget)
    assert 200 / interval <= process.announce_budget


async def test_the_garbage_collector_is_as_it_was_after_a_swarm(real_swarm_of: OpenSwarm) -> None:
    before = gc.get_threshold()
    with trio.fail_after(30):
        async with real_swarm_of(1):
            assert gc.get_threshold() != before
    assert gc.get_threshold() == before
    with pytest.raises(ZeroDivisionError), seldom_collecting():
        raise ZeroDivisionError
    assert gc.get_threshold() == before
