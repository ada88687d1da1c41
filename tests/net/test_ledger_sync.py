"""Two ledgers compared over a stream: what gossip lost is repaired in one exchange."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from meshnode.core.ledger_digest import key_of
from meshnode.core.ledger_exchange import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_ID,
    Digest,
    End,
    Record,
    Want,
    digest_frames,
    encode,
    end_frame,
)
from meshnode.core.node_data import NodeData
from meshnode.core.node_data import encode as encode_node
from meshnode.core.wire import encode_frame
from meshnode.errors import MeshError, PeerUnreachable, StreamReset
from meshnode.net.gossip import announce_topic
from meshnode.net.mesh import Verdict


def frame(message):
    return encode_frame(encode(message))


async def linked(make_node, start, wait_until, *names):
    first, *others = names
    boot = make_node(first)
    nodes = [boot, *(make_node(name, bootstraps=[boot.addr]) for name in others)]
    await start(*nodes)
    await wait_until(lambda: all(n.online() == set(names) for n in nodes), within=5)
    await trio.sleep(10)  # the first exchanges are over
    return nodes


def seq_of(observer, target):
    return observer.ledger.get(target.peer_id).node.seq


def deafen(node):
    """Let a node hear no more announcements."""
    node.mesh.subscribe(announce_topic("test"), lambda *_: Verdict.IGNORE)


async def test_an_announcement_that_one_side_lost_is_repaired_whoever_asks(
    make_node, start, wait_until, autojump_clock
):
    a, b, c = await linked(make_node, start, wait_until, "a", "b", "c")
    await trio.sleep(20)  # what each compares of its own soon after joining would repair it, too
    for asker, member in ((a, b), (b, a)):
        deafen(a)
        c.announcer.changed()
        await trio.sleep(1.5)
        assert seq_of(a, c) < seq_of(b, c)
        await asker.sync.exchange(member.peer_id)
        await trio.sleep(0.01)  # what the member wanted has arrived, too
        assert seq_of(a, c) == seq_of(b, c)


async def test_a_goodbye_that_was_lost_is_repaired(make_node, start, wait_until, autojump_clock):
    a, b, c = await linked(make_node, start, wait_until, "a", "b", "c")
    deafen(a)
    await c.announcer.say_leaving()
    await trio.sleep(0.1)
    assert a.online() == set("abc")
    await a.sync.exchange(b.peer_id)
    assert a.ledger.get(c.peer_id).state == "left"


async def test_equal_ledgers_send_no_record(make_node, start, wait_until, autojump_clock):
    a, b, _ = await linked(make_node, start, wait_until, "a", "b", "c")
    assert await a.sync.exchange(b.peer_id) == 0


async def test_two_halves_know_each_other_soon_after_one_link_joins_them(
    make_node, start, wait_until, network, autojump_clock
):
    names = [f"n{number}" for number in range(8)]
    nodes = await linked(make_node, start, wait_until, *names)
    for node in nodes:  # so that exchanges alone can bring the halves together
        deafen(node)
    halves = nodes[:4], nodes[4:]
    network.partition([[node.mesh for node in half] for half in halves])
    await trio.sleep(30)
    for half in halves:
        assert all(node.online() == {each.name for each in half} for node in half)
        for node in half[1:]:  # within each half the newest announcements are known
            await node.sync.exchange(half[0].peer_id)
    network.heal_all()
    one, other = halves[0][0], halves[1][0]
    await one.mesh.dial(other.addr, timeout=5)
    took = await wait_until(
        lambda: one.online() == other.online() == set(names), within=2, step=0.01
    )
    assert took < 0.5


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([b"\xff\xff\xff\xff"], "too_large"),
        ([encode_frame(b"garbage")], "bad_msgpack"),
        ([frame(Want(keys=bytes(12))), frame(End())], "unknown_type"),
        ([frame(Digest(gone=False, entries=bytes(32_000)))] * 13, "too_many"),
        ([frame(Digest(gone=False, entries=b""))], "truncated"),
        ([frame(End()), frame(Record(envelope=b"not asked for", age=0.0))], "too_many"),
    ],
)
async def test_a_hostile_asker_is_cut_off_and_counted(
    make_node, start, wait_until, autojump_clock, said, code
):
    a, b = await linked(make_node, start, wait_until, "a", "b")
    stream = await b.mesh.open_stream(a.peer_id, PROTOCOL_ID, timeout=5)
    with suppress(MeshError):  # it may be cut off before it has said all
        for data in said:
            await stream.send_all(data)
        await stream.send_eof()
    await trio.sleep(1)
    assert a.counted("protocol_faults_total", protocol="ledger", code=code) == 1
    assert a.online() == set("ab")


async def test_a_digest_of_made_up_nodes_gets_questions_and_no_belief(
    make_node, start, wait_until, autojump_clock
):
    a, b = await linked(make_node, start, wait_until, "a", "b")
    stream = await b.mesh.open_stream(a.peer_id, PROTOCOL_ID, timeout=5)
    made_up = [key_of(f"nobody {n}") + b"\xff" * 8 for n in range(1000)]
    await stream.send_all(b"".join(digest_frames(made_up, gone=False)) + end_frame())
    forged = b.mesh.seal(encode_node(NodeData(id="12D3KooWother", seq=9)))
    await stream.send_all(frame(Record(envelope=forged, age=0.0)) + end_frame())
    await stream.send_eof()
    await trio.sleep(1)
    assert len(a.ledger) == 2
    assert a.counted("announcements_rejected_total", reason="wrong_signer") == 1


async def test_who_answers_with_more_than_a_ledger_is_cut_off(
    make_node, start, wait_until, autojump_clock
):
    a, b = await linked(make_node, start, wait_until, "a", "b")

    async def answer(stream):
        while True:
            await stream.send_all(frame(Want(keys=bytes(12) * 2600)))

    b.mesh.serve(PROTOCOL_ID, answer)
    with pytest.raises(PeerUnreachable, match="damaged ledger"):
        await a.sync.exchange(b.peer_id)
    assert a.counted("protocol_faults_total", protocol="ledger", code="too_many") == 1


async def test_who_never_answers_holds_up_an_exchange_for_ten_seconds_at_most(
    make_node, start, wait_until, autojump_clock
):
    a, b = await linked(make_node, start, wait_until, "a", "b")

    async def answer(_stream):
        await trio.sleep_forever()

    b.mesh.serve(PROTOCOL_ID, answer)
    began = trio.current_time()
    with pytest.raises(PeerUnreachable, match="took longer than 10 s"):
        await a.sync.exchange(b.peer_id)
    assert trio.current_time() - began == pytest.approx(10)


async def test_one_peer_has_one_exchange_at_a_time(make_node, start, wait_until, autojump_clock):
    a, b = await linked(make_node, start, wait_until, "a", "b")
    slow = await b.mesh.open_stream(a.peer_id, PROTOCOL_ID, timeout=5)
    await slow.send_all(b"".join(digest_frames([bytes(20)], gone=False)))
    await trio.sleep(0.1)
    with pytest.raises(StreamReset):
        await b.sync.exchange(a.peer_id)
    slow.reset()
    await trio.sleep(0.1)
    assert await b.sync.exchange(a.peer_id) == 0


def test_a_frame_has_room_for_the_largest_message():
    largest = [
        Digest(gone=False, entries=bytes(32_000)),
        Want(keys=bytes(31_200)),
        Record(envelope=bytes(20_480), age=1.5),
    ]
    assert all(len(encode(message)) <= MAX_MESSAGE_BYTES for message in largest)
