"""Who serves a prompt: the one whose cache is warm, but never at the price of load.

Semantics: LocalAI core/services/nodes/prefixcache.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from math import floor

from meshnode.core.prefix_cache import ReplicaT

BALANCE_ABS = 2  # requests that the warm one may have in flight beyond the least loaded
BALANCE_REL = 1.5
# Below this part of the prompt, what is spared is not worth leaving the load's order for.
MIN_PREFIX_MATCH = 0.3

PRESSURE_WINDOW = 60.0  # seconds
# What a busy model gathers in a minute; past it the figure only says "at least".
_MAX_PRESSURE = 10_000
_MAX_MODELS = 1024  # with pressure; the longest without makes room


def load_limit(least: int, balance_abs: int = BALANCE_ABS, balance_rel: float = BALANCE_REL) -> int:
    """Return the most requests in flight with which a replica is eligible.

    Args:
        least: the fewest that any candidate has.
    """
    return min(least + balance_abs, floor(least * balance_rel + 1))


def select(
    in_flight: Mapping[ReplicaT, int],
    hot: ReplicaT | None,
    match_ratio: float,
    cold_order: Sequence[ReplicaT],
    *,
    limit: int | None = None,
    min_prefix_match: float = MIN_PREFIX_MATCH,
) -> ReplicaT | None:
    """Return the replica that serves a prompt; None if there are no candidates.

    Args:
        in_flight: requests open on each candidate.
        limit: as of ``load_limit``, by which it is reckoned if None.
    """
    if not in_flight:
        return None
    most = load_limit(min(in_flight.values())) if limit is None else limit
    eligible = {replica for replica, count in in_flight.items() if count <= most}
    if hot in eligible and match_ratio >= min_prefix_match:
        return hot
    for replica in cold_order:
        if replica in eligible:
            return replica
    return min(eligible, key=lambda replica: (in_flight[replica], replica))


class Pressure:
    """How often, within the last minute, load drove requests of a model off their warm cache."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def count(self, model: str, now: float) -> None:
        """Count one request that the load guard forced elsewhere."""
        times = self._times.setdefault(model, deque(maxlen=_MAX_PRESSURE))
        self._times.move_to_end(model)
        times.append(now)
        if len(self._times) > _MAX_MODELS:
            self._times.popitem(last=False)

    def of(self, model: str, now: float) -> int:
        """Return the count of the last ``PRESSURE_WINDOW`` seconds."""
        times = self._times.get(model)
        while times and now - times[0] > PRESSURE_WINDOW:
            times.popleft()
        return len(times) if times else 0

    def highest(self, now: float, most: int) -> list[tuple[str, int]]:
        """Return the models that have any and their counts, the highest first."""
        counts = [(model, self.of(model, now)) for model in self._times]
        counts.sort(key=lambda row: (-row[1], row[0]))
        return [row for row in counts[:most] if row[1]]
