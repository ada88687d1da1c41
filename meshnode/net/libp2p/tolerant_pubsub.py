"""libp2p's Pubsub with its traps closed: whatever a peer sends, at worst its stream is reset.

A peer's subscriptions hang on the stream that it opened, our sending hangs on the one that we
opened; either may die and come back without the other. Messages are judged, recorded and queued
in one synchronous step.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, KeysView
from dataclasses import dataclass, field

import structlog
import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX

from meshnode.errors import MeshError, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.gossipsub import MeshGossipSub
from meshnode.net.libp2p.pubsub_wire import (
    MAX_MESSAGE_BYTES,
    MAX_MESSAGE_ID_BYTES,
    MAX_TOPIC_BYTES,
    MAX_TOPICS_PER_PEER,
    FrameBuffer,
    OriginOf,
    OutboundQueue,
    SeenMessages,
    encode_frame,
)
from meshnode.net.mesh import MessageListener, Verdict

_HELLO_INTERVAL = 20.0  # seconds; a subscription that a peer forgot is back after this
_REOPEN_DELAY = 0.1  # seconds, doubled with each failure
_REOPEN_DELAY_MAX = 10.0
_READ_BYTES = 64 * 1024
# RPCs taken between two looks at other tasks: about 2 ms.
_RPCS_PER_TURN = 8
# Ends of streams and connections, which are no faults.
_ENDED = (BaseLibp2pError, MeshError, trio.BrokenResourceError, trio.ClosedResourceError, OSError)

_log = structlog.get_logger(__name__)


@dataclass
class _Link:
    """Our sending side towards one admitted, connected peer."""

    queue: OutboundQueue = field(default_factory=OutboundQueue)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    changed: trio.Event = field(default_factory=trio.Event)


class _Tasks:
    """The nursery behind libp2p's ``manager``.

    In the place of TrioManager, which ends the service at 1,000 children, walks through all of
    them for each new one, and starts tasks in a nursery that has closed.
    """

    def __init__(self, guard: Callable[..., Awaitable[bool]]) -> None:
        self._guard = guard
        self.nursery: trio.Nursery | None = None

    @property
    def is_running(self) -> bool:
        return self.nursery is not None

    def run_task(self, async_fn: Callable[..., Awaitable[None]], *args: object) -> None:
        if self.nursery is not None:
            self.nursery.start_soon(self._guard, async_fn, *args)


class TolerantPubsub(Pubsub):
    """Pubsub among admitted peers, run by ``serve_forever`` instead of as a libp2p service."""

    listeners: dict[str, MessageListener]

    def __init__(
        self, host: IHost, router: MeshGossipSub, metrics: Metrics, origin_of: OriginOf
    ) -> None:
        super().__init__(host, router, max_subscriptions_per_peer=MAX_TOPICS_PER_PEER)
        self.seen_messages.stop()  # ends its thread
        self.seen_messages = SeenMessages()  # type: ignore[assignment]
        # From nanoseconds, so that a restart never falls behind the numbers used before it.
        self.counter = time.time_ns()
        self.listeners = {}
        self._mesh_router = router
        self._metrics = metrics
        self._origin_of = origin_of
        self._admitted: set[ID] = set()
        self._links: dict[ID, _Link] = {}
        self._inbound: dict[ID, INetStream] = {}
        self._complained: set[str] = set()
        self._tasks = _Tasks(self._guard)
        self._manager = router._manager = self._tasks  # type: ignore[assignment]

    # Running

    async def serve_forever(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._tasks.nursery = nursery
                try:
                    await self._serve_within(nursery, task_status)
                finally:
                    # Streams outlive this service by a moment; what they start now must start
                    # nothing. Here and not below: the nursery is closed before it is left.
                    self._tasks.nursery = None
        finally:
            self._clear_subscription_state()

    async def _serve_within(
        self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]
    ) -> None:
        for topic in self.listeners:
            await self.router.join(topic)
        for task in (self.handle_peer_queue, self.handle_dead_peer_queue):
            nursery.start_soon(task)
        await self.wait_until_ready()
        nursery.start_soon(self._beat_forever)
        nursery.start_soon(self._say_hello_forever)
        for peer_id in self._admitted:
            self._keep_link(peer_id)
        task_status.started()
        await trio.sleep_forever()

    async def _beat_forever(self) -> None:
        await trio.sleep(self._mesh_router.heartbeat_initial_delay)
        while True:
            await self._guard(self._mesh_router.beat)
            self.seen_messages.forget_old()  # type: ignore[attr-defined]
            await trio.sleep(self._mesh_router.heartbeat_interval)

    async def _say_hello_forever(self) -> None:
        while True:
            await trio.sleep(_HELLO_INTERVAL)
            self.say_hello()

    async def _guard(self, async_fn: Callable[..., Awaitable[None]], *args: object) -> bool:
        """Run one task so that no peer's bytes end the service; return whether it went well."""
        try:
            await async_fn(*args)
        except _ENDED:
            return False
        except WireError as exc:
            self._count(exc.code)
            return False
        except DecodeError:
            self._count("bad_protobuf")
            return False
        except Exception as exc:  # noqa: BLE001 - the named guard: counts and logs whatever is left
            self._complain("task_failed", exc)
            return False
        return True

    def _complain(self, code: str, exc: Exception) -> None:
        """Log a bug of ours; once, since a peer may be able to bring it about at will."""
        self._count(code)
        if code not in self._complained:
            self._complained.add(code)
            _log.warning("pubsub_failed", code=code, error=repr(exc))

    def _count(self, code: str) -> None:
        self._metrics.protocol_faults.labels(protocol="pubsub", code=code).inc()

    # Peers

    def admit(self, peer_id: ID) -> None:
        self._admitted.add(peer_id)
        self._keep_link(peer_id)

    def dismiss(self, peer_id: ID) -> None:
        self._admitted.discard(peer_id)
        self._drop_link(peer_id)
        inbound = self._inbound.pop(peer_id, None)
        if inbound is not None:
            self._forget_subscriptions(peer_id)
            self._tasks.run_task(inbound.reset)

    async def _handle_new_peer_with_retry(self, peer_id: ID, timeout: float | None = None) -> None:
        self._keep_link(peer_id)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        if not self._peer_is_connected(peer_id):
            self._drop_link(peer_id)

    def _keep_link(self, peer_id: ID) -> None:
        """Have a stream to ``peer_id`` while it is admitted and connected."""
        if peer_id not in self._admitted or not self._peer_is_connected(peer_id):
            return
        link = self._links.get(peer_id)
        if link is not None:
            link.changed.set()
        elif self._tasks.is_running:
            self._links[peer_id] = link = _Link()
            self.peer_queues[peer_id] = link.queue  # type: ignore[assignment]
            self._tasks.run_task(self._hold_stream_forever, peer_id, link)

    def _drop_link(self, peer_id: ID) -> None:
        link = self._links.pop(peer_id, None)
        if link is not None:
            del self.peer_queues[peer_id]
            self.peers.pop(peer_id, None)
            self.router.remove_peer(peer_id)
            link.scope.cancel()

    async def _hold_stream_forever(self, peer_id: ID, link: _Link) -> None:
        with link.scope:
            delay = _REOPEN_DELAY
            while self._links.get(peer_id) is link:
                link.changed = trio.Event()
                opened = trio.current_time()
                await self._guard(self._use_stream, peer_id, link)
                if not self._peer_is_connected(peer_id):
                    self._drop_link(peer_id)
                    return
                if trio.current_time() - opened > _REOPEN_DELAY_MAX:
                    delay = _REOPEN_DELAY
                with trio.move_on_after(delay):
                    await link.changed.wait()
                delay = min(2 * delay, _REOPEN_DELAY_MAX)

    async def _use_stream(self, peer_id: ID, link: _Link) -> None:
        """Open a stream to ``peer_id`` and send over it until it ends."""
        stream = await self.host.new_stream(peer_id, self.protocols)
        try:
            await stream.write(encode_frame(self.get_hello_packet()))
            self._add_peer(peer_id, stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard, self._watch_end, stream, nursery.cancel_scope)
                nursery.start_soon(
                    self._guard, self._send_queued, stream, link, nursery.cancel_scope
                )
        finally:
            if self.peers.get(peer_id) is stream:
                del self.peers[peer_id]
                self.router.remove_peer(peer_id)

    def _add_peer(self, peer_id: ID, stream: INetStream) -> None:
        self.router.add_peer(peer_id, stream.get_protocol())
        self.peers[peer_id] = stream
        if (waiting := self._peer_added_events.pop(peer_id, None)) is not None:
            waiting.set()
        # Its subscriptions came over its own stream, which may be older than this one.
        for topic, peers in self.peer_topics.items():
            if peer_id in peers:
                self._tasks.run_task(self._replay_recent_messages, peer_id, topic)
                self._tasks.run_task(self.router.on_peer_subscribed, peer_id, topic)

    async def _watch_end(self, stream: INetStream, scope: trio.CancelScope) -> None:
        """Notice at once that the stream died; nobody sends anything on its way back."""
        try:
            await stream.read(1)
        finally:
            scope.cancel()

    async def _send_queued(self, stream: INetStream, link: _Link, scope: trio.CancelScope) -> None:
        try:
            while True:
                batch = await link.queue.take()
                try:
                    await stream.write(b"".join(batch))
                except BaseLibp2pError:
                    link.queue.put_back(batch)
                    raise
        finally:
            scope.cancel()

    # Sending

    @property
    def topic_ids(self) -> KeysView[str]:
        return self.listeners.keys()

    def get_hello_packet(self) -> rpc_pb2.RPC:
        topics = self.topic_ids
        return rpc_pb2.RPC(
            subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in topics]
        )

    def say_hello(self) -> None:
        frame = encode_frame(self.get_hello_packet())
        for link in self._links.values():
            link.queue.push(frame)

    async def publish(self, topic_id: str | list[str], data: bytes) -> None:
        topics = [topic_id] if isinstance(topic_id, str) else topic_id
        message = rpc_pb2.Message(
            from_id=self.my_id.to_bytes(), data=data, seqno=self._next_seqno(), topicIDs=topics
        )
        key = self.host.get_private_key()
        unsigned = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
        message.signature = key.sign(unsigned)
        message.key = self.host.get_public_key().serialize()
        self.seen_messages.add(self.get_message_id(message))
        self._mesh_router.publish_nowait(self.my_id, message)
        await trio.lowlevel.checkpoint()

    # Receiving

    async def stream_handler(self, stream: INetStream) -> None:
        peer_id = stream.muxed_conn.peer_id
        if peer_id not in self._admitted or not self._tasks.is_running:
            self._count("not_a_member")
            await self._guard(stream.reset)
            return
        # The newest stream counts: a peer opens another only when it lost the one before.
        replaced = self._inbound.get(peer_id)
        self._inbound[peer_id] = stream
        if replaced is not None:
            await self._guard(replaced.reset)
        await self._guard(self.continuously_read_stream, stream)
        if self._inbound.get(peer_id) is stream:
            del self._inbound[peer_id]
            self._forget_subscriptions(peer_id)
        await self._guard(stream.reset)

    def _forget_subscriptions(self, peer_id: ID) -> None:
        self._forget_all_subscriptions(peer_id)
        self._mesh_router.leave_meshes(peer_id)

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """Take RPCs until the stream ends.

        Raises:
            WireError: the peer broke a limit; the stream is to be reset.
            DecodeError: no protobuf.
        """
        peer_id = stream.muxed_conn.peer_id
        buffer = FrameBuffer()
        while self._inbound.get(peer_id) is stream and self._tasks.is_running:
            buffer.feed(await stream.read(_READ_BYTES))
            for number, payload in enumerate(buffer.frames(), 1):
                rpc = rpc_pb2.RPC.FromString(payload)
                await self._take_rpc(peer_id, rpc)
                if number % _RPCS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()

    async def _take_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC) -> None:
        # A peer's record, if it sends one, is not verified: identify tells its addresses.
        for message in rpc.publish:
            await self.push_msg(peer_id, message)
        if len(rpc.subscriptions) > MAX_TOPICS_PER_PEER:
            raise WireError("too_many_subscriptions", f"{len(rpc.subscriptions)} in one RPC")
        for subscription in rpc.subscriptions:
            topic = subscription.topicid
            # Protobuf hands out bad UTF-8 as bytes.
            if not isinstance(topic, str) or len(topic) > MAX_TOPIC_BYTES:
                raise WireError("bad_topic", f"{len(topic)} long, or no UTF-8")
            self.handle_subscription(peer_id, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            self._take_message(msg_forwarder, msg)
        except WireError as exc:
            self._count(exc.code)

    def _take_message(self, forwarder: ID, message: rpc_pb2.Message) -> None:
        """Judge, record and forward one message in one step.

        Raises:
            WireError: it is no message that an honest peer would have forwarded.
        """
        topics = message.topicIDs
        message_id = message.from_id + message.seqno
        if len(topics) != 1 or not message.seqno or len(message_id) > MAX_MESSAGE_ID_BYTES:
            raise WireError("bad_message", f"{len(topics)} topics, ID of {len(message_id)} bytes")
        if len(message.data) > MAX_MESSAGE_BYTES:
            raise WireError("message_too_large", f"{len(message.data)} bytes")
        listener = self.listeners.get(topics[0])
        if listener is None or self.seen_messages.has(message_id):
            return
        if message.from_id == self.my_id.to_bytes():
            return  # an echo; own messages are known as seen, but not for ever
        origin = self._origin_of(message)
        # Marked before it is judged, and whatever the verdict: nobody is asked twice. Only the
        # origin itself can have signed this ID, so it mutes nobody else.
        self.seen_messages.add(message_id)
        if self._ask(listener, origin, message.data) is Verdict.ACCEPT:
            self._mesh_router.publish_nowait(forwarder, message)

    def _ask(self, listener: MessageListener, origin: str, data: bytes) -> Verdict:
        try:
            return listener(origin, data)
        except Exception as exc:  # noqa: BLE001 - a listener's bug must not end the node
            self._complain("listener_failed", exc)
            return Verdict.REJECT
