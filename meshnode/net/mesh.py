"""The one interface between this program and a network of peers.

Two implementations stand behind it, the real one (``net/libp2p``) and an in-process one whose
links can be cut and delayed (``net/memory_mesh.py``); one conformance suite runs over both.
Nothing here knows libp2p: peers are peer-ID strings, addresses are multiaddr strings, streams
are ``MeshStream``. All times are seconds on ``trio.current_time()``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import trio


class ByteStream(Protocol):
    """Bytes both ways, each way closed by itself; the end and a cut are never confused."""

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return 1 to ``max_bytes`` bytes, or ``b""`` at the other side's clean end.

        Raises:
            StreamReset: the other side reset the stream.
            LinkLost: a kind of StreamReset: the link to the peer died under the stream.
            StreamClosed: this side already closed or reset the stream.
        """

    async def send_all(self, data: bytes) -> None:
        """Send all of ``data``, waiting as long as the reader needs.

        Cancelling leaves the stream usable only for ``reset``: it is unknown how much was sent.

        Raises:
            StreamReset, LinkLost: as ``receive_some``.
            StreamClosed: this side already closed, half-closed or reset the stream.
        """

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; receiving goes on. Twice is once."""

    async def aclose(self) -> None:
        """End the sending side cleanly and let go of the receiving one. Never raises MeshError."""

    def reset(self) -> None:
        """Abort both ways at once, so that the other side sees a cut. Never waits or raises."""


class MeshStream(ByteStream, Protocol):
    """A byte stream to a proven member."""

    async def send_soon(self, data: bytes) -> None:
        """As ``send_all``, for what nobody waits for: it may leave some milliseconds later, in
        one piece with what is sent next on this stream.
        """

    @property
    def peer_id(self) -> str: ...

    @property
    def protocol_id(self) -> str: ...


class Verdict(Enum):
    """What a topic's listener says of one message."""

    ACCEPT = "accept"  # deliver, and forward to others
    IGNORE = "ignore"  # drop quietly: stale or already known
    REJECT = "reject"  # drop: malformed or forged


class LinkState(Enum):
    """What happened to the link to one peer."""

    UP = "up"  # first live connection to a proven member
    DOWN = "down"  # the last connection to it ended
    REFUSED = "refused"  # membership failed: wrong token, theirs or ours


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """One change of one link, told synchronously to every watcher."""

    state: LinkState
    peer_id: str
    reason: str  # short words for people, e.g. "closed by peer", "ping timed out"
    addr: str | None = None  # the remote multiaddr, without /p2p/, where known
    dialled: bool = False  # True if this side made the connection


@dataclass(frozen=True, slots=True)
class Link:
    """One live connection to a proven member."""

    peer_id: str
    addr: str | None  # the remote multiaddr, without /p2p/, where known
    dialled: bool  # True if this side made the connection
    since: float  # trio.current_time() when it became a member's
    last_received: float  # trio.current_time() of the last bytes from it
    rtt: float | None  # seconds, the last ping's; None before the first
    via: str | None = None  # the peer ID of the relay between; None where the link is direct


StreamHandler = Callable[[MeshStream], Awaitable[None]]
# (signer's peer ID, payload) -> verdict. Synchronous: it decides and records in one step.
MessageListener = Callable[[str, bytes], Verdict]
LinkWatcher = Callable[[LinkEvent], None]


class Mesh(Protocol):
    """A network of proven members as one node sees it.

    ``serve``, ``subscribe`` and ``watch_links`` are called before ``run_forever``.
    """

    @property
    def peer_id(self) -> str:
        """This node's peer ID."""

    @property
    def addrs(self) -> tuple[str, ...]:
        """Dialable multiaddrs, each ending in ``/p2p/<peer_id>``; empty before it runs."""

    async def run_forever(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; then close every link within 3 s and free the port.

        Raises:
            ListenFailed: an address can't be bound (before ``task_status.started``).
        """

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        """Answer streams of ``protocol_id`` from members with ``handler``.

        The stream is reset if the handler raises, and closed when it returns.
        """

    def subscribe(self, topic: str, listener: MessageListener) -> None:
        """Hear every message on ``topic`` once, own ones excluded."""

    def watch_links(self, watcher: LinkWatcher) -> None:
        """Tell ``watcher`` of every change of a link."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Send ``data`` to all subscribers of ``topic``, in this node's name."""

    async def dial(self, addr: str, *, timeout: float, patience: float = 0.0) -> str:
        """Connect to a multiaddr that ends in ``/p2p/<peer ID>``; return the proven peer ID.

        Args:
            timeout: seconds, for all of it.
            patience: seconds from where the connection was taken; what is later of both counts.

        Returns at once if a live link to that peer exists already, unless that one is relayed and
        ``addr`` is not: a direct link replaces it, and what runs on the old one is finished there.

        Raises:
            PeerUnreachable: nobody answered there in time, or not with that peer ID.
            PeerLate: of these, who took the connection and gave no answer in time.
            TokenRefused: membership failed.
            ConfigError: ``addr`` is no such multiaddr.
        """

    async def open_stream(self, peer_id: str, protocol_id: str, *, timeout: float) -> MeshStream:
        """Open a stream to a peer with a live link.

        Raises:
            PeerUnreachable: no live link, it died, or no answer in time.
            PeerRefused: the peer does not serve ``protocol_id``, or is at its limit of streams.
        """

    async def begin_stream(self, peer_id: str, protocol_id: str) -> MeshStream:
        """Open a stream without waiting for the peer's word on it, which the first read brings.

        That read also raises PeerRefused: the peer does not serve ``protocol_id``, and what was
        sent reached nobody; and PeerUnreachable: the stream ended before the word came, and
        nobody knows whom it reached.

        Raises:
            PeerUnreachable: no live link, or it died.
            PeerRefused: the link is at its limit of streams.
        """

    async def ping(self, peer_id: str, *, timeout: float) -> float:
        """Return one round trip to ``peer_id`` in seconds.

        Raises:
            PeerUnreachable: no live link, or no answer in time.
        """

    async def disconnect(self, peer_id: str, reason: str) -> None:
        """Close every connection to ``peer_id``, if any."""

    def links(self) -> tuple[Link, ...]:
        """Return one Link for each proven member connected now."""

    def link_to(self, peer_id: str) -> Link | None:
        """Return the link to one member, if it is connected now; cheaper than all of them."""

    def seal(self, payload: bytes) -> bytes:
        """Return ``payload`` in an envelope signed with this node's key."""

    def open_sealed(self, envelope: bytes) -> tuple[str, bytes]:
        """Return (signer's peer ID, payload) of an envelope.

        Raises:
            WireError: code ``bad_envelope``: not an envelope, of another type, or ill signed.
        """
