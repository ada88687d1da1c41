"""Who can reach whom in a swarm on the memory mesh: cuts, partitions, stopped nodes.

Each of these is kept by itself, and what is cut follows from all of them: healing a partition does
not wake a stopped node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from meshnode.net.memory_mesh import MemoryMesh, MemoryNetwork

Pair = frozenset[int]


class Weather:
    """The cuts of one swarm; nodes are their numbers."""

    def __init__(self, network: MemoryNetwork | None) -> None:
        self._network = network
        self._meshes: dict[int, MemoryMesh] = {}
        self._cuts: set[Pair] = set()
        self._groups: list[frozenset[int]] = []
        self._frozen: set[int] = set()
        self._applied: set[Pair] = set()
        self._others: dict[int, set[int]] = {}  # each node's other sides of its cuts

    def add(self, number: int, mesh: MemoryMesh) -> None:
        self._meshes[number] = mesh
        self._apply()

    def cut(self, a: int, b: int) -> None:
        self._cuts.add(frozenset((a, b)))
        self._apply()

    def partition(self, groups: Sequence[Collection[int]]) -> None:
        """Part the nodes into ``groups``; who is in none is a group of the rest."""
        self._groups = [frozenset(group) for group in groups]
        rest = frozenset(self._meshes).difference(*self._groups)
        if rest:
            self._groups.append(rest)
        self._apply()

    def heal(self) -> None:
        self._cuts.clear()
        self._groups.clear()
        self._apply()

    def freeze(self, number: int) -> None:
        self._frozen.add(number)
        self._apply()

    def thaw(self, number: int) -> None:
        self._frozen.discard(number)
        self._apply()

    def is_cut(self, a: int, b: int) -> bool:
        return b in self._others.get(a, ())

    def reachable(self, start: int, live: Iterable[int]) -> set[int]:
        """Return the live nodes that news from ``start`` can come to, over others too."""
        unreached = set(live) - {start}
        reached, fresh = {start}, [start]
        while fresh:
            neighbours = unreached - self._others.get(fresh.pop(), set())
            unreached -= neighbours
            reached |= neighbours
            fresh += neighbours
        return reached

    def _apply(self) -> None:
        if self._network is None:
            return
        wanted = self._wanted()
        if not self._applied <= wanted:
            self._network.heal_all()
        for pair in wanted:
            a, b = pair
            self._network.cut(self._meshes[a], self._meshes[b])
        self._applied = wanted
        self._others = {number: set() for number in self._meshes}
        for pair in wanted:
            a, b = pair
            self._others[a].add(b)
            self._others[b].add(a)

    def _wanted(self) -> set[Pair]:
        wanted = set(self._cuts)
        for number in self._frozen:
            wanted |= {frozenset((number, other)) for other in self._meshes if other != number}
        for position, group in enumerate(self._groups):
            for others in self._groups[position + 1 :]:
                wanted |= {frozenset((a, b)) for a in group for b in others}
        return wanted
