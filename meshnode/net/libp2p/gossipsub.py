"""The GossipSub router with the defaults that break a mesh undone.

Each override names the trap it closes; without the trap it can be deleted. What stays libp2p's
own: choosing the mesh, grafting, pruning, backing off, and the message cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2

from meshnode.errors import WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.pubsub_wire import (
    MAX_CONTROL_ENTRIES,
    MAX_MESSAGE_BYTES,
    MAX_MESSAGE_IDS,
    OutboundQueue,
    encode_frames,
)

_DEGREE = 6
_DEGREE_LOW = 4
_DEGREE_HIGH = 12
_HEARTBEAT_INTERVAL = 5  # seconds; GossipSub's own 1 s costs CPU that our rates don't need
# Messages kept for IHAVE and IWANT, six heartbeats at most; listeners limit each origin's rate.
_MAX_CACHED_MESSAGES = 20_000
# Of which a new subscriber is told at once; the ledger exchange tells it the rest.
_MAX_OFFERED_MESSAGES = 128


class MeshGossipSub(GossipSub):
    """GossipSub v1.1 that floods own messages, and never prunes below its number of links."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(
            # v1.2's IDONTWANT is one more RPC per message and peer: twice the CPU for us.
            [PROTOCOL_ID_V11],
            degree=_DEGREE,
            degree_low=_DEGREE_LOW,
            degree_high=_DEGREE_HIGH,
            heartbeat_interval=_HEARTBEAT_INTERVAL,
            gossip_window=3,
            gossip_history=6,
            # It rewrites the heartbeat to 30-60 s.
            adaptive_gossip_enabled=False,
            # It counts 10 messages/s per forwarder, so a hub is muted; listeners count per origin.
            spam_protection_enabled=False,
            # Dead code that costs a walk through all peers.
            eclipse_protection_enabled=False,
        )
        self.scorer = None  # all its weights are 0
        self._dropped = metrics.protocol_faults.labels(protocol="pubsub", code="reads_too_slowly")

    async def heartbeat(self) -> None:
        """Keep the mesh in shape, and gossip, until cancelled."""
        await trio.sleep(self.heartbeat_initial_delay)
        while True:
            await self.beat()
            await trio.sleep(self.heartbeat_interval)

    async def beat(self) -> None:
        """Do one heartbeat's work."""
        # A hub that prunes its leaves mutes them: for a star, and for 60 s of back-off, it is
        # all they have.
        self.degree_high = max(_DEGREE_HIGH, len(self._queues()))
        grafts, prunes = self.mesh_heartbeat()
        self.fanout_heartbeat()
        await self._emit_control_msgs(grafts, prunes, self.gossip_heartbeat())
        self.mcache.shift()
        self._periodic_security_cleanup()
        self._forget_old_back_offs()

    def publish_nowait(self, forwarder: ID, message: rpc_pb2.Message) -> None:
        """Queue ``message`` for every peer that is to have it.

        In the place of libp2p's ``publish``, which seals a peer record into every RPC, keeps an
        entry per message in ``recent_message_deliveries`` for ever, and parks copies for peers
        that never subscribe.
        """
        if len(self.mcache.msgs) < _MAX_CACHED_MESSAGES:
            self.mcache.put(message)
        frames = encode_frames(rpc_pb2.RPC(publish=[message]))
        origin = ID(message.from_id)
        for peer_id in self._get_peers_to_send(message.topicIDs, forwarder, origin):
            self._queue_frames(peer_id, frames)
        for topic in message.topicIDs:
            self.time_since_last_publish[topic] = int(time.time())

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        self.publish_nowait(msg_forwarder, pubsub_msg)

    def _get_peers_to_send(
        self,
        topic_ids: Iterable[str],
        msg_forwarder: ID,
        origin: ID,
        msg_id: bytes | None = None,
    ) -> Iterator[ID]:
        topics = list(topic_ids)
        assert self.pubsub is not None
        if msg_forwarder != self.pubsub.my_id:
            yield from super()._get_peers_to_send(topics, msg_forwarder, origin, msg_id)
            return
        # Flood-publish: an own message goes to all subscribers linked to this node, so that it
        # doesn't hang on a mesh that may not have formed yet.
        subscribers = (self.pubsub.peer_topics.get(topic, set()) for topic in topics)
        yield from set().union(*subscribers)

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        self._queue_frames(peer_id, encode_frames(rpc), urgent=priority)

    async def emit_control_message(self, control_msg: rpc_pb2.ControlMessage, to_peer: ID) -> None:
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    async def _emit_control_msgs(
        self,
        peers_to_graft: dict[ID, list[str]],
        peers_to_prune: dict[ID, list[str]],
        peers_to_gossip: dict[ID, dict[str, list[bytes]]],
    ) -> None:
        # libp2p's own repeats to each peer whatever it told the peers before.
        for peer_id in {*peers_to_graft, *peers_to_prune, *peers_to_gossip}:
            grafts = peers_to_graft.get(peer_id, [])
            prunes = peers_to_prune.get(peer_id, [])
            known = peers_to_gossip.get(peer_id, {})
            control = rpc_pb2.ControlMessage(
                graft=[rpc_pb2.ControlGraft(topicID=topic) for topic in grafts],
                prune=[
                    rpc_pb2.ControlPrune(topicID=topic, backoff=self.prune_back_off)
                    for topic in prunes
                ],
                ihave=[
                    # The newest heartbeat's come first; a reader refuses more than these.
                    rpc_pb2.ControlIHave(topicID=topic, messageIDs=ids[:MAX_MESSAGE_IDS])
                    for topic, ids in known.items()
                ],
            )
            await self.emit_control_message(control, peer_id)

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        """Follow the control messages in ``rpc``.

        Raises:
            WireError: ``too_many_control_messages``.
        """
        control = rpc.control
        entries = len(control.ihave) + len(control.iwant) + len(control.graft) + len(control.prune)
        ids = sum(len(ihave.messageIDs) for ihave in control.ihave)
        ids += sum(len(iwant.messageIDs) for iwant in control.iwant)
        if entries > MAX_CONTROL_ENTRIES or ids > MAX_MESSAGE_IDS:
            raise WireError("too_many_control_messages", f"{entries} entries with {ids} IDs")
        # A peer could grow a table, or have us ask for messages, with topics it made up.
        for ihave in control.ihave:
            if ihave.topicID in self.mesh:
                await self.handle_ihave(ihave, sender_peer_id)
        for iwant in control.iwant:
            await self.handle_iwant(iwant, sender_peer_id)
        for graft in control.graft:
            if graft.topicID in self.mesh:
                await self.handle_graft(graft, sender_peer_id)
        for prune in control.prune:
            if prune.topicID in self.mesh:
                # Peer exchange would have us dial whomever the peer names.
                del prune.peers[:]
                prune.backoff = min(prune.backoff, self.prune_back_off)
                await self.handle_prune(prune, sender_peer_id)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        # libp2p's own seals a peer record into the answer.
        if not self._check_iwant_rate_limit(sender_peer_id):
            return
        wanted = (self.mcache.get(message_id) for message_id in iwant_msg.messageIDs)
        self._send_messages(sender_peer_id, (message for message in wanted if message is not None))

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        # libp2p's own sends them all, and to the stream beside its sending task, so into its
        # frames. A peer that has heard them over another link asks for none.
        if recent := self.mcache.window(topic)[:_MAX_OFFERED_MESSAGES]:
            await self.emit_ihave(topic, recent, peer_id)

    async def flush_pending_messages(self, peer_id: ID) -> None:
        """Do nothing: ``publish_nowait`` parks no messages for peers without a subscription."""

    def leave_meshes(self, peer_id: ID) -> None:
        """Take out of every mesh a peer that no longer says what it subscribes to."""
        for peers in self.mesh.values():
            peers.discard(peer_id)

    def _send_messages(self, peer_id: ID, messages: Iterable[rpc_pb2.Message]) -> None:
        rpc = rpc_pb2.RPC()
        size = 0
        for message in messages:
            size += message.ByteSize()
            if size > MAX_MESSAGE_BYTES and rpc.publish:
                self.send_rpc(peer_id, rpc)
                rpc = rpc_pb2.RPC()
                size = message.ByteSize()
            rpc.publish.append(message)
        if rpc.publish:
            self.send_rpc(peer_id, rpc)

    def _queue_frames(self, peer_id: ID, frames: list[bytes], *, urgent: bool = False) -> None:
        queue = self._queues().get(peer_id)
        if queue is not None:
            for frame in frames:
                if not queue.push(frame, urgent=urgent):
                    self._dropped.inc()

    def _queues(self) -> dict[ID, OutboundQueue]:
        assert self.pubsub is not None
        return self.pubsub.peer_queues  # type: ignore[return-value]  # ours, put there by TolerantPubsub

    def _forget_old_back_offs(self) -> None:
        now = time.time()
        for peers in self.back_off.values():
            for peer_id in [peer_id for peer_id, until in peers.items() if until < now]:
                del peers[peer_id]
