"""One member of a mesh: everything that a node does with whichever mesh it is given.

It announces itself and hears the others, keeps the ledger and its links, serves tunnels to its
own services, and opens them to others'. ``meshnode/node.py`` puts it on real sockets with clients
in front; a swarm of tests puts hundreds of it on an in-process mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from meshnode.core import budget
from meshnode.core.belonging import Belonging, Membership
from meshnode.core.known_peers import KnownPeers
from meshnode.core.ledger import Ledger
from meshnode.core.model_router import Affinity, ModelRouter
from meshnode.core.node_data import MAX_ADDRS, NODE_ONLINE_WINDOW, NodeData, State
from meshnode.core.router import Policy, Router
from meshnode.metrics import Metrics
from meshnode.net.affinity import AffinityGossip, affinity_topic
from meshnode.net.dialler import DialLimits
from meshnode.net.ejections import tell_ejection
from meshnode.net.federation_exit import ExitPoint
from meshnode.net.gossip import ANNOUNCE_INTERVAL, Announcer, Hearer, announce_topic
from meshnode.net.lease_queue import QUEUE_LENGTH, QUEUE_TIMEOUT, LeaseQueue
from meshnode.net.ledger_sync import LedgerSync
from meshnode.net.local_services import LocalService, LocalServices
from meshnode.net.loss_reports import LossReports, loss_topic
from meshnode.net.mesh import Mesh
from meshnode.net.peering import Peering
from meshnode.net.rng import Rng
from meshnode.net.upstream import Upstreams


class GpuReading(Protocol):
    """A host's GPU memory; ``meshnode.gpu.GpuMemory`` is one."""

    @property
    def available(self) -> int: ...  # bytes

    @property
    def total(self) -> int: ...  # bytes

    @property
    def count(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemberSettings:
    """What the operator chose for one member."""

    network: str
    name: str
    version: str = ""
    bootstraps: tuple[str, ...] = ()  # multiaddrs that end in /p2p/<peer ID>
    services: tuple[LocalService, ...] = ()
    policy: Policy = "vram"
    relay: bool = False  # whether the mesh given carries connections for others
    affinity: Affinity = "prefix"
    is_gateway: bool = False  # whether it routes clients' requests by their prompts
    prompt_seed: int = 0  # uint64, the network's own: the same prompt hashes otherwise elsewhere
    # Seconds, both; in a large mesh they stretch together (core/budget).
    announce_interval: float = ANNOUNCE_INTERVAL
    online_window: float = NODE_ONLINE_WINDOW
    announce_budget: float = budget.ANNOUNCEMENTS_PER_SECOND  # that a node shall hear at most
    queue_length: int = QUEUE_LENGTH  # requests that may wait while every peer is full
    queue_timeout: float = QUEUE_TIMEOUT  # seconds
    dial_limits: DialLimits | None = None  # shared by the members of one process


class Member:
    """A member, built before its mesh runs.

    Args:
        gpu: this host's newest reading; None while unknown.
        rng: dice for jitter, for whom to dial, and for the "random" policy.
        wall_time: Unix seconds, for display and for the first Seq, so that it rises across
            restarts; a clock set back is made good by what others still relay.
        known: peers of earlier lives, with which it comes back though every bootstrap is gone.
    """

    def __init__(
        self,
        mesh: Mesh,
        settings: MemberSettings,
        *,
        gpu: Callable[[], GpuReading | None],
        rng: Rng,
        metrics: Metrics,
        wall_time: Callable[[], float],
        known: KnownPeers | None = None,
    ) -> None:
        self._mesh = mesh
        self._settings = settings
        self._gpu = gpu
        self._wall_time = wall_time
        self.ledger = Ledger(mesh.peer_id)
        self.router = Router(self.ledger, self_id=mesh.peer_id, policy=settings.policy, rng=rng)
        self.router.on_ejection(partial(tell_ejection, metrics))
        self.models = ModelRouter(
            self.router,
            self.ledger,
            rng=rng,
            affinity=settings.affinity,
            seed=settings.prompt_seed,
        )
        topic = announce_topic(settings.network)
        self.queue = LeaseQueue(
            metrics=metrics, length=settings.queue_length, timeout=settings.queue_timeout
        )
        self.router.watch(lambda _: self.queue.wake())
        self.hearer = Hearer(
            self.ledger, self.router, open_sealed=mesh.open_sealed, metrics=metrics
        )
        pacer = budget.ChangePacer(rng)
        self.announcer = Announcer(
            mesh,
            topic=topic,
            compose=self._compose,
            record_own=self.hearer.record_own,
            rng=rng,
            metrics=metrics,
            start_seq=int(wall_time() * 1000),
            interval=self._announce_interval,
            pacer=(pacer, lambda: self.ledger.online_count),
        )
        self.hearer.on_heard = pacer.heard
        self.hearer.on_own_seq = self.announcer.rise_above
        mesh.subscribe(topic, self.hearer.hear)
        sync = LedgerSync(mesh, self.ledger, take_record=self.hearer.take_record, metrics=metrics)
        self.peering = Peering(
            mesh,
            self.ledger,
            sync,
            dial_limits=settings.dial_limits,
            bootstraps=settings.bootstraps,
            forget_load=self.router.forget,
            rng=rng,
            metrics=metrics,
            known=known,
            is_in_use=self._is_in_use,
        )
        self.loss_reports = LossReports(
            mesh,
            self.ledger,
            self.peering.liveness,
            topic=loss_topic(settings.network),
            answer=self.announcer.say_now,
            rng=rng,
            metrics=metrics,
        )
        sync.on_dispute = self.loss_reports.settle
        self.affinity = AffinityGossip(
            mesh,
            self.models,
            topic=affinity_topic(settings.network),
            takes_part=settings.is_gateway and settings.affinity == "prefix",
            rng=rng,
            metrics=metrics,
        )
        self.services = LocalServices(
            settings.services, metrics=metrics, on_change=self.announcer.changed
        )
        self.router.on_use(self.peering.note_use)
        self.services.on_use = self.peering.note_use
        ExitPoint(mesh, self.services, free_vram=self._free_vram, metrics=metrics)
        self.upstreams = Upstreams(mesh, self.router, self.peering, self.services, metrics=metrics)

    def belong(self, membership: Membership) -> None:
        """Hear only from peers that are not kept out, from now on and after each change."""
        self.hearer.objection = lambda peer_id: membership.now.objection(peer_id)
        membership.watch(lambda: self._part_with_strangers(membership.now))

    def _part_with_strangers(self, belonging: Belonging) -> None:
        for entry in self.ledger.entries():
            why = belonging.objection(entry.peer_id)
            if why is not None and entry.peer_id != self._mesh.peer_id:
                self.peering.part_with(entry.peer_id, why)

    async def run_forever(self) -> None:
        """Announce, hear and keep links until cancelled. Start it once the mesh runs.

        Raises:
            TokenRefused: no link ever stood, and every bootstrap refused the token.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.announcer.announce_forever)
            nursery.start_soon(self.hearer.expire_forever)
            nursery.start_soon(self.services.check_health_forever)
            nursery.start_soon(self.upstreams.sweep_forever)
            nursery.start_soon(self.loss_reports.run_forever)
            nursery.start_soon(self.affinity.share_forever)
            nursery.start_soon(self.peering.run_forever)

    def _is_in_use(self, peer_id: str) -> bool:
        return self.router.own_in_flight(peer_id) > 0 or self.services.is_used_by(peer_id)

    def _compose(self, seq: int, state: State) -> NodeData:
        gpu = self._gpu()
        settings = self._settings
        return NodeData(
            id=self._mesh.peer_id,
            name=settings.name,
            service_id=settings.services[0].service_id if settings.services else "",
            last_seen=int(self._wall_time() * 1000),
            available_vram=gpu.available if gpu else 0,
            total_vram=gpu.total if gpu else 0,
            gpu_count=gpu.count if gpu else 0,
            services=self.services.announced(),
            addrs=self._mesh.addrs[:MAX_ADDRS],
            seq=seq,
            state=state,
            online_window=round(self._online_window()),
            version=settings.version,
            relay=settings.relay,
        )

    def _announce_interval(self) -> float:
        nodes = len(self.ledger.online(trio.current_time()))
        settings = self._settings
        return budget.announce_interval(nodes, settings.announce_interval, settings.announce_budget)

    def _online_window(self) -> float:
        settings = self._settings
        return budget.online_window(
            self._announce_interval(), settings.announce_interval, settings.online_window
        )

    def _free_vram(self) -> int | None:
        gpu = self._gpu()
        return gpu.available if gpu else None
