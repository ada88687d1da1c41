"""Bare libp2p hosts with our muxer and pubsub, and peers that write what they like."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.pb.rpc_pb2 import RPC, Message
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from multiaddr import Multiaddr

from meshnode.metrics import Metrics
from meshnode.net.libp2p.muxer import use_our_muxer
from meshnode.net.libp2p.pubsub import MeshPubsub
from meshnode.net.libp2p.pubsub_wire import FrameBuffer
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


async def rpcs_from(raw: RawPeer) -> AsyncIterator[RPC]:
    """Give what a node sends to a raw peer, over the first stream that it opens."""
    await until(lambda: bool(raw.inbound))
    buffer = FrameBuffer()
    while True:
        buffer.feed(await raw.inbound[0].read(4096))
        for payload in buffer.frames():
            yield RPC.FromString(payload)


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
