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
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaCandidate:
    """One replica that could serve a request."""

    node_id: str
    address: str = ""
    replica_index: int = 0
    in_flight: int = 0  # requests open on it now, this caller's and others'
    last_used: float = 0.0  # seconds on any one clock; only the order counts
    available_vram: int = 0  # bytes, uint64; 0 = unknown


def pick_best_replica(candidates: Iterable[ReplicaCandidate]) -> ReplicaCandidate | None:
    """Return the best candidate by the tiers above, or None if there is none."""
    # min() keeps the first of equals, which is the rule for a full tie.
    return min(candidates, key=_rank, default=None)


def _rank(candidate: ReplicaCandidate) -> tuple[int, float, int]:
    return (candidate.in_flight, candidate.last_used, -candidate.available_vram)
