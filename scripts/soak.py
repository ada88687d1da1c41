"""Kills, stops and restarts nodes of a mesh of real processes, and tells how the mesh stood it.

Each ``--every`` seconds one node gets SIGKILL or SIGTERM, or one that is gone starts again, with
its identity, its port and its state folder; up to a quarter are gone at a time. A fifth of the
nodes is left alone: they serve a request each second, and their memory is followed. Ends with 1
if a ledger is not right at the end, somebody alive was taken for dead, a request failed, memory
grew, or something was logged as a warning or an error that the churn does not explain.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support import cluster
from support.cluster import Cluster, Engine, Node

GONE_AT_MOST = 0.25
LEFT_ALONE = 0.2
HOSTS = 2  # of those left alone, with an engine each
TERM_SHARE = 0.3  # of deaths; the others are by SIGKILL
STARTS_AT_ONCE = 4
# Nothing is measured while they start, and forty take their time on a busy machine.
START_TIMEOUT = 600.0  # seconds
# Whoever is back for less long may still be found to have been gone.
LATE_NEWS = 10.0  # seconds
SETTLES_WITHIN = 60.0  # seconds
SAMPLE_INTERVAL = 30.0  # seconds
# Of the memory at the end over that at half time; what starts and caches hold is there by then.
FLAT = 0.05
# What a person should see while nodes are killed all the time: the bootstrap was not there.
EXPLAINED = {"bootstrap_unreachable"}
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Host:
    """One node through all its lives. Times are ``time.monotonic()``."""

    number: int
    node: Node
    args: tuple[str, ...] = ()
    peer_id: str = ""
    started_at: float = 0.0
    died_at: float | None = None  # None while it lives
    starts: bool = False  # again, and is not ready yet

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def lives(self) -> bool:
        return self.died_at is None


@dataclass
class Outcome:
    """What is told at the end."""

    events: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    false_evictions: list[str] = field(default_factory=list)
    unexplained: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)  # of what is unexplained
    explained: Counter[str] = field(default_factory=Counter)
    at_the_start: Counter[str] = field(default_factory=Counter)  # warnings before the churn
    memory: list[tuple[float, list[float]]] = field(default_factory=list)  # minutes, MiB of each
    files: list[tuple[float, list[int]]] = field(default_factory=list)  # minutes, descriptors
    right_after_churn: float | None = None  # seconds
    right_when_all_are_back: float | None = None
    awry: str = ""

    @property
    def growth(self) -> float:
        """Share by which memory grew from half time to the end, median over the nodes."""
        if len(self.memory) < 4:
            return 0.0
        half = self.memory[len(self.memory) // 2][1]
        return median(b / a - 1.0 for a, b in zip(half, self.memory[-1][1], strict=True))

    @property
    def ok(self) -> bool:
        right = self.right_after_churn is not None and self.right_when_all_are_back is not None
        clean = not self.false_evictions and not self.unexplained
        return right and clean and self.growth <= FLAT and set(self.requests) <= {"answered"}


class Soak:
    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.rng = random.Random(args.seed)
        self.every: float = args.every
        self.seconds: float = args.minutes * 60
        self.count: int = args.nodes
        self.cluster = Cluster(folder)
        self.hosts: list[Host] = []
        self.engines: list[Engine] = []
        self.outcome = Outcome()
        self.over = threading.Event()
        self.began = 0.0

    # Starting

    def start(self) -> None:
        for number in range(self.count):
            args: tuple[str, ...] = ()
            if number < HOSTS:
                engine = self.cluster.start_engine(f"node{number}").wait_ready()
                self.engines.append(engine)
                args = ("--vram", "24GiB", "--expose", f"llm={engine.address}")
            elif number < self.left_alone:
                args = ("--proxy", "127.0.0.1:0")
            bootstrap = self.hosts[0].node if self.hosts else None
            node = self.cluster.start_node(f"node{number}", *args, bootstrap=bootstrap)
            self.hosts.append(Host(number, node, args, started_at=time.monotonic()))
            if number == 0 or number % STARTS_AT_ONCE == 0:
                node.wait_ready()
        for host in self.hosts:
            host.peer_id = host.node.wait_ready().peer_id
            host.started_at = time.monotonic()
        self.tell(f"{self.count} processes are up")

    @property
    def left_alone(self) -> int:
        return max(HOSTS + 1, round(self.count * LEFT_ALONE))

    # While it lasts

    def churn(self) -> None:
        self.began = time.monotonic()
        asking = threading.Thread(target=self.ask_forever, daemon=True)
        asking.start()
        next_sample = self.began
        turn = 0
        while (passed := time.monotonic() - self.began) < self.seconds:
            if time.monotonic() >= next_sample:
                self.sample(passed / 60)
                next_sample += SAMPLE_INTERVAL
            self.act()
            turn += 1
            while time.monotonic() < self.began + turn * self.every:
                time.sleep(0.1)
                self.welcome()
                self.read_logs()
        self.over.set()
        asking.join()
        self.sample((time.monotonic() - self.began) / 60)

    def act(self) -> None:
        mortal = self.hosts[self.left_alone :]
        living = [host for host in mortal if host.lives]
        gone = [host for host in mortal if not host.lives and not host.starts]
        full = sum(not host.lives for host in mortal) >= self.count * GONE_AT_MOST
        if gone and (full or not living or self.rng.random() < 0.5):
            self.restart(self.rng.choice(gone))
        elif full or not living:
            self.outcome.events["none, as too many are starting"] += 1
        elif self.rng.random() < TERM_SHARE:
            self.end(self.rng.choice(living), signal.SIGTERM)
        else:
            self.end(self.rng.choice(living), signal.SIGKILL)

    def end(self, host: Host, how: signal.Signals) -> None:
        host.node.signal(how)
        host.died_at = time.monotonic()
        code = host.node.wait(30)
        self.outcome.events[how.name] += 1
        if how is signal.SIGTERM and code != 0:
            self.note_unexplained(f"SIGTERM ended with {code}", host, "")

    def restart(self, host: Host) -> None:
        self.read_log(host)
        host.node.close()
        self.cluster.processes.remove(host.node)
        host.node = self.cluster.start_node(
            host.name,
            *host.args,
            bootstrap=self.hosts[0].node,
            listen=host.node.addr.partition("/p2p/")[0],
        )
        host.starts = True
        self.outcome.events["restart"] += 1

    def welcome(self) -> None:
        """Count among the living who started and is ready; a start takes as long as it takes."""
        for host in self.hosts:
            if host.starts and (host.node.out or host.node.child.poll() is not None):
                host.node.wait_ready()
                host.started_at, host.died_at, host.starts = time.monotonic(), None, False

    def ask_forever(self) -> None:
        """Ask for a completion each second through one of those that nobody kills."""
        entries = self.hosts[HOSTS : self.left_alone]
        body = json.dumps(
            {"model": "demo-model", "messages": [{"role": "user", "content": "hello"}]}
        ).encode()
        number = 0
        while not self.over.wait(1.0):
            number += 1
            entry = entries[number % len(entries)].node
            request = urllib.request.Request(
                f"{entry.base_url}/chat/completions",
                data=body,
                headers={"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    json.loads(answer.read())
                outcome = "answered"
            except (OSError, ValueError) as exc:
                outcome = f"failed: {exc}"
            self.outcome.requests[outcome] += 1

    def sample(self, minutes: float) -> None:
        alone = self.hosts[: self.left_alone]
        memory = [_memory(host.node.pid) / 2**20 for host in alone]
        files = [len(os.listdir(f"/proc/{host.node.pid}/fd")) for host in alone]
        self.outcome.memory.append((minutes, memory))
        self.outcome.files.append((minutes, files))
        living = sum(host.lives for host in self.hosts)
        self.tell(
            f"{minutes:5.1f} min: {living} live, {sum(self.outcome.events.values())} events, "
            f"memory of those left alone {median(memory):.1f} MiB (at most {max(memory):.1f}), "
            f"{median(files):.0f} descriptors, "
            f"{len(self.outcome.false_evictions)} false evictions, "
            f"{self.outcome.requests['answered']} of {sum(self.outcome.requests.values())} answered"
        )

    # What the nodes say

    def read_logs(self) -> None:
        for host in self.hosts:
            self.read_log(host)

    def read_log(self, host: Host) -> None:
        err = host.node.err
        while err:
            self.judge(host, err.popleft())

    def judge(self, host: Host, line: str) -> None:
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            self.note_unexplained("not a log line", host, line)
            return
        event, level = said.get("event", ""), said.get("level", "")
        if event == "peer_offline" and self.began:
            why = f"{said.get('reason')}: {said.get('error')}"
            self.judge_eviction(host, str(said.get("peer_id")), why)
        if level in ("warning", "error", "critical"):
            # While all start at once on few cores, they are as late as they are.
            if not self.began and level == "warning":
                self.outcome.at_the_start[event] += 1
            elif event in EXPLAINED:
                self.outcome.explained[event] += 1
            else:
                self.note_unexplained(f"{level} {event}", host, line)

    def judge_eviction(self, observer: Host, peer_id: str, reason: str) -> None:
        target = next((h for h in self.hosts if h.peer_id == peer_id), None)
        now = time.monotonic()
        if target is not None and target.lives and now - target.started_at > LATE_NEWS:
            told = f"{observer.name} lost {target.name}: {reason}"
            self.outcome.false_evictions.append(told)
            self.tell(f"FALSE EVICTION: {told}")

    def note_unexplained(self, what: str, host: Host, line: str) -> None:
        if self.outcome.unexplained[what] < 3:
            self.outcome.samples.append(f"{host.name}: {line or what}"[:2000])
            self.tell(f"UNEXPLAINED: {host.name}: {line or what}"[:2000])
        self.outcome.unexplained[what] += 1

    # The end

    def settle(self) -> None:
        self.wait_started()
        self.outcome.right_after_churn = self.wait_right("those alive")
        for host in self.hosts:
            if not host.lives:
                self.restart(host)
        self.wait_started()
        self.outcome.right_when_all_are_back = self.wait_right("all")
        self.read_logs()
        codes: Counter[int] = Counter()
        for host in reversed(self.hosts):
            host.node.signal(signal.SIGTERM)
            codes[host.node.wait(30)] += 1
        self.read_logs()
        if set(codes) != {0}:
            self.note_unexplained(f"exit codes {dict(codes)}", self.hosts[0], "")

    def wait_started(self) -> None:
        while any(host.starts for host in self.hosts):
            self.welcome()
            time.sleep(0.1)

    def wait_right(self, whom: str) -> float | None:
        """Return the seconds until each ledger has exactly the living online; None if not so."""
        began = time.monotonic()
        living = {host.name for host in self.hosts if host.lives}
        while time.monotonic() - began < SETTLES_WITHIN:
            wrong = {
                host.name: sorted(living ^ online)
                for host in self.hosts
                if host.lives and (online := host.node.online()) != living
            }
            if not wrong:
                passed = time.monotonic() - began
                self.tell(f"ledgers of {whom} right after {passed:.1f} s")
                return passed
            time.sleep(0.2)
        self.outcome.awry = f"{whom}: {wrong}"
        self.tell(f"LEDGERS AWRY: {self.outcome.awry}"[:2000])
        return None

    def tell(self, what: str) -> None:
        print(time.strftime("%H:%M:%S"), what, file=sys.stderr, flush=True)


def _memory(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def report(soak: Soak) -> dict[str, Any]:
    made = soak.outcome
    return {
        "schema_version": 1,
        "nodes": soak.count,
        "minutes": round(soak.seconds / 60, 1),
        "every_s": soak.every,
        "events": dict(made.events),
        "requests": dict(made.requests),
        "false_evictions": made.false_evictions,
        "unexplained": dict(made.unexplained),
        "unexplained_samples": made.samples,
        "explained": dict(made.explained),
        "warnings_at_the_start": dict(made.at_the_start),
        "memory_mib": [
            {"minute": round(minute, 1), "median": round(median(of), 1), "max": round(max(of), 1)}
            for minute, of in made.memory
        ],
        "memory_growth_second_half": round(made.growth, 4),
        "descriptors": [
            {"minute": round(minute, 1), "median": median(of)} for minute, of in made.files
        ],
        "right_after_churn_s": made.right_after_churn,
        "right_when_all_are_back_s": made.right_when_all_are_back,
        "awry": made.awry,
        "ok": made.ok,
    }


def show(told: dict[str, Any]) -> None:
    right = [told["right_after_churn_s"], told["right_when_all_are_back_s"]]
    words = ["NEVER" if one is None else f"{one:.1f} s" for one in right]
    print(f"{told['nodes']} nodes, {told['minutes']} min, one event each {told['every_s']:g} s")
    print(f"  events            {told['events']}")
    print(f"  requests          {told['requests']}")
    print(f"  ledgers right     {words[0]} after the last event; {words[1]} after all were back")
    print(f"  false evictions   {len(told['false_evictions'])}")
    print(f"  log, unexplained  {told['unexplained'] or 'nothing'}")
    print(f"  log, explained    {told['explained'] or 'nothing'}")
    print(f"  log, at the start {told['warnings_at_the_start'] or 'nothing'}")
    print("  memory of those left alone, MiB (median, most):")
    rows = told["memory_mib"]
    for row in rows[:: max(1, len(rows) // 10)]:
        print(f"    {row['minute']:5.1f} min  {row['median']:6.1f}  {row['max']:6.1f}")
    print(f"    second half: {told['memory_growth_second_half']:+.1%}")
    print("ok" if told["ok"] else "NOT OK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--nodes", type=int, default=40)
    parser.add_argument("--every", type=float, default=5.0, help="seconds from event to event")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    cluster.READY_TIMEOUT = START_TIMEOUT
    # So that whoever ends this ends its nodes too, also where it runs in the background.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(130))
    # Else each start of a node compiles what it imports, which takes longer than all the rest.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args)
        try:
            soak.start()
            soak.wait_right("all, at the start")
            soak.read_logs()
            soak.churn()
            soak.settle()
        finally:
            soak.cluster.close()
    told = report(soak)
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        show(told)
    return 0 if told["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
