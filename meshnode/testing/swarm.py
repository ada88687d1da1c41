"""Many nodes in one process, to be killed, cut, stopped and restarted; public, for tests.

On the memory mesh under trio's mock clock an hour passes in seconds, and the same seed plays the
same game again. On libp2p the same nodes stand on real sockets, and time is real.

    async with open_swarm(20, seed=1) as swarm:
        await swarm.wait_converged(within=10)
        swarm.kill(7)
        print(await swarm.wait_gone(7, within=5))  # seconds, for each of the nineteen others
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Literal, TypeAlias

import trio

from meshnode.core import budget
from meshnode.core.node_data import NODE_ONLINE_WINDOW
from meshnode.errors import ConfigError
from meshnode.metrics import Metrics
from meshnode.net.gossip import ANNOUNCE_INTERVAL
from meshnode.net.member import Member, MemberSettings
from meshnode.net.memory_mesh import MemoryMesh, MemoryNetwork
from meshnode.net.mesh import Mesh
from meshnode.testing.determinism import repeatable_scheduling
from meshnode.testing.freezing import FreezeInstrument
from meshnode.testing.one_process import OneProcess, OpenedEnvelopes, seldom_collecting
from meshnode.testing.swarm_node import PretendedGpu, SwarmNode
from meshnode.testing.swarm_watch import LATE_NEWS, Convergence, LossKind, Watch
from meshnode.testing.swarm_weather import Weather

MeshKind: TypeAlias = Literal["memory", "libp2p"]

GIB = 2**30
# What is found in racks and under desks; each node pretends one of them, partly free.
VRAM_SIZES = tuple(size * GIB for size in (8, 12, 16, 24, 32, 48, 80))  # bytes
_NETWORK = "swarm"
_KEY = b"the key of a swarm: no secret..."
# Where a swarm's wall clock stands at first under a virtual clock; any fixed moment will do.
_EPOCH = 1_800_000_000.0  # Unix seconds
_POLL = 0.05  # seconds
# Closing all of a large mesh at once goes deeper than Python's stack.
_CLOSE_AT_ONCE = 10


@asynccontextmanager
async def open_swarm(
    n: int,
    *,
    mesh: MeshKind = "memory",
    seed: int = 0,
    vram: Sequence[int] | None = None,
    announce_interval: float = ANNOUNCE_INTERVAL,
    online_window: float = NODE_ONLINE_WINDOW,
    loss: float = 0.0,
) -> AsyncIterator[Swarm]:
    """Run ``n`` nodes, each of which knows node 0 alone at first; close them at the end.

    Args:
        n: how many; 0 is the bootstrap of the others.
        mesh: "memory", with links that can be cut, or "libp2p", on loopback.
        seed: of all dice. On the memory mesh under ``trio.testing.MockClock`` everything
            follows from it.
        vram: GPU memory in bytes that the nodes pretend, in turn; half to all of it free.
        announce_interval, online_window: seconds, as of ``meshnode up``; on libp2p longer where
            one process could not hear so many.
        loss: share of announcements lost on each link; memory mesh only.

    Raises:
        ConfigError: the settings don't hold.
    """
    if n < 1:
        raise ConfigError(f"n={n}: a swarm needs at least one node")
    if not 0.0 <= loss < 1.0:
        raise ConfigError(f"loss={loss:g}: give a share of announcements, from 0 to below 1")
    swarm = Swarm(
        mesh,
        n,
        random.Random(seed),
        vram=tuple(vram or VRAM_SIZES),
        announce_interval=announce_interval,
        online_window=online_window,
        loss=loss,
    )
    with _on_a_leash(seed) if mesh == "memory" else seldom_collecting():
        async with trio.open_nursery() as guard:
            await guard.start(swarm.host_forever)
            try:
                yield swarm
            finally:
                swarm.close()


@contextmanager
def _on_a_leash(seed: int) -> Iterator[None]:
    """Make this run's tasks repeatable, and those of nodes stoppable."""
    instrument = FreezeInstrument()
    with repeatable_scheduling(seed):
        trio.lowlevel.add_instrument(instrument)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(instrument)


class Swarm:
    """A running swarm; ``open_swarm`` makes one. Nodes are named by their numbers, from 0.

    Attributes:
        nodes: all of them, dead ones too.
        watch: who was found dead how soon, and who was taken for dead wrongly.
        announce_budget: announcements per second that each node shall hear at most; on real sockets
            less than elsewhere in a large swarm, so that one process can hear them all.
    """

    def __init__(
        self,
        mesh: MeshKind,
        n: int,
        rng: random.Random,
        *,
        vram: Sequence[int],
        announce_interval: float,
        online_window: float,
        loss: float,
    ) -> None:
        self.mesh: MeshKind = mesh
        self.nodes: list[SwarmNode] = []
        self.watch = Watch(self._excuse)
        self.began_at = 0.0
        self.rng = rng  # also for who is chosen by a script
        self._n = n
        self._vram = vram
        self._process = OneProcess(n) if mesh == "libp2p" else None
        self.announce_budget = budget.ANNOUNCEMENTS_PER_SECOND
        stretch = 1.0
        if self._process is not None:
            self.announce_budget = self._process.announce_budget
            stretch = self._process.stretch(announce_interval)
        self._settings = partial(
            MemberSettings,
            network=_NETWORK,
            announce_interval=announce_interval * stretch,
            online_window=online_window * stretch,
            announce_budget=self.announce_budget,
            dial_limits=self._process.dial_limits if self._process else None,
        )
        self._network: MemoryNetwork | None = None
        if mesh == "memory":
            self._network = MemoryNetwork(random.Random(rng.random()))
            self._network.loss = loss
        elif loss:
            raise ConfigError("loss needs mesh=memory: sockets of one machine lose nothing")
        self._opened = OpenedEnvelopes()
        self._weather = Weather(self._network)
        self._numbers: dict[str, int] = {}  # by peer ID
        self._closing = trio.Event()
        self._nursery: trio.Nursery

    # Running

    async def host_forever(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run the nodes until ``close``; a cancel from outside has to go through it as well."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as self._nursery:
                self.began_at = trio.current_time()
                nodes = [self._make_node(number) for number in range(self._n)]
                await self._start(nodes[0])
                async with trio.open_nursery() as starting:
                    for node in nodes[1:]:
                        starting.start_soon(self._start, node)
                task_status.started()
                await self._closing.wait()
                await self._end_all()

    def close(self) -> None:
        self._closing.set()

    async def _end_all(self) -> None:
        for node in self.nodes:
            node.is_alive = False  # what the others make of it is no longer the mesh's doing
        for first in range(0, len(self.nodes), _CLOSE_AT_ONCE):
            batch = self.nodes[first : first + _CLOSE_AT_ONCE]
            for node in batch:
                node.gate.thaw()
                node.scope.cancel()
            for node in batch:
                await node.ended.wait()

    def _make_node(self, number: int) -> SwarmNode:
        total = self._vram[number % len(self._vram)]
        free = round(total * self.rng.uniform(0.5, 1.0))
        gpu = PretendedGpu(free, total)
        node = SwarmNode(number, f"node-{number}", gpu, random.Random(self.rng.random()))
        self.nodes.append(node)
        return node

    async def _start(self, node: SwarmNode) -> None:
        mesh = self._make_mesh(node)
        self._numbers[mesh.peer_id] = node.number
        node.begin_life(mesh, partial(self._make_member, node), self._opened)
        node.ledger.watch(partial(self._on_change, node, node.lives))
        if isinstance(mesh, MemoryMesh):
            self._weather.add(node.number, mesh)
        with node.gate.guarding():
            await self._nursery.start(node.run)

    def _make_mesh(self, node: SwarmNode) -> Mesh:
        if self._network is not None:
            return self._network.node(node.name, keys=(_KEY,))
        assert self._process is not None
        return self._process.mesh(
            identity_seed=random.Random(f"{id(self)} {node.name}").randbytes(32),
            listen=node.addr.partition("/p2p/")[0] or "/ip4/127.0.0.1/tcp/0",
            key=_KEY,
        )

    def _make_member(self, node: SwarmNode, mesh: Mesh, metrics: Metrics) -> Member:
        bootstraps = (self.nodes[0].addr,) if node.number else ()
        return Member(
            mesh,
            self._settings(name=node.name, bootstraps=bootstraps),
            gpu=lambda: node.gpu,
            rng=node.rng,
            metrics=metrics,
            wall_time=lambda: self.wall_time() + node.clock_offset,
            known=node.known,
        )

    def wall_time(self) -> float:
        """Return Unix seconds; on the memory mesh they pass as the swarm's clock does."""
        return time.time() if self.mesh == "libp2p" else _EPOCH + self.now()

    def now(self) -> float:
        """Return seconds since the swarm began, on trio's clock."""
        return trio.current_time() - self.began_at

    # What happens to nodes

    def kill(self, number: int) -> None:
        """End a node at once, without a goodbye: its connections close, as after kill -9."""
        node = self._living(number)
        self._bury(node, leaving=False)
        if node.is_frozen:
            self.thaw(number)
        node.scope.cancel()

    async def stop(self, number: int) -> None:
        """End a node as SIGTERM does: it says that it leaves, then closes."""
        node = self._living(number)
        self._bury(node, leaving=True)
        await node.member.announcer.say_leaving()
        node.scope.cancel()
        await node.ended.wait()

    async def restart(self, number: int, *, clock_offset: float | None = None) -> None:
        """Run a node anew, with its identity and address and an empty ledger; kill it first.

        Args:
            clock_offset: seconds by which its wall clock is ahead from now on.
        """
        node = self.nodes[number]
        if node.is_alive:
            self.kill(number)
        await node.ended.wait()
        if clock_offset is not None:
            node.clock_offset = clock_offset
        self.watch.returned(number)
        await self._start(node)

    def skew(self, number: int, seconds: float) -> None:
        """Set a node's wall clock ``seconds`` ahead of the others', or behind."""
        self.nodes[number].clock_offset = seconds

    def freeze(self, number: int) -> None:
        """Stop a node where it stands, as SIGSTOP does; memory mesh only."""
        self._needs_memory_mesh("freeze")
        node = self._living(number)
        node.is_frozen = True
        node.gate.freeze()
        self._weather.freeze(number)

    def thaw(self, number: int) -> None:
        """Let a stopped node go on."""
        node = self._living(number) if self.nodes[number].is_alive else self.nodes[number]
        node.is_frozen = False
        self._weather.thaw(number)
        node.gate.thaw()

    def cut(self, a: int, b: int) -> None:
        """Let nothing through between two nodes, silently; memory mesh only."""
        self._needs_memory_mesh("cut")
        self._weather.cut(a, b)

    def partition(self, groups: Sequence[Collection[int]]) -> None:
        """Let nothing through between groups of nodes, silently; memory mesh only.

        Nodes in none of the groups are one more group.
        """
        self._needs_memory_mesh("partition")
        self._weather.partition(groups)

    def heal(self) -> None:
        """Undo every cut and partition."""
        self._weather.heal()

    def _bury(self, node: SwarmNode, *, leaving: bool) -> None:
        observers = {
            other.number
            for other in self.living()
            if other is not node
            and node.number in other.online
            and not other.is_frozen
            and not self._weather.is_cut(other.number, node.number)
        }
        node.is_alive = False
        node.last_died_at = trio.current_time()
        self.watch.died(node.number, self.now(), observers, leaving=leaving)

    def _living(self, number: int) -> SwarmNode:
        node = self.nodes[number]
        if not node.is_alive:
            raise ConfigError(f"node {number} of this swarm is not running")
        return node

    def _needs_memory_mesh(self, what: str) -> None:
        if self._network is None:
            raise ConfigError(
                f"{what} needs mesh=memory: links on real sockets can't be cut from within; "
                "use network namespaces, or signals to real processes"
            )

    # What is seen

    def living(self) -> list[SwarmNode]:
        return [node for node in self.nodes if node.is_alive]

    def awry(self) -> list[int]:
        """Return the living nodes whose ledger is not exactly who lives and can be reached."""
        expected: dict[int, set[int]] = {}
        living = {node.number for node in self.living()}
        awake = [node for node in self.living() if not node.is_frozen]
        for node in awake:
            if node.number not in expected:
                group = self._weather.reachable(node.number, living)
                expected.update(dict.fromkeys(group, group))
        return [node.number for node in awake if node.online != expected[node.number]]

    async def wait_converged(self, within: float, *, label: str = "start") -> float:
        """Wait until every living node has exactly the reachable living ones online.

        Returns:
            The seconds that it took from now.

        Raises:
            TimeoutError: it was not so within ``within`` seconds; says who is missing whom.
        """
        convergence = await self.measure_convergence(within, label=label)
        if not convergence.complete:
            raise TimeoutError(f"no convergence within {within:g} s: {self._describe_awry()}")
        return max(convergence.after.values(), default=0.0)

    async def measure_convergence(self, within: float, *, label: str) -> Convergence:
        """Do as ``wait_converged``, and return how it went either way."""
        began = trio.current_time()
        after: dict[int, float] = {}
        while True:
            awry = set(self.awry())
            passed = trio.current_time() - began
            for number in [node.number for node in self.living() if not node.is_frozen]:
                if number in awry:
                    after.pop(number, None)
                else:
                    after.setdefault(number, passed)
            if not awry or passed >= within:
                break
            await trio.sleep(_POLL)
        convergence = Convergence(label, began - self.began_at, not awry, after)
        self.watch.convergences.append(convergence)
        return convergence

    async def wait_gone(self, number: int, within: float) -> dict[int, float]:
        """Wait until every survivor has noticed that a node is dead.

        Returns:
            Seconds from its death, by survivor.

        Raises:
            TimeoutError: somebody has not within ``within`` seconds of the call.
        """
        death = self.watch.death_of(number)
        if death is None:
            raise ConfigError(f"node {number} of this swarm has not died")
        deadline = trio.current_time() + within
        while death.waiting:
            if trio.current_time() >= deadline:
                blind = sorted(death.waiting)
                raise TimeoutError(f"after {within:g} s {blind} still have node {number} online")
            await trio.sleep(_POLL / 5)
        return dict(death.detected_after)

    async def wait_linked(self, links: int, within: float) -> float:
        """Wait until every living node has ``links`` connections; return the seconds it took.

        Raises:
            TimeoutError: some node has fewer after ``within`` seconds.
        """
        began = trio.current_time()
        while any(node.links() < links for node in self.living()):
            if trio.current_time() - began >= within:
                few = {n.number: n.links() for n in self.living() if n.links() < links}
                raise TimeoutError(f"after {within:g} s links by node are still {few}")
            await trio.sleep(_POLL)
        return trio.current_time() - began

    def choose(self, count: int, among: Iterable[int] | None = None) -> list[int]:
        """Return ``count`` numbers thrown by the swarm's dice; living ones but the bootstrap."""
        pool = sorted(among) if among is not None else [n.number for n in self.living()][1:]
        return sorted(self.rng.sample(pool, min(count, len(pool))))

    def _describe_awry(self) -> str:
        awry = self.awry()
        first = self.nodes[awry[0]] if awry else None
        if first is None:
            return "it came about just now"
        living = {node.number for node in self.living()}
        expected = self._weather.reachable(first.number, living)
        return (
            f"{len(awry)} of {len(living)} ledgers are awry; node {first.number} misses "
            f"{sorted(expected - first.online)} and still has {sorted(first.online - expected)}"
        )

    def _on_change(self, node: SwarmNode, life: int, peer_id: str) -> None:
        number = self._numbers.get(peer_id)
        if number is None or life != node.lives or not node.is_alive:
            return
        entry = node.ledger.get(peer_id)
        if entry is not None and entry.is_online_at(trio.current_time()):
            node.online.add(number)
        elif number in node.online:
            node.online.discard(number)
            reason = (entry.down_reason or entry.state) if entry is not None else "forgotten"
            self.watch.lost(node.number, number, self.now(), reason)

    def _excuse(self, observer: int, target: int, now: float) -> LossKind | None:
        node = self.nodes[target]
        if self.nodes[observer].is_frozen or node.is_frozen:
            return "frozen"
        if self._weather.is_cut(observer, target):
            return "cut"
        if trio.current_time() - node.last_died_at < LATE_NEWS:
            return "late"
        return None
