"""What one running node says of itself: the view behind its control API.

It reads the parts that node.py built and changes none of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import get_args

import trio
from prometheus_client import CollectorRegistry

from meshnode import __version__
from meshnode.config import Config
from meshnode.core.explain_request import ExplainRequest
from meshnode.core.ledger import EntryState, LedgerEntry
from meshnode.core.model_index import model_key
from meshnode.core.model_router import ModelRequest
from meshnode.errors import NoSuchPeer, PeerUnreachable
from meshnode.gpu.monitor import GpuMonitor
from meshnode.http import localai, views
from meshnode.http.events import Feed
from meshnode.http.traffic import Traffic
from meshnode.http.unavailable import looks_like_http, refuse
from meshnode.metrics import Metrics
from meshnode.net.drain import Drain
from meshnode.net.federation_entry import EntryPoint, EntrySettings, choose_service
from meshnode.net.forwards import Carrier, Forwards
from meshnode.net.member import Member
from meshnode.net.mesh import Mesh

# Below what a client of the control API waits for an answer.
_PING_LIMIT = 4.0  # seconds
# What a page shows at most; the command line shows more. Those online and near come first.
_LIVE_PEERS = 500
_LIVE_DECISIONS = 12
_LIVE_CANDIDATES = 8
_MODELS_SHOWN = 50  # as metric labels; a mesh may have more models than a scrape should
_STATES = get_args(EntryState)


class LiveView:
    """The live answers of one node; ``http.control_api.NodeView`` says what they are.

    ``started_at``, ``proxy`` and ``api`` are set by the node once it has bound them.
    """

    def __init__(
        self,
        config: Config,
        *,
        network: str,
        fingerprint: str,
        member: Member,
        mesh: Mesh,
        gpu: GpuMonitor,
        metrics: Metrics,
    ) -> None:
        self.started_at = 0.0  # seconds on this node's monotonic clock
        self.proxy: str | None = None  # host:port
        self.api = ""  # host:port
        self.drain_state: Drain  # set by the node once it has one
        self._config = config
        self._network = network
        self._fingerprint = fingerprint
        self._member = member
        self._mesh = mesh
        self._gpu = gpu
        self._metrics = metrics
        self.token_text = config.token_text  # changes while a token is rotated
        self._traffic = Traffic((metrics.requests, metrics.tunnels), metrics.request_ttft_seconds)
        self.forwards = Forwards(member.ledger, carrier=self._carrier)
        self.feed = Feed(self)

    async def watch_forever(self) -> None:
        """Keep the last ten minutes, and tell the pages that look on, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._traffic.sample_forever)
            nursery.start_soon(self.feed.run_forever)

    def choose_service(self) -> str:
        """Return the service that requests get when they name none.

        Raises:
            NoCandidate: none is configured, and not exactly one is on offer.
        """
        offered = self._member.ledger.services_online(trio.current_time())
        return choose_service(self._config.service, offered)

    def status(self) -> dict[str, object]:
        now = trio.current_time()
        gpu = self._gpu.latest
        config = self._config
        offered = self._member.ledger.services_online(now)
        only = offered[0] if len(offered) == 1 else None
        return views.status_view(
            views.NodeStatus(
                peer_id=self._mesh.peer_id,
                name=config.name,
                version=__version__,
                network=self._network,
                fingerprint=self._fingerprint,
                is_open=config.open,
                state=self._member.announcer.state,
                uptime=now - self.started_at,
                addrs=self._mesh.addrs,
                proxy=self.proxy,
                api=self.api,
                policy=config.policy,
                service=config.service or (only if self.proxy else None),
                target=config.target,
                available_vram=gpu.available if gpu else None,
                total_vram=gpu.total if gpu else None,
                gpu_count=gpu.count if gpu else None,
                own_in_flight=self._member.router.own_total,
                peers_online=len(self._member.ledger.online(now)),
                peers_known=len(self._member.ledger),
                links=len(self._mesh.links()),
                missing=self.readiness()[1],
                services=self._member.services.announced(),
                reasons=self._member.services.unhealthy(),
            )
        )

    def peers(self) -> dict[str, object]:
        return views.peers_view(
            self._member.ledger.entries(),
            self._member.router,
            self._mesh.links(),
            self_id=self._mesh.peer_id,
            now=trio.current_time(),
        )

    def decisions(self) -> dict[str, object]:
        return views.decisions_view(self._member.router.decisions(), now=trio.current_time())

    # What the page's events tell (http/events.LiveState)

    def live_peers(self) -> tuple[dict[str, Mapping[str, object]], int]:
        return views.live_rows(self.peers(), now=trio.current_time(), limit=_LIVE_PEERS)

    def live_decisions(self) -> list[Mapping[str, object]]:
        now = trio.current_time()
        last = self._member.router.decisions()[:_LIVE_DECISIONS]
        return [views.live_decision(each, now=now, rows=_LIVE_CANDIDATES) for each in last]

    def traffic(self) -> dict[str, object]:
        return self._traffic.view()

    def last_second(self) -> dict[str, object]:
        return self._traffic.latest()

    # LocalAI's endpoints (http/localai.P2PView)

    def p2p_nodes(self) -> list[localai.P2PNode]:
        return localai.nodes(
            self._member.ledger.entries(),
            self.forwards.addresses,
            now=trio.current_time(),
            wall_time=time.time(),
        )

    def token(self) -> str | None:
        return self.token_text

    def _carrier(self, service_id: str, peer_id: str) -> Carrier:
        return EntryPoint(
            self._member.router,
            self._member.upstreams,
            self._member.queue,
            choose_service=lambda: service_id,
            refuse=refuse,
            metrics=self._metrics,
            wall_time=time.time,
            settings=EntrySettings(target=peer_id, may_repeat=looks_like_http),
        )

    # Questions

    def explain(self, service: str | None, target: str | None) -> dict[str, object]:
        now = trio.current_time()
        decision = self._member.router.explain(
            now=now,
            wall_time=time.time(),
            service_id=service or self.choose_service(),
            target=target or self._config.target,
        )
        return views.decision_view(decision, now=now)

    def explain_model(self, asked: ExplainRequest) -> dict[str, object]:
        now = trio.current_time()
        models = self._member.models
        request = ModelRequest(
            now=now,
            model=asked.model,
            prompt=asked.prompt,
            service_id=asked.service_id or self._config.service,
            target=asked.target or self._config.target,
            wall_time=time.time(),
        )
        pressure = models.pressure.of(model_key(asked.model), now)
        return {**views.decision_view(models.explain(request), now=now), "pressure": pressure}

    async def ping(self, peer: str) -> dict[str, object]:
        entry = self._find(peer)
        with trio.move_on_after(_PING_LIMIT):
            await self._member.peering.connect(entry.peer_id, timeout=_PING_LIMIT)
            rtt = await self._mesh.ping(entry.peer_id, timeout=_PING_LIMIT)
            return {
                "peer_id": entry.peer_id,
                "name": entry.node.name,
                "rtt_ms": round(rtt * 1000, 3),
            }
        raise PeerUnreachable(f"{entry.node.name} did not answer within {_PING_LIMIT:g} s")

    def _find(self, peer: str) -> LedgerEntry:
        ledger = self._member.ledger
        found = ledger.get(peer)
        named = [found] if found else [e for e in ledger.entries() if e.node.name == peer]
        if len(named) != 1:
            how_many = f"{len(named)} nodes are" if named else "no node is"
            raise NoSuchPeer(
                f"{how_many} called {peer!r}; see meshnode peers, and give the peer ID"
            )
        if named[0].peer_id == self._mesh.peer_id:
            raise NoSuchPeer(f"{peer!r} is this node itself; see meshnode peers for the others")
        return named[0]

    def drain(self) -> dict[str, object]:
        """Begin to drain, unless that has begun; say what still runs."""
        self.drain_state.wished.set()
        running = self.drain_state.running
        return {
            "state": "draining",
            "served_here": running.served_here,
            "sent_elsewhere": running.sent_elsewhere,
            "grace_s": self.drain_state.grace,
        }

    def readiness(self) -> tuple[bool, list[str]]:
        missing = []
        if self._member.announcer.state != "up":
            missing.append(f"{self._member.announcer.state}: it takes no new requests")
        if not self._member.peering.joined.is_set():
            missing.append("not joined: no bootstrap answered yet")
        missing += [
            f"service {name} is not well: {reason}"
            for name, reason in self._member.services.unhealthy().items()
        ]
        return not missing, missing

    def metrics(self) -> CollectorRegistry:
        now = trio.current_time()
        counts: dict[str, int] = dict.fromkeys(_STATES, 0)
        for entry in self._member.ledger.entries():
            counts[entry.state_at(now)] += 1
        for state, count in counts.items():
            self._metrics.peers.labels(state=state).set(count)
        models = self._member.models
        self._metrics.affinity_blocks_known.set(models.blocks_known)
        self._metrics.affinity_pressure.clear()
        for model, count in models.pressure.highest(now, _MODELS_SHOWN):
            self._metrics.affinity_pressure.labels(model=model).set(count)
        return self._metrics.registry
