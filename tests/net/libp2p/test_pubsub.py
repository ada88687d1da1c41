"""Publish and subscribe over real loopback hosts; each trap of GossipSub has its test."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pb.rpc_pb2 import Message
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from multiaddr import Multiaddr

from meshnode.metrics import Metrics
from meshnode.net.libp2p.muxer import use_our_muxer
from meshnode.net.libp2p.pubsub import MeshPubsub
from meshnode.net.libp2p.pubsub_wire import encode_frame
from meshnode.net.mesh import Verdict

TOPIC = "/meshnode/test/announce/1.0.0"
PROTOCOL = "/meshsub/1.1.0"


@dataclass
class Node:
    host: IHost
    pubsub: MeshPubsub
    metrics: Metrics
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    @property
    def peer_id(self) -> str:
        return self.host.get_id().to_base58()

    def hear(self, sender: str, data: bytes) -> Verdict:
        self.heard.append((sender, data))
        self.changed.set()
        return Verdict.ACCEPT

    async def wait_heard(self, count: int) -> None:
        while len(self.heard) < count:
            self.changed = trio.Event()
            await self.changed.wait()

    def faults(self, code: str) -> float:
        labels = {"protocol": "pubsub", "code": code}
        return (
            self.metrics.registry.get_sample_value("meshnode_protocol_faults_total", labels) or 0.0
        )


@asynccontextmanager
async def running(
    key_pair: KeyPair | None = None,
    listener: Callable[[str, bytes], Verdict] | None = None,
    topics: tuple[str, ...] = (TOPIC,),
) -> AsyncIterator[Node]:
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    host = new_host(key_pair=key_pair or create_new_key_pair(), listen_addrs=listen)
    use_our_muxer(host)
    metrics = Metrics()
    node = Node(host, MeshPubsub(host, metrics=metrics), metrics)
    for topic in topics:
        node.pubsub.subscribe(topic, listener or node.hear)
    async with host.run(listen_addrs=listen), trio.open_nursery() as nursery:
        await nursery.start(run_pubsub, node.pubsub)
        yield node
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def leaked_sockets_collected() -> Iterator[None]:
    """The stock host leaves the sockets it dialled to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def run_pubsub(
    pubsub: MeshPubsub, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    await pubsub.run_forever(task_status=task_status)


async def link(a: Node, b: Node) -> None:
    """Connect two nodes, each of which admits the other."""
    a.pubsub.admit(b.peer_id)
    b.pubsub.admit(a.peer_id)
    await connect(a, b)


async def connect(a: Node, b: Node) -> None:
    network = a.host.get_network()
    addr = b.host.get_addrs()[0]
    a.host.get_peerstore().add_addrs(b.host.get_id(), [addr], 3600)
    await network.dial_addr(addr, b.host.get_id())  # type: ignore[attr-defined]


async def subscribed(a: Node, b: Node, topic: str = TOPIC) -> None:
    """Wait until ``a`` can publish to ``b``."""
    inner = a.pubsub._pubsub
    await inner.wait_for_peer(b.host.get_id())
    await inner.wait_for_subscription(b.host.get_id(), topic)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def linked(a: Node, b: Node) -> None:
    await link(a, b)
    await subscribed(a, b)
    await subscribed(b, a)


async def test_a_message_reaches_a_linked_peer_and_names_its_sender() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            await a.pubsub.publish(TOPIC, b"hello")
            await b.wait_heard(1)
            assert b.heard == [(a.peer_id, b"hello")]
            assert a.heard == []


@asynccontextmanager
async def star(leaves: int) -> AsyncIterator[tuple[Node, list[Node]]]:
    """Run a hub and ``leaves`` nodes that are linked to nobody but the hub."""
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(running())
        nodes = [await stack.enter_async_context(running()) for _ in range(leaves)]
        for leaf in nodes:
            await linked(leaf, hub)
            await hub.pubsub._pubsub.wait_for_mesh(leaf.host.get_id(), TOPIC)
        yield hub, nodes


async def test_a_hub_carries_every_leafs_message_to_every_other_leaf() -> None:
    with trio.fail_after(40):
        async with star(14) as (hub, leaves):
            await hub.pubsub._router.beat()  # would prune the hub's mesh from 14 to 6
            for leaf in leaves:
                await leaf.pubsub.publish(TOPIC, leaf.peer_id.encode())
            for leaf in leaves:
                await leaf.wait_heard(13)
                assert {sender for sender, _ in leaf.heard} == {
                    other.peer_id for other in leaves if other is not leaf
                }
            await hub.wait_heard(14)


async def test_an_own_message_goes_to_every_subscriber_without_a_mesh() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            await a.pubsub.publish(TOPIC, b"by whatever way")
            await b.wait_heard(1)
            for node, other in ((a, b), (b, a)):
                node.pubsub._router.mesh[TOPIC].clear()
                # Neither graft nor gossip brings it to b while the two back off.
                node.pubsub._router._add_back_off(other.host.get_id(), TOPIC, False)
            await a.pubsub.publish(TOPIC, b"flooded")
            await b.wait_heard(2)


async def test_a_dead_stream_is_replaced_and_nobody_forgets_a_subscription() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            inner = a.pubsub._pubsub
            dead = inner.peers[b.host.get_id()]
            await dead.reset()
            await a.pubsub.publish(TOPIC, b"sent while there is no stream")
            await b.wait_heard(1)
            assert inner.peers[b.host.get_id()] is not dead
            await subscribed(b, a)
            await b.pubsub.publish(TOPIC, b"and back")
            await a.wait_heard(1)


async def test_a_stream_that_the_peer_reset_is_replaced_before_anything_is_sent() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            inbound, a_id = b.pubsub._pubsub._inbound, a.host.get_id()
            dead = inbound[a_id]
            await dead.reset()
            await until(lambda: inbound.get(a_id) not in (None, dead))
            await subscribed(b, a)
            await b.pubsub.publish(TOPIC, b"heard")
            await a.wait_heard(1)


async def test_a_hello_brings_a_forgotten_subscription_back() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await linked(a, b)
            a.pubsub._pubsub._forget_all_subscriptions(b.host.get_id())
            b.pubsub.say_hello()
            await subscribed(a, b)
            await a.pubsub.publish(TOPIC, b"heard again")
            await b.wait_heard(1)


async def test_a_message_published_before_the_link_reaches_the_new_peer() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b:
            await a.pubsub.publish(TOPIC, b"said to nobody")
            await linked(a, b)
            await b.wait_heard(1)


async def test_thirty_origins_through_one_hub_within_a_second_all_arrive() -> None:
    with trio.fail_after(10):
        async with running() as hub, running() as b, raw_peer() as relay:
            await linked(hub, b)
            stream = await relay.open_stream(hub)
            for number in range(30):
                message = signed_message(create_new_key_pair(), b"%d" % number)
                await stream.write(encode_frame(rpc_pb2.RPC(publish=[message])))
            await b.wait_heard(30)


async def test_a_node_that_restarts_after_a_burst_is_heard_at_once() -> None:
    key_pair = create_new_key_pair()
    with trio.fail_after(15):
        async with running() as b:
            async with running(key_pair) as a:
                await linked(a, b)
                for number in range(60):
                    await a.pubsub.publish(TOPIC, b"%d" % number)
                await b.wait_heard(60)
            b.pubsub.dismiss(a.peer_id)
            # The stock host leaves its sockets open, so b can't see that a is gone.
            await b.host.get_network().close_peer(a.host.get_id())
            async with running(key_pair) as a:
                await linked(a, b)
                await a.pubsub.publish(TOPIC, b"back")
                await b.wait_heard(61)


async def test_a_burst_of_500_messages_arrives_whole_and_in_order() -> None:
    with trio.fail_after(20):
        async with running() as a, running() as b:
            await linked(a, b)
            for number in range(500):
                await a.pubsub.publish(TOPIC, b"%d" % number)
            await b.wait_heard(500)
            assert [data for _, data in b.heard] == [b"%d" % number for number in range(500)]


async def test_nothing_is_kept_for_ever_per_message() -> None:
    with trio.fail_after(20):
        async with running() as a, running() as b:
            await linked(a, b)
            for number in range(200):
                await a.pubsub.publish(TOPIC, b"%d" % number)
            await b.wait_heard(200)
            for node in (a, b):
                router = node.pubsub._router
                assert not router.recent_message_deliveries
                assert not router.equivocation_detection
                assert not router._pending_messages
                for _ in range(6):
                    await router.beat()
                assert not router.mcache.msgs


class ByTopic:
    """Says REJECT, IGNORE or raises, as the message asks."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def __call__(self, sender: str, data: bytes) -> Verdict:
        self.heard.append(data)
        return Verdict(data.decode())  # any other word raises


async def test_only_accepted_messages_are_forwarded() -> None:
    judge = ByTopic()
    with trio.fail_after(15):
        async with running() as a, running(listener=judge) as hub, running() as b:
            await linked(a, hub)
            await linked(hub, b)
            for data in (b"reject", b"ignore", b"raise", b"accept"):
                await a.pubsub.publish(TOPIC, data)
            await b.wait_heard(1)
            assert b.heard == [(a.peer_id, b"accept")]
            assert judge.heard == [b"reject", b"ignore", b"raise", b"accept"]
            assert hub.faults("listener_failed") == 1


async def test_a_topic_without_a_listener_is_not_forwarded() -> None:
    other = "/other"
    with trio.fail_after(15):
        async with (
            running(topics=(TOPIC, other)) as a,
            running() as hub,
            running(topics=(TOPIC, other)) as b,
        ):
            await linked(a, hub)
            await linked(hub, b)
            await a.pubsub.publish(other, b"not for the hub")
            await a.pubsub.publish(TOPIC, b"for all")
            await b.wait_heard(1)
            assert b.heard == [(a.peer_id, b"for all")]


async def test_an_unadmitted_peer_gets_no_message_and_gives_none() -> None:
    with trio.fail_after(15):
        async with running() as a, running() as b, running() as stranger:
            await linked(a, b)
            stranger.pubsub.admit(a.peer_id)
            await connect(stranger, a)
            await until(lambda: a.faults("not_a_member") > 0)
            await stranger.pubsub.publish(TOPIC, b"let me in")
            await a.pubsub.publish(TOPIC, b"for members")
            await b.wait_heard(1)
            assert (a.heard, stranger.heard) == ([], [])

            a.pubsub.admit(stranger.peer_id)
            await subscribed(stranger, a)
            await stranger.pubsub.publish(TOPIC, b"thank you")
            await until(lambda: (stranger.peer_id, b"thank you") in a.heard)


async def test_no_stream_is_opened_to_a_peer_before_it_is_admitted() -> None:
    with trio.fail_after(10):
        async with running() as a, running() as b, raw_peer() as stranger:
            await stranger.connect(a)
            await linked(a, b)
            await a.pubsub.publish(TOPIC, b"for members")
            await b.wait_heard(1)
            assert stranger.inbound == []
            a.pubsub.admit(stranger.host.get_id().to_base58())
            await until(lambda: len(stranger.inbound) == 1)


async def test_a_dismissed_peer_gets_and_gives_nothing_more() -> None:
    with trio.fail_after(15):
        async with running() as a, running() as b, running() as c:
            await linked(a, b)
            await linked(a, c)
            a.pubsub.dismiss(c.peer_id)
            await a.pubsub.publish(TOPIC, b"for b alone")
            await c.pubsub.publish(TOPIC, b"for nobody")
            await b.wait_heard(1)
            await until(lambda: a.faults("not_a_member") > 0)
            assert (a.heard, c.heard) == ([], [])
            for streams in (a.pubsub._pubsub.peers, a.pubsub._pubsub.peer_queues):
                assert list(streams) == [b.host.get_id()]


async def test_a_task_that_comes_after_the_end_starts_nothing() -> None:
    with trio.fail_after(10):
        async with running() as a:
            manager = a.pubsub._pubsub.manager
        manager.run_task(trio.sleep_forever)
        assert not manager.is_running


async def test_a_service_may_have_more_than_a_thousand_tasks() -> None:
    with trio.fail_after(15):
        async with running() as a, running() as b:
            for _ in range(1_100):
                a.pubsub._pubsub.manager.run_task(trio.sleep_forever)
            await linked(a, b)


async def test_twenty_teardowns_raise_nothing_and_log_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with trio.fail_after(60):
        for _ in range(20):
            with caplog.at_level(logging.WARNING):
                async with running() as a, running() as b:
                    await linked(a, b)
                    for number in range(5):
                        await a.pubsub.publish(TOPIC, b"%d" % number)
                        await b.pubsub.publish(TOPIC, b"%d" % number)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# What a peer may send


@dataclass
class RawPeer:
    """A member that writes what it likes to the pubsub protocol."""

    host: IHost
    inbound: list[INetStream] = field(default_factory=list)

    async def connect(self, node: Node) -> None:
        peer_id, addr = node.host.get_id(), node.host.get_addrs()[0]
        self.host.get_peerstore().add_addrs(peer_id, [addr], 3600)
        await self.host.get_network().dial_addr(addr, peer_id)  # type: ignore[attr-defined]

    async def open_stream(self, node: Node) -> INetStream:
        node.pubsub.admit(self.host.get_id().to_base58())
        if not self.host.get_network().get_connections(node.host.get_id()):
            await self.connect(node)
        return await self.host.new_stream(node.host.get_id(), [TProtocol(PROTOCOL)])


@asynccontextmanager
async def raw_peer() -> AsyncIterator[RawPeer]:
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    peer = RawPeer(new_host(key_pair=create_new_key_pair(), listen_addrs=listen))
    use_our_muxer(peer.host)

    async def keep(stream: INetStream) -> None:
        peer.inbound.append(stream)
        await trio.sleep_forever()

    peer.host.set_stream_handler(TProtocol(PROTOCOL), keep)
    async with peer.host.run(listen_addrs=listen):
        yield peer


def signed_message(key_pair: KeyPair, data: bytes, seqno: bytes = b"\0" * 7 + b"\1") -> Message:
    message = Message(
        from_id=ID.from_pubkey(key_pair.public_key).to_bytes(),
        data=data,
        seqno=seqno,
        topicIDs=[TOPIC],
    )
    signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
    message.signature = key_pair.private_key.sign(signed)
    return message


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
