from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol

import pytest
import trio

from meshnode.core.belonging import by_keys
from meshnode.core.known_peers import KnownPeers
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, State
from meshnode.core.router import Router
from meshnode.errors import TokenRefused
from meshnode.metrics import Metrics
from meshnode.net.ejections import tell_ejection
from meshnode.net.federation_entry import EntryPoint, EntrySettings, Refusal, Refuse, choose_service
from meshnode.net.federation_exit import ExitPoint
from meshnode.net.gossip import Announcer, Hearer, announce_topic
from meshnode.net.lease_queue import LeaseQueue
from meshnode.net.ledger_sync import LedgerSync
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import ephemeral_identity
from meshnode.net.local_services import LocalService, LocalServices
from meshnode.net.memory_mesh import MemoryMesh, MemoryNetwork
from meshnode.net.mesh import Mesh
from meshnode.net.parting import DEFAULT_TARGETS, LinkTargets
from meshnode.net.peering import Peering
from meshnode.net.upstream import Upstreams

KEY = b"k" * 32
TOPIC = announce_topic("test")


class Node:
    """Every part of this room around one mesh, as a real node composes them."""

    def __init__(
        self,
        mesh: Mesh,
        name: str,
        *,
        bootstraps: Sequence[str] = (),
        services: Sequence[LocalService] = (),
        vram: int = 0,
        start_seq: int = 1,
        known: KnownPeers | None = None,
        targets: LinkTargets = DEFAULT_TARGETS,
        queue: dict[str, float] | None = None,
    ) -> None:
        rng = random.Random(name)
        self.mesh = mesh
        self.name = name
        self.vram = vram
        self.metrics = Metrics()
        self.failure: TokenRefused | None = None
        self.scope = trio.CancelScope()
        self.refused: list[str] = []  # why clients were turned away
        self.ledger = Ledger(mesh.peer_id)
        self.router = Router(self.ledger, self_id=mesh.peer_id, policy="vram", rng=rng)
        self.queue = LeaseQueue(metrics=self.metrics, **(queue or {}))  # type: ignore[arg-type]
        self.router.watch(lambda _: self.queue.wake())
        self.router.on_ejection(partial(tell_ejection, self.metrics))
        self.services = LocalServices(services, metrics=self.metrics)
        self.hearer = Hearer(
            self.ledger, self.router, open_sealed=mesh.open_sealed, metrics=self.metrics
        )
        self.announcer = Announcer(
            mesh,
            topic=TOPIC,
            compose=self.compose,
            record_own=self.hearer.record_own,
            rng=rng,
            metrics=self.metrics,
            start_seq=start_seq,
        )
        self.hearer.on_own_seq = self.announcer.rise_above
        self.services.on_change = self.announcer.changed
        mesh.subscribe(TOPIC, self.hearer.hear)
        self.sync = LedgerSync(
            mesh, self.ledger, take_record=self.hearer.take_record, metrics=self.metrics
        )
        self.peering = Peering(
            mesh,
            self.ledger,
            self.sync,
            bootstraps=bootstraps,
            forget_load=self.router.forget,
            rng=rng,
            metrics=self.metrics,
            known=known,
            is_in_use=self.is_in_use,
            targets=targets,
        )
        self.router.on_use(self.peering.note_use)
        self.services.on_use = self.peering.note_use
        self.exit = ExitPoint(
            mesh, self.services, free_vram=lambda: self.vram, metrics=self.metrics
        )
        self.upstreams = Upstreams(
            mesh, self.router, self.peering, self.services, metrics=self.metrics
        )

    @property
    def peer_id(self) -> str:
        return self.mesh.peer_id

    @property
    def memory_mesh(self) -> MemoryMesh:
        assert isinstance(self.mesh, MemoryMesh)
        return self.mesh

    @property
    def addr(self) -> str:
        """Where it will listen, known before it runs."""
        return f"{self.memory_mesh.transport_addr}/p2p/{self.peer_id}"

    def is_in_use(self, peer_id: str) -> bool:
        return self.router.own_in_flight(peer_id) > 0 or self.services.is_used_by(peer_id)

    def compose(self, seq: int, state: State) -> NodeData:
        return NodeData(
            id=self.peer_id,
            name=self.name,
            services=self.services.announced(),
            available_vram=self.vram,
            addrs=self.mesh.addrs,
            seq=seq,
            state=state,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.mesh.run_forever)
                nursery.start_soon(self.announcer.announce_forever)
                nursery.start_soon(self.hearer.expire_forever)
                nursery.start_soon(self.upstreams.sweep_forever)
                task_status.started()
                try:
                    await self.peering.run_forever()
                except TokenRefused as exc:
                    self.failure = exc
                    nursery.cancel_scope.cancel()

    def kill(self) -> None:
        """End at once, without a goodbye: what kill -9 is to a process."""
        self.scope.cancel()

    def online(self) -> set[str]:
        """Names of the nodes that are online by this node's ledger."""
        return {entry.node.name for entry in self.ledger.online(trio.current_time())}

    def linked(self) -> set[str]:
        return {link.peer_id for link in self.mesh.links()}

    def entry(
        self, settings: EntrySettings | None = None, refuse: Refuse | None = None
    ) -> EntryPoint:
        async def note_refusal(stream: trio.SocketStream, refusal: Refusal) -> None:
            self.refused.append(refusal.reason)
            async with stream:
                async for _ in stream:
                    pass

        return EntryPoint(
            self.router,
            self.upstreams,
            self.queue,
            choose_service=lambda: choose_service(
                None, self.ledger.services_online(trio.current_time())
            ),
            refuse=refuse or note_refusal,
            metrics=self.metrics,
            wall_time=lambda: 0.0,
            settings=settings or EntrySettings(),
        )

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"meshnode_{name}", labels) or 0.0


class MakeNode(Protocol):
    def __call__(self, name: str, *, keys: Sequence[bytes] = ..., **options: object) -> Node: ...


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork(random.Random(1))


@pytest.fixture
def make_node(network: MemoryNetwork) -> MakeNode:
    """Build a whole node on the memory mesh; ``keys`` are its own, the rest goes to Node."""

    def make(name: str, *, keys: Sequence[bytes] = (KEY,), **options: object) -> Node:
        return Node(network.node(name, keys=keys), name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_libp2p_node() -> MakeNode:
    """Build a whole node on real sockets; the options are those of Node."""

    def make(name: str, *, keys: Sequence[bytes] = (KEY,), **options: object) -> Node:
        mesh = Libp2pMesh(
            identity=ephemeral_identity(),
            listen=("/ip4/127.0.0.1/tcp/0",),
            membership=by_keys(tuple(keys)),
            metrics=Metrics(),
        )
        return Node(mesh, name, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
async def start(nursery: trio.Nursery) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Start nodes, and stop them when the test is over."""

    async def start(*nodes: Node) -> None:
        for node in nodes:
            await nursery.start(node.run)

    yield start
    nursery.cancel_scope.cancel()


@pytest.fixture
def wait_until() -> Callable[..., Awaitable[float]]:
    """Wait for a condition on the test's clock; return the seconds that it took."""

    async def wait(condition: Callable[[], bool], *, within: float, step: float = 0.05) -> float:
        start = trio.current_time()
        while not condition():
            assert trio.current_time() - start <= within, f"did not come true within {within} s"
            await trio.sleep(step)
        return trio.current_time() - start

    return wait


@pytest.fixture
def libp2p_meshes() -> Callable[..., AbstractAsyncContextManager[list[Mesh]]]:
    """``async with libp2p_meshes(3, prepare=f) as meshes``: nodes on loopback, all linked.

    ``prepare(mesh)`` runs before each node does, for serve, subscribe and watch_links; ``keys``
    gives one tuple of keys per node; ``linked=False`` leaves the dialling to the test.
    """

    @asynccontextmanager
    async def run(
        count: int,
        *,
        prepare: Callable[[Mesh], None] | None = None,
        keys: tuple[tuple[bytes, ...], ...] | None = None,
        linked: bool = True,
    ) -> AsyncIterator[list[Mesh]]:
        meshes: list[Mesh] = [
            Libp2pMesh(
                identity=ephemeral_identity(),
                listen=("/ip4/127.0.0.1/tcp/0",),
                membership=by_keys(keys[number] if keys else (KEY,)),
                metrics=Metrics(),
            )
            for number in range(count)
        ]
        async with _running(meshes, prepare, linked=linked):
            yield meshes

    return run


@pytest.fixture
def memory_meshes(
    network: MemoryNetwork,
) -> Callable[..., AbstractAsyncContextManager[list[Mesh]]]:
    """The same as ``libp2p_meshes``, in process."""
    names = itertools.count()

    @asynccontextmanager
    async def run(
        count: int,
        *,
        prepare: Callable[[Mesh], None] | None = None,
        keys: tuple[tuple[bytes, ...], ...] | None = None,
        linked: bool = True,
    ) -> AsyncIterator[list[Mesh]]:
        meshes: list[Mesh] = [
            network.node(f"m{next(names)}", keys=keys[number] if keys else (KEY,))
            for number in range(count)
        ]
        async with _running(meshes, prepare, linked=linked):
            yield meshes

    return run


@asynccontextmanager
async def _running(
    meshes: list[Mesh], prepare: Callable[[Mesh], None] | None, *, linked: bool
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for number, mesh in enumerate(meshes):
            if prepare is not None:
                prepare(mesh)
            await nursery.start(mesh.run_forever)
            for earlier in meshes[:number] if linked else ():
                await mesh.dial(earlier.addrs[0], timeout=5)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture(params=["memory", "libp2p"])
def any_node(request: pytest.FixtureRequest) -> MakeNode:
    kind = {"memory": "make_node", "libp2p": "make_libp2p_node"}[request.param]
    return request.getfixturevalue(kind)


@pytest.fixture
def link(start, wait_until):
    """Start nodes and link them, the first with each; wait until the first knows all."""

    async def link(first, *others):
        await start(first, *others)
        for other in others:
            await other.mesh.dial(first.mesh.addrs[0], timeout=5)
        names = {node.name for node in (first, *others)}
        await wait_until(lambda: first.online() == names, within=10)

    return link


@pytest.fixture
def backend(nursery):
    """Serve TCP on loopback with a handler; return the port."""

    async def backend(handler):
        async def guarded(stream):
            async with stream:
                try:
                    await handler(stream)
                except trio.BrokenResourceError:
                    guarded.broken.set()

        guarded.broken = handler_broken = trio.Event()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, guarded, listeners)
        backend.broken = handler_broken
        return listeners[0].socket.getsockname()[1]

    return backend


@pytest.fixture
def proxy(nursery):
    """Put an entry point before a node; return a function that connects a client to it."""

    async def proxy(node, settings=None, refuse=None):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        entry = node.entry(settings, refuse)
        nursery.start_soon(entry.serve_forever, listeners)
        return partial(trio.open_tcp_stream, "127.0.0.1", listeners[0].socket.getsockname()[1])

    return proxy
