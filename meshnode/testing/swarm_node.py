"""One node of a swarm: its identity outlives its member, as a host outlives its process."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import trio

from meshnode.core.known_peers import KnownPeers
from meshnode.core.ledger import Ledger
from meshnode.metrics import Metrics
from meshnode.net.member import Member
from meshnode.net.memory_mesh import MemoryMesh
from meshnode.net.mesh import Link, LinkWatcher, Mesh, MeshStream, MessageListener, StreamHandler
from meshnode.testing.freezing import FreezeGate
from meshnode.testing.one_process import OpenedEnvelopes


@dataclass(frozen=True, slots=True)
class PretendedGpu:
    """A reading of GPU memory that nobody read."""

    available: int  # bytes
    total: int  # bytes
    count: int = 1


@dataclass(slots=True)
class Traffic:
    """What one node heard and said, over all its lives."""

    sent: int = 0  # announcements
    heard: int = 0  # announcements, each once
    heard_bytes: int = 0
    copies: int | None = None  # the same, as often as they arrived; None where nobody counts
    copied_bytes: int | None = None


class CountedMesh:
    """A mesh whose announcements are counted on the way."""

    def __init__(self, mesh: Mesh, traffic: Traffic, opened: OpenedEnvelopes) -> None:
        self.inner = mesh
        self._opened = opened
        self._traffic = traffic

    @property
    def peer_id(self) -> str:
        return self.inner.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        return self.inner.addrs

    async def run_forever(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await self.inner.run_forever(task_status=task_status)

    def subscribe(self, topic: str, listener: MessageListener) -> None:
        traffic = self._traffic

        def count(signer: str, data: bytes) -> object:
            traffic.heard += 1
            traffic.heard_bytes += len(data)
            return listener(signer, data)

        self.inner.subscribe(topic, count)  # type: ignore[arg-type]

    async def publish(self, topic: str, data: bytes) -> None:
        self._traffic.sent += 1
        await self.inner.publish(topic, data)

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        self.inner.serve(protocol_id, handler)

    def watch_links(self, watcher: LinkWatcher) -> None:
        self.inner.watch_links(watcher)

    async def dial(self, addr: str, *, timeout: float, patience: float = 0.0) -> str:
        return await self.inner.dial(addr, timeout=timeout, patience=patience)

    async def open_stream(self, peer_id: str, protocol_id: str, *, timeout: float) -> MeshStream:
        return await self.inner.open_stream(peer_id, protocol_id, timeout=timeout)

    async def begin_stream(self, peer_id: str, protocol_id: str) -> MeshStream:
        return await self.inner.begin_stream(peer_id, protocol_id)

    async def ping(self, peer_id: str, *, timeout: float) -> float:
        return await self.inner.ping(peer_id, timeout=timeout)

    async def disconnect(self, peer_id: str, reason: str) -> None:
        await self.inner.disconnect(peer_id, reason)

    def links(self) -> tuple[Link, ...]:
        return self.inner.links()

    def link_to(self, peer_id: str) -> Link | None:
        return self.inner.link_to(peer_id)

    def seal(self, payload: bytes) -> bytes:
        return self.inner.seal(payload)

    def open_sealed(self, envelope: bytes) -> tuple[str, bytes]:
        return self._opened.open(envelope, self.inner)


class SwarmNode:
    """One host of a swarm.

    Attributes:
        member: what runs on it, or ran last.
        clock_offset: seconds by which its wall clock is ahead of the swarm's.
        online: numbers of the nodes that its ledger has online, itself included.
    """

    def __init__(self, number: int, name: str, gpu: PretendedGpu, rng: random.Random) -> None:
        self.number = number
        self.name = name
        self.gpu = gpu
        self.rng = rng
        self.member: Member
        self.metrics = Metrics()
        self.mesh: Mesh
        self.addr = ""  # where it listens; the same after a restart
        self.known = KnownPeers()  # what peers.json is on a real host
        self.clock_offset = 0.0
        self.lives = 0
        self.is_alive = False
        self.is_frozen = False
        self.started_at = 0.0
        self.last_died_at = float("-inf")
        self.online: set[int] = set()
        self.traffic = Traffic()
        self.gate = FreezeGate()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    @property
    def peer_id(self) -> str:
        return self.mesh.peer_id

    @property
    def ledger(self) -> Ledger:
        return self.member.ledger

    def set_vram(self, available: int) -> None:
        """Pretend other free GPU memory (bytes) from now on, and say so."""
        self.gpu = PretendedGpu(available, self.gpu.total, self.gpu.count)
        self.member.announcer.changed()

    def begin_life(
        self,
        mesh: Mesh,
        make_member: Callable[[Mesh, Metrics], Member],
        opened: OpenedEnvelopes,
    ) -> None:
        """Put a new member on ``mesh``; nothing runs yet."""
        self.mesh = mesh
        self.metrics = Metrics()
        self.member = make_member(CountedMesh(mesh, self.traffic, opened), self.metrics)
        self.gate = FreezeGate()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.online = set()
        self.lives += 1
        self.is_alive = True

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run this life until ``scope`` is cancelled."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.mesh.run_forever)
                    self.addr = self.mesh.addrs[0]
                    self.started_at = trio.current_time()
                    task_status.started()
                    await self.member.run_forever()
        finally:
            self._keep_counts()
            self.ended.set()

    def links(self) -> int:
        return len(self.mesh.links()) if self.is_alive else 0

    def counted(self) -> Traffic:
        """Return the traffic up to now, this life's included."""
        total = Traffic(
            self.traffic.sent,
            self.traffic.heard,
            self.traffic.heard_bytes,
            self.traffic.copies,
            self.traffic.copied_bytes,
        )
        if isinstance(self.mesh, MemoryMesh) and not self.ended.is_set():
            total.copies = (total.copies or 0) + self.mesh.copies_received
            total.copied_bytes = (total.copied_bytes or 0) + self.mesh.bytes_received
        return total

    def _keep_counts(self) -> None:
        if isinstance(self.mesh, MemoryMesh):
            traffic = self.traffic
            traffic.copies = (traffic.copies or 0) + self.mesh.copies_received
            traffic.copied_bytes = (traffic.copied_bytes or 0) + self.mesh.bytes_received
