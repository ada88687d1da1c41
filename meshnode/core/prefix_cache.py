"""Who last served the beginning of which prompt, so that a warm cache is found again.

One index for all models. A block's hash covers everything before it (``prefix_chain``), so the
tree of a model needs no branches: a flat map from hash to owner says the same. An entry is live
for ``TTL`` seconds; a replica's weight is how much of the model's live tree it owns, where what
was served long ago counts less. Semantics: LocalAI core/services/nodes/prefixcache, but that a
deeper match of somebody who is no candidate does not hide a shallower one of somebody who is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

TTL = 300.0  # seconds; engines drop a cache that nobody used for minutes
HALF_LIFE = 120.0  # seconds
# 16 MB. A conversation adds one to four blocks a turn, so this is some hundred requests a second.
MAX_ENTRIES = 65_536

# A replica: who, and which of its services or copies.
Replica = tuple[str, int | str]
ReplicaT = TypeVar("ReplicaT", bound=Replica)

# How many half-lives the sums of weights may grow before they are scaled down: 2**256 of 2**1023.
_MAX_GROWTH = 256.0


@dataclass(frozen=True, slots=True)
class Verdict(Generic[ReplicaT]):
    """What the index says of one chain."""

    hot: ReplicaT | None
    match_ratio: float
    cold_order: tuple[ReplicaT, ...]  # all candidates, the one with the least cached first


@dataclass(slots=True)
class _Entry(Generic[ReplicaT]):
    owner: ReplicaT
    seen: float  # seconds on this node's clock
    told: float  # when it was last news to all who remember it


@dataclass(slots=True)
class Weight:
    """How much of a model's prompts one replica has cached; totals compare like weights."""

    count: int = 0
    total: float = 0.0  # sum of 2 ** ((seen - epoch) / half_life)


class PrefixIndex(Generic[ReplicaT]):
    """Remembers for each block of each model's prompts the replica that last served it.

    ``now`` is seconds on one monotonic clock and never goes back between calls.
    """

    def __init__(
        self, *, ttl: float = TTL, half_life: float = HALF_LIFE, max_entries: int = MAX_ENTRIES
    ) -> None:
        self._ttl = ttl
        self._half_life = half_life
        self._max_entries = max_entries
        # The longest unseen first; of one path the deepest block first, as it serves the fewest.
        self._entries: OrderedDict[tuple[str, int], _Entry[ReplicaT]] = OrderedDict()
        self._weights: dict[str, dict[ReplicaT, Weight]] = {}
        self._owned: dict[str, int] = {}  # entries, by node; none is 0
        self._epoch = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def observe(
        self, model: str, chain: Sequence[int], owner: ReplicaT, now: float
    ) -> tuple[int, ...]:
        """Record that ``owner`` serves the prompt of ``chain``.

        Returns:
            The blocks that are news: new, in other hands, or so long told that those who were
            told would soon forget them; none if the whole chain was known to be its.
        """
        if not chain:
            return ()
        self.evict(now)
        last = self._entries.get((model, chain[-1]))
        is_known = last is not None and not self._is_news(last, owner, now)
        news = self._record(model, chain, owner, now, is_told=not is_known)
        while len(self._entries) > self._max_entries:
            self._drop(next(iter(self._entries)))
        return news

    def matches(self, model: str, chain: Sequence[int], now: float) -> dict[ReplicaT, int]:
        """Return for each replica how many blocks of the chain it served, the deepest first."""
        depths: dict[ReplicaT, int] = {}
        for depth in range(len(chain), 0, -1):
            entry = self._entries.get((model, chain[depth - 1]))
            if entry is not None and now - entry.seen <= self._ttl:
                depths.setdefault(entry.owner, depth)
        return depths

    def decide(
        self, model: str, chain: Sequence[int], candidates: Collection[ReplicaT], now: float
    ) -> Verdict[ReplicaT]:
        """Return who is warm for the chain, and in which order the others are tried."""
        among = frozenset(candidates)
        depths = self.matches(model, chain, now)
        hot = next((owner for owner in depths if owner in among), None)
        order = sorted(among, key=lambda key: (self.weight(model, key, now), key))
        if hot is None:
            return Verdict(None, 0.0, tuple(order))
        return Verdict(hot, depths[hot] / len(chain), tuple(order))

    def weight(self, model: str, replica: ReplicaT, now: float) -> float:
        """Return the sum of 0.5 ** (age / half_life) over the replica's live blocks."""
        self.evict(now)
        weight = self._weights.get(model, {}).get(replica)
        if weight is None:
            return 0.0
        return float(weight.total * 2.0 ** ((self._epoch - now) / self._half_life))

    def weights(self, model: str, now: float) -> Mapping[ReplicaT, Weight]:
        """Return those that have anything cached of the model."""
        self.evict(now)
        return self._weights.get(model, {})

    def invalidate(self, replica: ReplicaT) -> None:
        """Forget what one replica served."""
        self._drop_all(key for key, entry in self._entries.items() if entry.owner == replica)

    def invalidate_node(self, node_id: str) -> None:
        """Forget what any replica of a node served, as when it left."""
        if node_id in self._owned:  # peers come and go that never served anything
            self._drop_all(key for key, entry in self._entries.items() if entry.owner[0] == node_id)

    def evict(self, now: float) -> None:
        """Drop what has expired; every other call does so by itself."""
        while self._entries:
            key = next(iter(self._entries))
            if now - self._entries[key].seen <= self._ttl:
                return
            self._drop(key)

    def _record(
        self, model: str, chain: Sequence[int], owner: ReplicaT, now: float, *, is_told: bool
    ) -> tuple[int, ...]:
        """Record the blocks; return those that are news, if the chain is told at all."""
        entries = self._entries
        news: list[int] = []
        before: dict[tuple[ReplicaT, float], int] = {}  # as a rule, all were seen at once
        for block in reversed(chain):
            key = (model, block)
            entry = entries.get(key)
            if entry is None:
                entries[key] = _Entry(owner, now, told=now)
                news.append(block)
                continue
            seen_at = (entry.owner, entry.seen)
            before[seen_at] = before.get(seen_at, 0) + 1
            if is_told and self._is_news(entry, owner, now):
                news.append(block)
                entry.told = now
            entries.move_to_end(key)
            entry.owner, entry.seen = owner, now
        # What is added goes first: the row of one that keeps its blocks is not made anew.
        self._weigh(model, owner, len(chain), now)
        for (old_owner, seen), count in before.items():
            self._weigh(model, old_owner, -count, seen)
        news.reverse()
        return tuple(news)

    def _is_news(self, entry: _Entry[ReplicaT], owner: ReplicaT, now: float) -> bool:
        return entry.owner != owner or now - entry.told > self._ttl / 2

    def _drop(self, key: tuple[str, int]) -> None:
        entry = self._entries.pop(key)
        self._weigh(key[0], entry.owner, -1, entry.seen)

    def _drop_all(self, keys: Iterable[tuple[str, int]]) -> None:
        for key in list(keys):
            self._drop(key)

    def _weigh(self, model: str, owner: ReplicaT, change: int, seen: float) -> None:
        if (seen - self._epoch) / self._half_life > _MAX_GROWTH:
            self._scale_down(seen)
        node = owner[0]
        owned = self._owned.get(node, 0) + change
        if owned:
            self._owned[node] = owned
        else:
            del self._owned[node]
        weights = self._weights.get(model)
        if weights is None:
            weights = self._weights[model] = {}
        weight = weights.get(owner)
        if weight is None:
            weight = weights[owner] = Weight()
        weight.count += change
        weight.total += change * 2.0 ** ((seen - self._epoch) / self._half_life)
        if weight.count == 0:  # not by the total, which rounds
            del weights[owner]
            if not weights:
                del self._weights[model]

    def _scale_down(self, epoch: float) -> None:
        factor = 2.0 ** ((self._epoch - epoch) / self._half_life)
        self._epoch = epoch
        for weights in self._weights.values():
            for weight in weights.values():
                weight.total *= factor
