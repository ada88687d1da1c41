"""Measures what a mesh does as it grows, loses and finds members, beside the target of each row.

``--quick`` makes fewer and shorter runs. Rows on real sockets share this machine's cores with the
nodes that they measure; rows marked virtual run on the in-process mesh and a virtual clock.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import structlog
import trio
from trio.testing import MockClock

from meshnode.core import budget
from meshnode.core.ledger import Ledger
from meshnode.core.node_data import NodeData, encode
from meshnode.metrics import Metrics
from meshnode.net.gossip import Hearer
from meshnode.net.memory_mesh import MemoryNetwork
from meshnode.testing.swarm import Swarm, open_swarm
from meshnode.testing.swarm_report import spread

T = TypeVar("T")
SETTLE = 5.0  # seconds from convergence until the links stand
HOUR = 3600.0
LOSS = 0.05
# What each node keeps in a large mesh (net/peering.MIN_LINKS); an announcement comes over them all.
LINKS = 6


@dataclass(frozen=True)
class Row:
    what: str
    target: str
    figure: str
    met: bool


def seconds(values: list[float]) -> str:
    made = spread(values)
    if made.max is None:
        return "nothing measured"
    return f"p50 {made.p50:.2f}, p99 {made.p99:.2f}, max {made.max:.2f} s (of {made.count})"


def below(values: list[float], limit: float) -> bool:
    p99 = spread(values).p99
    return p99 is not None and p99 <= limit


def virtual(run: Callable[[], Awaitable[T]]) -> T:
    return trio.run(run, clock=MockClock(autojump_threshold=0))


# Real sockets, one process


async def start_together(n: int, within: float) -> list[float]:
    """Seconds from the last node's being up until each ledger was complete."""
    async with open_swarm(n, mesh="libp2p") as swarm:
        how = await swarm.measure_convergence(within, label="start")
        if not how.complete:
            print(f"  N={n}: not complete within {within:g} s", file=sys.stderr)
            return []
        return list(how.after.values())


def starting(n: int, limit: float, runs: int) -> Row:
    after = [one for _ in range(runs) for one in trio.run(start_together, n, 6 * limit)]
    what = f"{n} started at once, one bootstrap, one process: all ledgers complete"
    return Row(what, f"p99 ≤ {limit:g} s", seconds(after), below(after, limit))


async def kill_three_tenths() -> tuple[float, int]:
    async with open_swarm(20, mesh="libp2p") as swarm:
        await swarm.wait_converged(within=30)
        await swarm.wait_linked(19, within=30)
        for number in swarm.choose(6):
            swarm.kill(number)
        return await swarm.wait_converged(within=30), len(swarm.watch.false_evictions)


def mass_death(runs: int) -> Row:
    took = [trio.run(kill_three_tenths) for _ in range(runs)]
    wrong = sum(one[1] for one in took)
    after = [one[0] for one in took]
    figure = f"{seconds(after)}, {wrong} false evictions"
    ok = max(after) <= 6 and not wrong
    return Row("30 % of 20 killed at once, one process: all agree", "≤ 6 s, none false", figure, ok)


async def stay_steady(n: int, length: float) -> tuple[float, float, float, float]:
    """Share of fresh pairs; announcements per node and second, heard and budgeted; CPU ms each."""
    async with open_swarm(n, mesh="libp2p") as swarm:
        await swarm.measure_convergence(120, label="start")
        heard = sum(node.counted().heard for node in swarm.nodes)
        cpu = time.process_time()
        fresh, looks = 0, 0
        for _ in range(max(1, round(length / 5))):
            await trio.sleep(5)
            fresh += sum(len(node.online) for node in swarm.nodes)
            looks += n * n
        more = sum(node.counted().heard for node in swarm.nodes) - heard
        spent = time.process_time() - cpu
        cost = spent / max(1, more) * 1e3
        return fresh / looks, more / n / length, swarm.announce_budget, cost


def steady(n: int, length: float) -> Row:
    share, heard, budgeted, cost = trio.run(stay_steady, n, length)
    what = f"{n} in one process, steady for {length:g} s: pairs fresh"
    figure = f"{share:.3%}, {heard:.1f} heard/s per node (budget {budgeted:g}/s, as one process "
    figure += f"hears for all), {cost:.2f} ms CPU each, pings included"
    return Row(what, "≥ 99.9 %", figure, share >= 0.999)


def hearing_cost(stack: str) -> float:
    """CPU ms of a process per announcement that it receives, over one link."""
    peer = [sys.executable, str(Path(__file__).with_name("bench_peer.py")), stack]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*peer, "hear"], **pipes) as hearer:
        addr = json.loads(hearer.stdout.readline())["addr"]
        subprocess.run([*peer, "tell", addr], stdout=subprocess.DEVNULL, check=True)
        hearer.stdin.close()
        return json.loads(hearer.stdout.readline())["cpu_ms"]


def hearing() -> Row:
    ours, stock = hearing_cost("ours"), hearing_cost("stock")
    figure = f"{ours:.2f} ms; stock settings in the same run {stock:.2f} ms"
    return Row("CPU per received announcement", "≤ 0.7 ms", figure, ours <= 0.7)


# The in-process mesh


async def stop_some(length: float) -> tuple[Swarm, list[float]]:
    """The swarm, and the seconds after which each other one missed each of the stopped."""
    async with open_swarm(20, seed=1) as swarm:
        await swarm.wait_converged(within=10)
        await trio.sleep(SETTLE)
        chosen = swarm.choose(3)
        frozen_at = swarm.now()
        for number in chosen:
            swarm.freeze(number)
        await trio.sleep(length)
        for number in chosen:
            swarm.thaw(number)
        await trio.sleep(SETTLE)
        missed = [e for e in swarm.watch.evictions if e.kind == "frozen" and e.target in chosen]
        return swarm, [e.at - frozen_at for e in missed]


def stopping() -> Row:
    short, _ = virtual(lambda: stop_some(3.0))
    long, missed_after = virtual(lambda: stop_some(10.0))
    wrong = len(short.watch.evictions) + len(long.watch.false_evictions)
    figure = f"3 s: {len(short.watch.evictions)} evicted; 10 s: {seconds(missed_after)}"
    figure += f", {len(long.watch.false_evictions)} wrongly"
    ok = not wrong and len(missed_after) == 3 * 17 and max(missed_after) <= 5
    return Row("SIGSTOP of 3 of 20 (virtual)", "≤ 5 s; 3 s evicts nobody", figure, ok)


async def skew_some() -> Swarm:
    async with open_swarm(20, seed=1) as swarm:
        await swarm.wait_converged(within=10)
        await trio.sleep(SETTLE)
        for number, ahead in zip(swarm.choose(6), (HOUR, -HOUR) * 3, strict=True):
            swarm.skew(number, ahead)
        await trio.sleep(60)
        await swarm.restart(4, clock_offset=-HOUR)
        await swarm.wait_converged(within=10, label="restart")
        await trio.sleep(20)
        return swarm


def skewing() -> Row:
    swarm = virtual(skew_some)
    wrong = len(swarm.watch.false_evictions)
    figure = f"{wrong} evicted; a restart an hour back heard again"
    return Row("clocks ±1 h on 6 of 20 (virtual)", "no eviction", figure, not wrong)


class Announcements:
    """The announcement layer alone: N nodes speak, a few of them listen with real ledgers.

    Ten thousand whole members would need a hundred million ledger entries. Whatever a node hears
    follows from the others' beats, so a few listeners stand for all. Each misses an announcement
    if the copy on every one of its links is lost; pings and ledger exchanges, which also keep a
    peer online in a whole mesh, are left out.
    """

    def __init__(self, n: int, listeners: int) -> None:
        self.rng = random.Random(1)
        network = MemoryNetwork(self.rng)
        self.meshes = [network.node(f"n{number}") for number in range(n)]
        self.interval = budget.announce_interval(n, 10.0)
        self.window = round(budget.online_window(self.interval, 10.0, 40.0))
        self.hearers = []
        for number in range(listeners):
            ledger = Ledger(f"listener {number}", max_entries=2 * n)
            hear = Hearer(
                ledger, Unrouted(), open_sealed=self.meshes[0].open_sealed, metrics=Metrics()
            )
            self.hearers.append((ledger, hear))
        self.false_evictions = 0
        self.heard = 0
        self.cpu = 0.0

    async def run(self, length: float) -> None:
        beats = sorted(
            (self.rng.uniform(0, self.interval), number) for number in range(len(self.meshes))
        )
        due = {number: at for at, number in beats}
        seq = 0
        began = trio.current_time()
        warm_up = self.interval * 1.2
        for ledger, _ in self.hearers:
            ledger.watch(lambda peer, ledger=ledger: self._look(ledger, peer))
        end = began + warm_up + length
        queue = [(began + at, number) for number, at in due.items()]
        heapq.heapify(queue)
        next_expiry = began + 1
        while queue and queue[0][0] < end:
            at, number = heapq.heappop(queue)
            await trio.sleep_until(at)
            if at >= next_expiry:
                for ledger, _ in self.hearers:
                    ledger.expire(at)
                next_expiry = at + 1
            seq += 1
            mesh = self.meshes[number]
            node = NodeData(id=mesh.peer_id, seq=seq, online_window=self.window)
            envelope = mesh.seal(encode(node))
            counts = at > began + warm_up
            for _, hearer in self.hearers:
                if all(self.rng.random() < LOSS for _ in range(LINKS)):
                    continue
                start = time.process_time()
                hearer.hear(mesh.peer_id, envelope)
                self.cpu += time.process_time() - start
                self.heard += counts
            heapq.heappush(queue, (at + self.interval * self.rng.uniform(0.9, 1.1), number))

    def _look(self, ledger: Ledger, peer: str) -> None:
        entry = ledger.get(peer)
        if entry is not None and not entry.is_online_at(trio.current_time()):
            self.false_evictions += 1


class Unrouted:
    def hear(self, node: NodeData) -> None: ...
    def forget(self, peer_id: str) -> None: ...


def listening(n: int, listeners: int, intervals: float) -> Row:
    layer = Announcements(n, listeners)
    length = layer.interval * intervals
    virtual(lambda: layer.run(length))
    rate = layer.heard / listeners / length
    figure = f"{rate:.1f}/s, {layer.false_evictions} false evictions"
    figure += f" (every {layer.interval:g} s, window {layer.window} s; layer alone)"
    what = (
        f"announcements heard per node at {n}, {LOSS:.0%} lost on each of {LINKS} links (virtual)"
    )
    return Row(what, "≤ 25/s, none false", figure, rate <= 25 and not layer.false_evictions)


# Real processes


def kill_dash_nine(runs: int) -> Row:
    """Twenty processes, one killed by SIGKILL; each survivor's control API is asked."""
    script = Path(__file__).with_name("bench_swarm_kill.py")
    done = subprocess.run(
        [sys.executable, script, str(runs)], capture_output=True, text=True, check=False
    )
    what = "kill -9 of one of 20 processes: gone from every candidate list"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1][:120]
        return Row(what, "p99 ≤ 1 s", reason, False)
    after = [float(one) for one in json.loads(done.stdout)]
    return Row(what, "p99 ≤ 1 s", seconds(after), below(after, 1.0))


def rows(quick: bool, length: float) -> dict[str, Callable[[], Row]]:
    """Return what measures each row, by the word that ``--only`` takes."""
    steady_nodes = 60 if quick else 200
    return {
        "start20": lambda: starting(20, 2.0, 1 if quick else 5),
        "start100": lambda: starting(40 if quick else 100, 10.0, 1),
        "kill": lambda: kill_dash_nine(1 if quick else 5),
        "stop": stopping,
        "mass": lambda: mass_death(1 if quick else 5),
        "clock": skewing,
        "steady": lambda: steady(steady_nodes, 15.0 if quick else length),
        "cpu": hearing,
        "hear1000": lambda: listening(1_000, 2 if quick else 10, 3.0 if quick else 10.0),
        "hear10000": lambda: listening(10_000, 2, 0.5 if quick else 4.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--steady", type=float, default=300.0, help="seconds of the steady row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    words = sorted(rows(quick=True, length=0.0))
    parser.add_argument(
        "--only", action="append", choices=words, metavar="ROW", help=", ".join(words)
    )
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    measured: list[Row] = []
    for word, measure in rows(args.quick, args.steady).items():
        if args.only and word not in args.only:
            continue
        row = measure()
        measured.append(row)
        print(
            f"{'met ' if row.met else 'MISS'}  {row.what}\n"
            f"      target {row.target} · here {row.figure}",
            file=sys.stderr if args.json else sys.stdout,
            flush=True,
        )
    if args.json:
        print(json.dumps({"schema_version": 1, "rows": [asdict(row) for row in measured]}))


if __name__ == "__main__":
    main()
