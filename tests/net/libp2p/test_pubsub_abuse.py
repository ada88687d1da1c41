"""Whatever a member sends over pubsub, at worst it loses its stream."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pb.rpc_pb2 import Message

from meshnode.net.libp2p.pubsub_wire import encode_frame
from support.pubsub_nodes import (
    TOPIC,
    linked,
    raw_peer,
    running,
    signed_message,
)


@pytest.fixture(autouse=True)
def leaked_sockets_collected() -> Iterator[None]:
    """The stock host leaves the sockets it dialled to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def hash_type_id() -> bytes:
    return b"\x12\x20" + b"h" * 32


BAD_RPCS = {
    "a length prefix without end": (b"\xff" * 5, "rpc_too_large"),
    "a length beyond the limit": (b"\xff\xff\x7f", "rpc_too_large"),
    "garbage protobuf": (b"\x0a" + b"\xff" * 10, "bad_protobuf"),
    "bad UTF-8 in a topic": (
        # subscriptions { subscribe: true, topicid: "\xff" }
        b"\x07\x0a\x05\x08\x01\x12\x01\xff",
        "bad_topic",
    ),
    "a topic of 257 characters": (
        encode_frame(
            rpc_pb2.RPC(
                subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid="t" * 257)],
            )
        ),
        "bad_topic",
    ),
    "too many subscriptions": (
        encode_frame(
            rpc_pb2.RPC(
                subscriptions=[
                    rpc_pb2.RPC.SubOpts(subscribe=True, topicid=str(number)) for number in range(17)
                ]
            )
        ),
        "too_many_subscriptions",
    ),
    "too many control messages": (
        encode_frame(
            rpc_pb2.RPC(
                control=rpc_pb2.ControlMessage(
                    graft=[rpc_pb2.ControlGraft(topicID=str(number)) for number in range(33)]
                )
            )
        ),
        "too_many_control_messages",
    ),
    "too many message IDs": (
        encode_frame(
            rpc_pb2.RPC(
                control=rpc_pb2.ControlMessage(
                    ihave=[rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[b"i"] * 5_001)]
                )
            )
        ),
        "too_many_control_messages",
    ),
}


@pytest.mark.parametrize(("sent", "code"), BAD_RPCS.values(), ids=BAD_RPCS.keys())
async def test_a_broken_rpc_costs_its_sender_the_stream_and_nobody_else(
    sent: bytes, code: str
) -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b, raw_peer() as raw:
            await linked(a, b)
            stream = await raw.open_stream(a)
            await stream.write(sent)
            with pytest.raises(StreamError):
                await stream.read(1)
            assert a.faults(code) == 1

            stream = await raw.open_stream(a)  # and may begin anew
            key_pair = create_new_key_pair()
            message = signed_message(key_pair, b"still there")
            await stream.write(encode_frame(rpc_pb2.RPC(publish=[message])))
            await a.wait_heard(1)
            await b.wait_heard(1)
            assert b.heard == [(str(ID.from_pubkey(key_pair.public_key)), b"still there")]


def bad_messages() -> dict[str, tuple[Message, str]]:
    key_pair = create_new_key_pair()
    valid = signed_message(key_pair, b"no")
    short_key = b"\x08\x01\x12\x03abc"
    cases = {
        "a hash-type peer ID with a junk key": (
            {"from_id": hash_type_id(), "key": b"junk"},
            "bad_signature",
        ),
        "a hash-type peer ID with a short Ed25519 key": (
            {"from_id": hash_type_id(), "key": short_key},
            "bad_signature",
        ),
        "a short Ed25519 key in the peer ID": (
            {"from_id": b"\x00" + bytes([len(short_key)]) + short_key},
            "bad_signature",
        ),
        "an origin that is no peer ID": ({"from_id": b"?"}, "bad_signature"),
        "no signature": ({"signature": b""}, "bad_signature"),
        "a signature of odd length": ({"signature": b"odd"}, "bad_signature"),
        "another's signature": ({"data": b"forged"}, "bad_signature"),
        "no sequence number": ({"seqno": b""}, "bad_message"),
        "an endless sequence number": ({"seqno": b"s" * 200}, "bad_message"),
        "two topics": ({"topicIDs": [TOPIC, TOPIC]}, "bad_message"),
        "more than 64 KiB": ({"data": b"d" * 65_537}, "message_too_large"),
    }
    fields = {name.name: value for name, value in valid.ListFields()}
    return {name: (Message(**(fields | changed)), code) for name, (changed, code) in cases.items()}


async def test_a_bad_message_is_dropped_and_counted_and_ends_nothing() -> None:
    with trio.fail_after(20):
        async with running() as a, raw_peer() as raw:
            stream = await raw.open_stream(a)
            expected: Counter[str] = Counter()
            for message, code in bad_messages().values():
                expected[code] += 1
                await stream.write(encode_frame(rpc_pb2.RPC(publish=[message])))
            good = signed_message(create_new_key_pair(), b"good")
            await stream.write(encode_frame(rpc_pb2.RPC(publish=[good])))
            await a.wait_heard(1)
            assert {code: a.faults(code) for code in expected} == dict(expected)
            assert [data for _, data in a.heard] == [b"good"]


async def test_a_message_that_comes_twice_is_heard_once() -> None:
    with trio.fail_after(10):
        async with running() as a, raw_peer() as raw:
            stream = await raw.open_stream(a)
            key_pair = create_new_key_pair()
            first = signed_message(key_pair, b"1", seqno=b"\1")
            second = signed_message(key_pair, b"2", seqno=b"\2")
            for message in (first, first, second):
                await stream.write(encode_frame(rpc_pb2.RPC(publish=[message])))
            await a.wait_heard(2)
            assert [data for _, data in a.heard] == [b"1", b"2"]


async def test_a_peer_can_announce_sixteen_topics_and_no_more() -> None:
    with trio.fail_after(10):
        async with running() as a, raw_peer() as raw:
            stream = await raw.open_stream(a)
            for number in range(40):
                topic = rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"topic {number}")
                await stream.write(encode_frame(rpc_pb2.RPC(subscriptions=[topic])))
            last = signed_message(create_new_key_pair(), b"last")
            await stream.write(encode_frame(rpc_pb2.RPC(publish=[last])))
            await a.wait_heard(1)
            assert len(a.pubsub._pubsub.peer_topics) == 16


async def test_a_prune_makes_nobody_dial_the_peers_it_names() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as other, raw_peer() as raw:
            stream = await raw.open_stream(a)
            named = rpc_pb2.PeerInfo(peerID=other.host.get_id().to_bytes())
            addr = other.host.get_addrs()[0]
            a.host.get_peerstore().add_addrs(other.host.get_id(), [addr], 3600)
            prune = rpc_pb2.ControlPrune(topicID=TOPIC, peers=[named], backoff=10**9)
            control = rpc_pb2.ControlMessage(prune=[prune])
            await stream.write(encode_frame(rpc_pb2.RPC(control=control)))
            last = signed_message(create_new_key_pair(), b"last")
            await stream.write(encode_frame(rpc_pb2.RPC(publish=[last])))
            await a.wait_heard(1)
            assert not a.host.get_network().get_connections(other.host.get_id())
            assert a.pubsub._router.back_off[TOPIC][raw.host.get_id()] < time.time() + 61


async def test_a_message_larger_than_peers_take_is_refused_before_it_is_sent() -> None:
    with trio.fail_after(10):
        async with running() as a:
            with pytest.raises(ValueError, match="at most 65536 bytes"):
                await a.pubsub.publish(TOPIC, b"d" * 65_537)
