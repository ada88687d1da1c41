"""What a swarm did, in figures: a frozen value that is written as JSON, or drawn."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshnode.testing.swarm import Swarm
from meshnode.testing.swarm_watch import Convergence, Death

SCHEMA_VERSION = 1
# Eviction counts as told one by one; of more, the kinds and reasons say enough.
_MAX_TOLD = 100


@dataclass(frozen=True, slots=True)
class Spread:
    """How a set of durations (seconds) or counts lies."""

    count: int
    p50: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class RunTime:
    """What the run itself took; left out where a report is to be repeatable."""

    cpu: float  # seconds
    wall: float  # seconds
    memory: int  # bytes at most

    @classmethod
    def since(cls, cpu: float, wall: float) -> RunTime:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return cls(
            time.process_time() - cpu,
            time.monotonic() - wall,
            peak if sys.platform == "darwin" else peak * 1024,
        )


def spread(values: Iterable[float]) -> Spread:
    """Return the nearest-rank quantiles of ``values``."""
    ordered = sorted(values)
    return Spread(
        len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.99), quantile(ordered, 1.0)
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return the smallest value that ``share`` of all do not exceed; None of nothing."""
    if not ordered:
        return None
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 6)


def report_of(
    swarm: Swarm,
    *,
    seed: int,
    steps: Sequence[str] = (),
    complete: bool = True,
    run_time: RunTime | None = None,
) -> dict[str, object]:
    """Return the report as it is written: plain values, times in seconds on the swarm's clock.

    Args:
        complete: False if the run was broken off.
        run_time: CPU, wall time and memory; without it the report follows from the seed alone.
    """
    duration = swarm.now()
    watch = swarm.watch
    detections = [s for d in watch.deaths if not d.leaving for s in d.detected_after.values()]
    return {
        "schema_version": SCHEMA_VERSION,
        "mesh": swarm.mesh,
        "nodes": len(swarm.nodes),
        "living": len(swarm.living()),
        "seed": seed,
        "script": list(steps),
        "complete": complete,
        "duration_s": round(duration, 6),
        "converged": not swarm.awry(),
        "convergence": [_convergence(one) for one in watch.convergences],
        "detection": _spread(spread(detections)),
        "deaths": [_death(one) for one in watch.deaths],
        "false_evictions": len(watch.false_evictions),
        "evictions": _evictions(swarm),
        "per_node": _per_node(swarm, duration, run_time),
        "run": None
        if run_time is None
        else {
            "cpu_s": round(run_time.cpu, 3),
            "wall_s": round(run_time.wall, 3),
            "memory_bytes": run_time.memory,
        },
    }


def _spread(made: Spread) -> dict[str, object]:
    return {"count": made.count, "p50_s": made.p50, "p99_s": made.p99, "max_s": made.max}


def _convergence(one: Convergence) -> dict[str, object]:
    return {
        "after": one.label,
        "at_s": round(one.at, 6),
        "complete": one.complete,
        **_spread(spread(one.after.values())),
    }


def _death(one: Death) -> dict[str, object]:
    return {
        "node": one.number,
        "at_s": round(one.at, 6),
        "leaving": one.leaving,
        "unnoticed_by": sorted(one.waiting),
        "detected_after_s": {
            str(number): round(after, 6) for number, after in sorted(one.detected_after.items())
        },
        **_spread(spread(one.detected_after.values())),
    }


def _evictions(swarm: Swarm) -> dict[str, object]:
    evictions = swarm.watch.evictions
    kinds = Counter(one.kind for one in evictions)
    return {
        "by_kind": {kind: kinds[kind] for kind in ("false", "late", "cut", "frozen")},
        "false": [
            {
                "at_s": round(one.at, 6),
                "observer": one.observer,
                "target": one.target,
                "reason": one.reason,
            }
            for one in swarm.watch.false_evictions[:_MAX_TOLD]
        ],
    }


def _per_node(swarm: Swarm, duration: float, run_time: RunTime | None) -> dict[str, object]:
    traffic = [node.counted() for node in swarm.nodes]
    heard = sum(one.heard for one in traffic)
    nodes = len(traffic)
    return {
        "announcements_sent": _mean([one.sent for one in traffic]),
        "announcements_heard": _mean([one.heard for one in traffic]),
        "announcement_budget_per_s": round(swarm.announce_budget, 6),
        "announcements_heard_per_s": round(heard / nodes / duration, 6) if duration else None,
        "announcement_bytes_heard": _mean([one.heard_bytes for one in traffic]),
        "copies_received": _mean([one.copies for one in traffic]),
        "copied_bytes_received": _mean([one.copied_bytes for one in traffic]),
        "links": _mean([node.links() for node in swarm.living()]),
        "cpu_s": None if run_time is None else round(run_time.cpu / nodes, 6),
        "cpu_ms_per_announcement": None
        if run_time is None or not heard
        else round(run_time.cpu / heard * 1e3, 4),
    }


def _mean(counts: Sequence[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return round(sum(known) / len(known), 6) if known else None
