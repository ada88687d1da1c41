from __future__ import annotations

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.rsa import create_new_key_pair as create_new_rsa_key_pair
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from meshnode.errors import WireError
from meshnode.net.libp2p import pubsub_wire
from meshnode.net.libp2p.pubsub_wire import (
    FrameBuffer,
    OutboundQueue,
    SeenMessages,
    encode_frame,
    encode_frames,
    verify_origin,
)
from support.pubsub_nodes import signed_message


def rpc_of(size: int) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(publish=[rpc_pb2.Message(data=b"d" * size)])


@pytest.mark.parametrize("piece", [1, 2, 3, 130, 100_000])
def test_frames_are_found_however_the_bytes_are_cut(piece: int) -> None:
    rpcs = [rpc_of(size) for size in (0, 1, 120, 130, 16_400)]
    data = b"".join(map(encode_frame, rpcs))
    buffer = FrameBuffer()
    found = []
    for at in range(0, len(data), piece):
        buffer.feed(data[at : at + piece])
        found += buffer.frames()
    assert found == [rpc.SerializeToString() for rpc in rpcs]


def test_a_frame_as_long_as_the_limit_passes_and_one_byte_more_does_not() -> None:
    buffer = FrameBuffer(max_frame_bytes=300)
    buffer.feed(b"\xac\x02" + b"d" * 300)
    assert list(buffer.frames()) == [b"d" * 300]
    buffer.feed(b"\xad\x02")
    with pytest.raises(WireError, match="more than 300 bytes"):
        list(buffer.frames())


def test_frames_before_a_broken_one_are_still_given_out() -> None:
    buffer = FrameBuffer(max_frame_bytes=300)
    buffer.feed(b"\x01a\x01b\xff\xff\xff\xff\xff")
    frames = buffer.frames()
    assert (next(frames), next(frames)) == (b"a", b"b")
    with pytest.raises(WireError):
        next(frames)


def test_a_length_of_padding_bytes_without_end_is_refused() -> None:
    buffer = FrameBuffer()
    buffer.feed(b"\x80" * 5)
    with pytest.raises(WireError) as caught:
        list(buffer.frames())
    assert caught.value.code == "bad_length"


def test_an_rpc_larger_than_peers_take_is_sent_in_parts() -> None:
    rpc = rpc_pb2.RPC(publish=[rpc_pb2.Message(data=b"d" * 60_000) for _ in range(10)])
    buffer = FrameBuffer()
    for frame in encode_frames(rpc):
        buffer.feed(frame)
    parts = [rpc_pb2.RPC.FromString(payload) for payload in buffer.frames()]
    assert sum(len(part.publish) for part in parts) == 10


async def test_a_queue_gives_out_urgent_frames_first_and_as_many_as_one_write_carries() -> None:
    queue = OutboundQueue()
    for name in (b"a", b"b", b"c"):
        queue.push(name * 25_000)
    queue.push(b"urgent", urgent=True)
    assert [frame[:1] for frame in await queue.take()] == [b"u", b"a", b"b"]
    assert [frame[:1] for frame in await queue.take()] == [b"c"]


async def test_a_frame_larger_than_one_write_is_still_given_out() -> None:
    queue = OutboundQueue()
    queue.push(b"f" * 200_000)
    assert [len(frame) for frame in await queue.take()] == [200_000]


async def test_a_queue_drops_what_a_slow_reader_leaves_too_long() -> None:
    queue = OutboundQueue()
    frame = b"f" * 200_000
    assert [queue.push(frame) for _ in range(11)] == [True] * 10 + [False]
    await queue.take()
    assert queue.push(frame)

    queue = OutboundQueue()
    assert sum(queue.push(b"f") for _ in range(5_000)) == 4_096


async def test_frames_put_back_come_first_again() -> None:
    queue = OutboundQueue()
    queue.push(b"first")
    queue.push(b"second")
    batch = await queue.take()
    queue.push(b"third")
    queue.put_back(batch)
    assert await queue.take() == [b"first", b"second", b"third"]


async def test_a_reader_waits_for_the_next_frame(nursery: trio.Nursery) -> None:
    queue = OutboundQueue()
    taken: list[bytes] = []

    async def take() -> None:
        taken.extend(await queue.take())

    nursery.start_soon(take)
    await trio.testing.wait_all_tasks_blocked()
    queue.push(b"frame")
    await trio.testing.wait_all_tasks_blocked()
    assert taken == [b"frame"]


async def test_seen_messages_are_forgotten_after_two_minutes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seen = SeenMessages()
    assert seen.add(b"early")
    await trio.sleep(60)
    assert seen.add(b"late")
    assert not seen.add(b"early")
    await trio.sleep(61)
    seen.forget_old()
    assert (seen.has(b"early"), seen.has(b"late")) == (False, True)


async def test_only_so_many_messages_are_remembered() -> None:
    seen = SeenMessages(max_entries=3)
    for message_id in (b"1", b"2", b"3", b"4"):
        seen.add(message_id)
    assert len(seen) == 3
    assert (seen.has(b"1"), seen.has(b"4")) == (False, True)


def test_an_origin_is_named_by_its_peer_id() -> None:
    key_pair = create_new_key_pair()
    for data in (b"first", b"from the table of known keys"):
        named = verify_origin(signed_message(key_pair, data))
        assert named == ID.from_pubkey(key_pair.public_key).to_base58()


def test_an_origin_whose_key_is_not_inside_its_peer_id_sends_the_key_along() -> None:
    key_pair = create_new_rsa_key_pair(2048)
    message = signed_message(key_pair, b"data")
    with pytest.raises(WireError):
        verify_origin(message)
    message.key = key_pair.public_key.serialize()
    assert verify_origin(message) == ID.from_pubkey(key_pair.public_key).to_base58()


def test_a_key_that_is_not_the_origins_own_is_refused() -> None:
    mallory, victim = create_new_rsa_key_pair(2048), create_new_rsa_key_pair(2048)
    message = signed_message(mallory, b"data")
    message.from_id = ID.from_pubkey(victim.public_key).to_bytes()
    message.key = mallory.public_key.serialize()
    with pytest.raises(WireError, match="not its peer ID's"):
        verify_origin(message)


def test_a_known_origin_must_still_sign_each_message() -> None:
    key_pair = create_new_key_pair()
    verify_origin(signed_message(key_pair, b"genuine"))
    forged = signed_message(key_pair, b"genuine")
    forged.data = b"forged"
    with pytest.raises(WireError, match="not signed by"):
        verify_origin(forged)


def test_what_hosts_of_one_process_verified_once_is_true_for_that_message_alone() -> None:
    origin_of = pubsub_wire.shared_verification(8)
    key_pair = create_new_key_pair()
    message = signed_message(key_pair, b"genuine")
    named = ID.from_pubkey(key_pair.public_key).to_base58()
    assert origin_of(message) == origin_of(message) == named
    message.data = b"forged"
    for _ in range(2):
        with pytest.raises(WireError, match="not signed by"):
            origin_of(message)


def test_only_so_many_origins_are_remembered_and_each_with_few_bytes() -> None:
    remembered = pubsub_wire._read_inside.cache_info
    assert remembered().maxsize == 10_000
    before = remembered().currsize
    message = signed_message(create_new_key_pair(), b"data")
    # What a stranger put beside its signature is not kept, nor does it make a new entry.
    for key_beside in (b"", b"k" * 50_000):
        message.key = key_beside
        verify_origin(message)
    assert remembered().currsize == before + 1


def test_one_ihave_of_go_libp2p_fits_into_an_rpc() -> None:
    ids = [b"i" * 46] * pubsub_wire.MAX_MESSAGE_IDS
    ihave = rpc_pb2.ControlIHave(topicID="/meshnode/a/announce/1.0.0", messageIDs=ids)
    rpc = rpc_pb2.RPC(control=rpc_pb2.ControlMessage(ihave=[ihave]))
    assert rpc.ByteSize() <= pubsub_wire.MAX_RPC_BYTES
