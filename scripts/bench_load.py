"""Measures how evenly several entry points load the hosts, by what they know of each other's load.

Pure and seeded: the router itself, on a virtual clock. Hosts announce as real ones do (every 10 s,
and once a second when their load changed by a tenth); a tunnel's reply is back after one round
trip. ``max/mean`` is the fullest host's requests in flight over the mean, sampled ten times a
second and averaged; 1 is perfectly even.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median

from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.router import Router

SERVICE = "chat"
BEAT, SPACING, TELL_STEP = 10.0, 1.0, 0.1  # as net/gossip and net/local_services
GOSSIP_DELAY = 0.05  # seconds from an announcement to its being heard
ROUND_TRIP = 0.005  # seconds
SAMPLE = 0.1  # seconds
SETTLE = 20.0  # seconds before the first sample
SIGNALS = ("local", "gossip", "combined")


@dataclass(frozen=True)
class Row:
    """One arrangement, over all seeds."""

    entries: int
    hosts: int
    signals: str
    imbalance: float  # max/mean in flight, the median over the seeds
    requests: int


@dataclass
class _Host:
    name: str
    vram: int
    held: Counter[int] = field(default_factory=Counter)  # requests, by entry point
    seq: int = 1
    told: int = 0
    due: float = 0.0
    last_told: float = -SPACING

    @property
    def in_flight(self) -> int:
        return self.held.total()


class _Simulation:
    """Some entry points before some hosts, for a while."""

    def __init__(self, entries: int, hosts: int, signals: str, per_host: float, seed: int) -> None:
        self.rng = random.Random(seed)
        self.signals = signals
        self.now = 0.0
        self.requests = 0
        self.samples: list[float] = []
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._service_time = 4.0  # seconds, on average
        self._rate = per_host * hosts / self._service_time
        # Equal hosts but for their memory, so that ties go the same way at every entry point.
        self.hosts = [_Host(f"h{i:02}", (8 + 8 * i) * 2**30) for i in range(hosts)]
        self.routers = []
        for _ in range(entries):
            ledger = Ledger("entry")
            self.routers.append(
                (ledger, Router(ledger, self_id="entry", policy="vram", rng=self.rng))
            )
        for host in self.hosts:
            self._hear(self._announcement(host))
            self._at(self.rng.uniform(0, BEAT), partial(self._beat, host))

    def run(self, seconds: float) -> None:
        self._at(self.rng.expovariate(self._rate), self._arrive)
        self._at(SETTLE, self._sample)
        while self._events[0][0] <= seconds:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))

    def _arrive(self) -> None:
        self._at(self.rng.expovariate(self._rate), self._arrive)
        self.requests += 1
        number = self.rng.randrange(len(self.routers))
        _, router = self.routers[number]
        lease = router.lease(now=self.now, service_id=SERVICE)
        host = next(host for host in self.hosts if host.name == lease.peer_id)

        def reach() -> None:
            host.held[number] += 1
            self._load_changed(host)
            others = host.in_flight - host.held[number]
            self._at(ROUND_TRIP / 2, lambda: reply(others))
            self._at(self.rng.expovariate(1 / self._service_time), end)

        def reply(others: int) -> None:
            if self.signals == "combined":
                router.report(
                    host.name, SERVICE, others_in_flight=others, available_vram=None, now=self.now
                )
            lease.succeeded(ROUND_TRIP, now=self.now)

        def end() -> None:
            host.held[number] -= 1
            lease.release()
            self._load_changed(host)

        self._at(ROUND_TRIP / 2, reach)

    def _load_changed(self, host: _Host) -> None:
        if abs(host.in_flight - host.told) > TELL_STEP * host.told:
            host.told = host.in_flight
            due = max(self.now, host.last_told + SPACING)
            if due < host.due or host.due <= self.now:
                host.due = due
                self._at(due - self.now, lambda: self._tell(host, due))

    def _beat(self, host: _Host) -> None:
        self._at(BEAT * self.rng.uniform(0.9, 1.1), lambda: self._beat(host))
        self._tell(host, host.due)

    def _tell(self, host: _Host, due: float) -> None:
        if host.due != due or self.now < host.last_told + SPACING:
            return
        host.last_told = self.now
        host.seq += 1
        node = self._announcement(host)
        self._at(GOSSIP_DELAY, lambda: self._hear(node))

    def _announcement(self, host: _Host) -> NodeData:
        in_flight = 0 if self.signals == "local" else host.in_flight
        return NodeData(
            id=host.name,
            seq=host.seq,
            available_vram=host.vram,
            services=(ServiceData(service_id=SERVICE, in_flight=in_flight),),
        )

    def _hear(self, node: NodeData) -> None:
        for ledger, router in self.routers:
            ledger.observe(node, now=self.now)
            router.hear(node)

    def _sample(self) -> None:
        self._at(SAMPLE, self._sample)
        loads = [host.in_flight for host in self.hosts]
        if any(loads):
            self.samples.append(max(loads) / mean(loads))


def measure(
    entries: int, hosts: int, signals: str, *, per_host: float, seconds: float, seeds: int
) -> Row:
    """Return the imbalance of one arrangement.

    Args:
        per_host: requests in flight on each host, on average.
        seconds: of virtual time, ``SETTLE`` included.
    """
    runs = []
    for seed in range(seeds):
        simulation = _Simulation(entries, hosts, signals, per_host, seed)
        simulation.run(seconds)
        runs.append(simulation)
    imbalance = median(mean(run.samples) for run in runs)
    return Row(entries, hosts, signals, round(imbalance, 3), sum(run.requests for run in runs))


def _real_rows() -> list[Row]:
    """Measure 4 hosts of real processes behind 1 and 3 entry points; takes a minute and a half."""
    script = Path(__file__).with_name("bench_load_real.py")
    done = subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE)
    return [
        Row(row["entries"], row["hosts"], "processes", row["imbalance"], row["requests"])
        for row in json.loads(done.stdout)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench load")
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--per-host", type=float, default=4.0, metavar="N")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="also 1 and 3 entries as processes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        measure(
            entries,
            options.hosts,
            signals,
            per_host=options.per_host,
            seconds=options.seconds,
            seeds=options.seeds,
        )
        for entries in (1, 3, 8)
        for signals in SIGNALS
    ]
    rows += _real_rows() if options.real else []
    if options.json:
        print(json.dumps({"schema_version": 1, "rows": [asdict(row) for row in rows]}))
        return
    print(f"{'entries':>8} {'hosts':>6} {'signals':>10} {'max/mean':>9} {'requests':>9}")
    for row in rows:
        print(
            f"{row.entries:>8} {row.hosts:>6} {row.signals:>10} {row.imbalance:>9.2f} "
            f"{row.requests:>9}"
        )


if __name__ == "__main__":
    main()
