"""Publish and subscribe among proven members, over libp2p's GossipSub.

What libp2p's own parts get wrong is mended in ``tolerant_pubsub.py`` and ``gossipsub.py``.
"""

from __future__ import annotations

import trio
from libp2p.abc import IHost
from libp2p.peer.id import ID

from meshnode.metrics import Metrics
from meshnode.net.libp2p.gossipsub import MeshGossipSub
from meshnode.net.libp2p.pubsub_wire import MAX_MESSAGE_BYTES, OriginOf, verify_origin
from meshnode.net.libp2p.tolerant_pubsub import TolerantPubsub
from meshnode.net.mesh import MessageListener


class MeshPubsub:
    """Topics among the peers that were admitted, on one running host.

    Build it before ``host.run``; start ``run_forever`` inside, and dial only once it has started.
    """

    def __init__(
        self, host: IHost, *, metrics: Metrics, origin_of: OriginOf = verify_origin
    ) -> None:
        self._router = MeshGossipSub(metrics)
        self._pubsub = TolerantPubsub(host, self._router, metrics, origin_of)

    def admit(self, peer_id: str) -> None:
        """Let a proven member open pubsub streams, and open one to it while it is connected."""
        self._pubsub.admit(ID.from_base58(peer_id))

    def dismiss(self, peer_id: str) -> None:
        """Close the pubsub streams from and to a peer, and accept no more of them."""
        self._pubsub.dismiss(ID.from_base58(peer_id))

    def subscribe(self, topic: str, listener: MessageListener) -> None:
        """Hear each message on ``topic`` once, own ones excluded; call it before ``run_forever``.

        ``listener`` also decides whether the message is forwarded. It may see a message again
        after 120 s.
        """
        self._pubsub.listeners[topic] = listener

    async def publish(self, topic: str, data: bytes) -> None:
        """Send ``data`` to all subscribers of ``topic``, in this node's name.

        Raises:
            ValueError: ``data`` has more than 64 KiB, which no peer would take.
        """
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message has at most {MAX_MESSAGE_BYTES} bytes, not {len(data)}")
        await self._pubsub.publish(topic, data)

    def say_hello(self) -> None:
        """Repeat this node's subscriptions to all peers."""
        self._pubsub.say_hello()

    async def run_forever(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; ended at once, before the host closes its connections."""
        await self._pubsub.serve_forever(task_status=task_status)
