"""What this node has to tell of warm caches, and how much of it the mesh has room for.

All entry nodes together shall say no more than ``TOTAL_BYTES`` a second, however many they are,
because every node carries every batch. Each knows the others by their batches and takes an equal
share. One that begins to speak doubles from little, so that many that begin at once have heard of
each other before they are loud.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from meshnode.core.affinity_batch import (
    BLOCK_BYTES,
    MAX_BATCH_BYTES,
    MAX_MODELS,
    MAX_PLACES,
    MAX_RUNS,
    AffinityBatch,
    AffinityPlace,
    AffinityRun,
    pack_blocks,
)
from meshnode.core.model_index import Place
from meshnode.core.model_router import Observed
from meshnode.core.wire import is_sendable

TOTAL_BYTES = 64 * 1024  # a second, from all entry nodes
INTERVAL = 1.0  # seconds between two batches of one node; a turn of a conversation takes longer
# A smaller batch is mostly names. Past 128 speakers each waits until its share is this much.
MIN_BATCH_BYTES = 512
_FIRST_BYTES = 1024  # of whoever has been silent: 64 of them fill a second
_SPEAKS_FOR = 10.0  # seconds for which one that was heard counts as a speaker
_MAX_SPEAKERS = 20_000  # twice as many as a ledger holds

# What waited longer is told too late to help anybody: a turn follows within some seconds.
MAX_AGE = 5.0  # seconds
# Twice what can be told in that time, so that age and not this decides what is dropped.
MAX_PENDING_BLOCKS = 16_384

# The most that msgpack needs for the names of keys and the lengths before values.
_BATCH_OVERHEAD = 32
_PLACE_OVERHEAD = 20
_MODEL_OVERHEAD = 2
_RUN_OVERHEAD = 28


class Share:
    """How many bytes this node may say, and when; times are seconds on its monotonic clock."""

    def __init__(self) -> None:
        self._heard: OrderedDict[str, float] = OrderedDict()
        self._said_at = float("-inf")
        self._said = 0

    def heard(self, origin: str, now: float) -> None:
        """Count ``origin`` among the speakers."""
        self._heard[origin] = now
        self._heard.move_to_end(origin)
        if len(self._heard) > _MAX_SPEAKERS:
            self._heard.popitem(last=False)

    def next_at(self, now: float) -> float:
        """Return when the next batch may be sent."""
        per_s = TOTAL_BYTES / self.speakers(now)
        return self._said_at + max(INTERVAL, MIN_BATCH_BYTES / per_s)

    def room(self, now: float) -> int:
        """Return the most bytes of a batch that is sent now."""
        share = TOTAL_BYTES // self.speakers(now)
        is_used_to = now - self._said_at <= _SPEAKS_FOR
        ramp = max(_FIRST_BYTES, 2 * self._said) if is_used_to else _FIRST_BYTES
        return max(MIN_BATCH_BYTES, min(share, ramp, MAX_BATCH_BYTES))

    def said(self, size: int, now: float) -> None:
        """Count a batch of ``size`` bytes of this node."""
        self._said, self._said_at = size, now

    def speakers(self, now: float) -> int:
        """Return how many speak lately, this node included."""
        while self._heard and now - next(iter(self._heard.values())) > _SPEAKS_FOR:
            self._heard.popitem(last=False)
        return 1 + len(self._heard)


class _Filling:
    """A batch that is being filled, and an upper bound of its size in bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.size = _BATCH_OVERHEAD
        self.models: dict[str, int] = {}
        self.places: dict[Place, int] = {}
        self.runs: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        self.told: set[tuple[str, int]] = set()

    def add(self, observed: Observed) -> int | None:
        """Return how many blocks were added; None if there is no room for them.

        A block that a newer observation has told of already is left out.
        """
        model, place = observed.model, observed.place
        blocks = tuple(b for b in observed.blocks if (model, b) not in self.told)
        if not blocks:
            return 0
        at = (self.models.get(model, len(self.models)), self.places.get(place, len(self.places)))
        more = BLOCK_BYTES * len(blocks)
        more += 0 if model in self.models else len(model.encode()) + _MODEL_OVERHEAD
        more += 0 if place in self.places else sum(map(len, map(str.encode, place)))
        more += 0 if place in self.places else _PLACE_OVERHEAD
        more += 0 if at in self.runs else _RUN_OVERHEAD
        is_full = at[0] >= MAX_MODELS or at[1] >= MAX_PLACES
        is_full = is_full or (at not in self.runs and len(self.runs) >= MAX_RUNS)
        if is_full or self.size + more > self.room:
            return None
        self.size += more
        self.models[model], self.places[place] = at
        self.runs.setdefault(at, []).append(blocks)
        self.told.update((model, block) for block in blocks)
        return len(blocks)

    def batch(self) -> AffinityBatch:
        places = tuple(AffinityPlace(id=peer, service_id=service) for peer, service in self.places)
        runs = tuple(
            # The newest came first; whoever takes them in shall end with it.
            AffinityRun(
                model=model,
                place=place,
                blocks=b"".join(pack_blocks(blocks) for blocks in reversed(observed)),
            )
            for (model, place), observed in self.runs.items()
        )
        return AffinityBatch(models=tuple(self.models), places=places, runs=runs)


class Outbox:
    """Observations that wait to be told; the newest go first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Observed]] = deque()
        self._blocks = 0
        self.dropped = 0  # blocks that nobody was told, since the start

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, observed: Observed, now: float) -> None:
        """Keep one observation to be told; it is passed over if it can't be written down."""
        peer_id, service_id = observed.place
        if not is_sendable(observed.model, 128):
            return  # of a request that names no model, or one that only a silent engine may have
        if not is_sendable(peer_id, 128) or len(service_id) > 64:
            return
        self._waiting.append((now, observed))
        self._blocks += len(observed.blocks)
        while self._blocks > MAX_PENDING_BLOCKS:
            self._drop_oldest()

    def take(self, room: int, now: float) -> tuple[AffinityBatch, int] | None:
        """Return a batch of at most ``room`` bytes, and its number of blocks; None: nothing fits.

        What has no room stays, unless it is too old.
        """
        while self._waiting and now - self._waiting[0][0] > MAX_AGE:
            self._drop_oldest()
        filling, left, blocks = _Filling(room), deque[tuple[float, Observed]](), 0
        while self._waiting:
            at, observed = self._waiting.pop()
            added = filling.add(observed)
            if added is None:
                left.appendleft((at, observed))
            else:
                blocks += added
        self._waiting = left
        self._blocks = sum(len(observed.blocks) for _, observed in left)
        return (filling.batch(), blocks) if filling.runs else None

    def _drop_oldest(self) -> None:
        _, observed = self._waiting.popleft()
        self._blocks -= len(observed.blocks)
        self.dropped += len(observed.blocks)
