"""Which replica serves a request: one policy for every transport.

The first tier that differs decides:

1. fewest requests in flight;
2. oldest last use (round robin among equals: every pick refreshes it);
3. most free VRAM; unknown is 0, the lowest.

A full tie keeps the first listed. Depends on the standard library alone, so that every
transport shares it. Policy: LocalAI pkg/clusterrouting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

PolicyTier = Literal["only", "in_flight", "last_used", "vram", "first_listed"]


class ReplicaCandidate(NamedTuple):
    """One replica that could serve a request."""

    node_id: str
    address: str = ""
    replica_index: int = 0
    in_flight: int = 0  # requests open on it now, this caller's and others'
    last_used: float = 0.0  # seconds on any one clock; only the order counts
    available_vram: int = 0  # bytes, uint64; 0 = unknown


def rank(candidate: ReplicaCandidate) -> tuple[int, float, int]:
    """Return the tiers as a sort key: the lowest is the best."""
    return (candidate.in_flight, candidate.last_used, -candidate.available_vram)


def pick_best_replica(candidates: Iterable[ReplicaCandidate]) -> ReplicaCandidate | None:
    """Return the best candidate by the tiers above, or None if there is none."""
    # min() keeps the first of equals, which is the rule for a full tie.
    return min(candidates, key=rank, default=None)


def deciding_tier(best: ReplicaCandidate, runner_up: ReplicaCandidate | None) -> PolicyTier:
    """Say which tier set the best apart from the second best; None means there was no second.

    The second best shares the most tiers with the best, so no other candidate needs asking.
    """
    if runner_up is None:
        return "only"
    if best.in_flight != runner_up.in_flight:
        return "in_flight"
    if best.last_used != runner_up.last_used:
        return "last_used"
    if best.available_vram != runner_up.available_vram:
        return "vram"
    return "first_listed"
