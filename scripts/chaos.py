"""Hosts that are killed, stopped, restarted and drained under steady traffic of OpenAI's client.

Every request is seen to its end: served whole and right, or failed with a reason that is held
against what this script did at that time. The faults follow from the seed; what they meet does
not quite, as real processes do not keep time.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

import httpx
import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from meshnode.testing.engine import EngineOptions, answer_words  # noqa: E402
from support.chaos import Fault, Request, Timeline, Trouble, plan  # noqa: E402
from support.cluster import Cluster, Engine, Node  # noqa: E402

MODEL = "demo-model"
TOKENS = 60  # of the longest answer: a second and a half
TOKENS_PER_SECOND = 40
CLIENTS = 6  # asking at the same time
CLIENT_TIMEOUT = 60.0  # seconds, for a request
RECOVERY = 90.0  # seconds for a host to be well again: on a busy machine it starts slowly
FAULT_EVERY = 6.0  # seconds, about
WARM_UP = 10.0  # seconds of traffic before the first fault: what is only allocated once


class Host:
    """An engine and a node before it, which keep their ports when they are started again."""

    def __init__(self, run: Run, name: str, bootstrap: Node | None) -> None:
        self._run = run
        self.name = name
        self.port, self.engine_port = _free_port(), _free_port()
        self.bootstrap = bootstrap.addr if bootstrap is not None else None
        self.engine = self.start_engine()
        self.node = self.start_node()
        self.busy = threading.Lock()  # held while it is in trouble
        self.ran_at = 0.0  # when its last fault had been undone

    def start_engine(self) -> Engine:
        options = ("--tokens", str(TOKENS), "--tokens-per-second", str(TOKENS_PER_SECOND))
        port = ("--port", str(self.engine_port))
        return self._run.cluster.start_engine(self.name, *options, *port)

    def start_node(self) -> Node:
        return self._run.cluster.start_node(
            self.name,
            *("--vram", "24GiB", "--expose", f"llm=127.0.0.1:{self.engine_port}"),
            bootstrap=self.bootstrap,
            listen=f"/ip4/127.0.0.1/tcp/{self.port}",
        )

    def suffer(self, fault: Fault) -> None:
        """Let the fault happen, wait, and undo it; returns when the host runs again."""
        match fault.kind:
            case "kill":
                self.node.kill()
                sleep(fault.lasts)
                self._start_again()
            case "stop":
                self.node.signal(signal.SIGSTOP)
                sleep(fault.lasts)
                self.node.signal(signal.SIGCONT)
            case "terminate":
                self.node.signal(signal.SIGTERM)
                code = self.node.wait(60)
                if code != 0:
                    self._run.complain(f"{self.name} exited with {code} when told to terminate")
                self._run.tell("ended", host=self.name)
                self._start_again()
            case "engine":
                self.engine.kill()
                sleep(fault.lasts)
                self.engine = self.start_engine().wait_ready()
        self.ran_at = self._run.now
        self._run.tell("runs", host=self.name)

    def _start_again(self) -> None:
        self.node = self.start_node()
        self.node.wait_ready(RECOVERY)


class Run:
    """One chaos run."""

    def __init__(self, args: argparse.Namespace, cluster: Cluster) -> None:
        self.args = args
        self.cluster = cluster
        self.requests: list[Request] = []
        self.problems: list[str] = []  # that no request tells of
        self.events: list[dict[str, Any]] = []
        self.recoveries: list[float] = []  # seconds from running again to being known as well
        self.done = threading.Event()
        self.began = 0.0
        self.hosts: list[Host] = []
        for number in range(args.hosts):
            first = self.hosts[0].node if self.hosts else None
            self.hosts.append(Host(self, f"host{number}", first))
            if number == 0:
                self.hosts[0].node.wait_ready(RECOVERY)
        for host in self.hosts:
            host.node.wait_ready(RECOVERY)
        self.timeline = Timeline(tuple(host.name for host in self.hosts))
        self.names = {host.node.peer_id: host.name for host in self.hosts}
        self.entries = [
            cluster.entry(self.hosts[number % len(self.hosts)].node, name=f"entry{number}")
            for number in range(args.entries)
        ]
        self._await(lambda: all(self._is_well(host) for host in self.hosts), "all hosts")

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return monotonic() - self.began

    def complain(self, problem: str) -> None:
        self.problems.append(problem)
        self.tell("problem", problem=problem)

    def tell(self, event: str, **what: Any) -> None:
        """Log an event with its time."""
        self.events.append({"at": round(self.now, 3), "event": event, **what})
        words = " ".join(
            f"{key}={value:.2f}" if isinstance(value, float) else f"{key}={value}"
            for key, value in what.items()
        )
        print(f"{self.now:9.3f}  {event} {words}", file=sys.stderr, flush=True)

    def _await(self, check: Any, what: str) -> bool:
        deadline = monotonic() + RECOVERY
        while not check():
            if monotonic() > deadline:
                self.complain(f"{what} not well again within {RECOVERY:g} s")
                return False
            sleep(0.1)
        return True

    def _is_well(self, host: Host) -> bool:
        """Whether every entry knows it to be online, with a service that works."""
        for entry in self.entries:
            try:
                rows = entry.peers()
            except OSError:
                return False
            row = next((row for row in rows if row["name"] == host.name), None)
            if row is None or not row["online"] or row["state"] == "draining":
                return False
            if not all(service["healthy"] for service in row["services"]):
                return False
        return True

    # Faults

    def trouble(self, host: Host, fault: Fault) -> None:
        with host.busy:
            trouble = Trouble(host.name, fault.kind, self.now)
            self.timeline.troubles.append(trouble)
            self.tell(fault.kind, host=host.name, lasts=fault.lasts)
            try:
                host.suffer(fault)
                self._await(lambda: self._is_well(host), host.name)
            except BaseException as exc:  # noqa: BLE001 - pytest's failures are no Exception
                self.complain(f"{host.name} did not come back: {exc}")
                return
            trouble.until = self.now
            self.recoveries.append(trouble.until - host.ran_at)
            self.tell("well", host=host.name, after=trouble.until - trouble.since)

    def make_trouble(self) -> None:
        """Let the planned faults happen at their times, but for hosts that are in trouble."""
        threads = []
        by_name = {host.name: host for host in self.hosts}
        faults = plan(
            random.Random(self.args.seed),
            [host.name for host in self.hosts],
            minutes=self.args.minutes,
            every=FAULT_EVERY,
        )
        for fault in faults:
            sleep(max(0.0, WARM_UP + fault.at - self.now))
            host = by_name[fault.host]
            if host.busy.locked():
                self.tell("left out", host=host.name, kind=fault.kind)
                continue
            threads.append(threading.Thread(target=self.trouble, args=(host, fault)))
            threads[-1].start()
        sleep(max(0.0, WARM_UP + self.args.minutes * 60 - self.now))
        for thread in threads:
            thread.join()

    # Traffic

    def ask_on(self, number: int) -> None:
        """Ask one entry after another, now for a stream and now for a whole answer."""
        rng = random.Random(f"{self.args.seed} client {number}")
        clients = [
            openai.OpenAI(
                base_url=entry.base_url,
                api_key="unused",
                max_retries=0,
                timeout=CLIENT_TIMEOUT,
            )
            for entry in self.entries
        ]
        while not self.done.is_set():
            at = rng.randrange(len(clients))
            request = self._ask(
                self.entries[at].argv[self.entries[at].argv.index("--name") + 1],
                clients[at],
                tokens=rng.randrange(1, TOKENS),
                stream=rng.random() < 0.5,
            )
            self.requests.append(request)
            if request.outcome != "served":
                why = self.timeline.untruth(request)
                self.tell(
                    "failed",
                    outcome=request.reason,
                    host=request.host,
                    took=request.ended - request.began,
                    verdict="true" if why is None else f"UNTRUE: {why}",
                    error=request.error[:300],
                )
            self.done.wait(rng.expovariate(10))
        for client in clients:
            client.close()

    def _ask(self, entry: str, client: openai.OpenAI, *, tokens: int, stream: bool) -> Request:
        began = self.now
        host: str | None = None
        status: int | None = None
        try:
            answer = client.chat.completions.with_raw_response.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=tokens,
                stream=stream,
            )
            host = self.names.get(answer.headers.get("x-meshnode-peer", ""))
            try:
                text, finish = _read(answer.parse(), stream)
            finally:
                answer.http_response.close()
            right = "".join(answer_words(EngineOptions(name=host or "?"), MODEL, tokens))
            whole = text == right and finish == "length"
            outcome = "served" if whole else "wrong"
            error = "" if whole else f"{finish}: {text[:100]!r}, not {right[:100]!r}"
        except openai.APITimeoutError as exc:
            outcome, error = "timeout", repr(exc)
        except openai.APIStatusError as exc:
            outcome, status, error = "status", exc.status_code, str(exc)
        except (openai.APIConnectionError, httpx.HTTPError) as exc:
            # What was under way when the stream broke, where the engine's head had come.
            outcome, error = ("cut" if host else "disconnected"), repr(exc)
        except openai.APIError as exc:  # an event of the stream
            outcome, error = "cut", str(exc)
        return Request(entry, began, self.now, stream, outcome, host, status, error)

    # The whole

    def run(self) -> dict[str, Any]:
        self.began = monotonic()
        asking = [threading.Thread(target=self.ask_on, args=(number,)) for number in range(CLIENTS)]
        for thread in asking:
            thread.start()
        sleep(WARM_UP)
        before = self._sizes()
        self.make_trouble()
        self.done.set()
        for thread in asking:
            thread.join()
        sleep(3)
        after = self._sizes()
        for entry in self.entries:
            if entry.child.poll() is not None:
                self.complain(f"an entry point ended with {entry.child.poll()}")
        return self._report(before, after)

    def _sizes(self) -> list[dict[str, float]]:
        found = []
        for entry in self.entries:
            process = psutil.Process(entry.pid)
            found.append(
                {
                    "rss_mib": round(process.memory_info().rss / 2**20, 1),
                    "descriptors": process.num_fds(),
                }
            )
        return found

    def _report(self, before: Any, after: Any) -> dict[str, Any]:
        failed = [one for one in self.requests if one.outcome != "served"]
        served = sorted(one.ended - one.began for one in self.requests if one.outcome == "served")
        untrue = [
            {**asdict(one), "why": why}
            for one in failed
            if (why := self.timeline.untruth(one)) is not None
        ]
        return {
            "schema_version": 1,
            "seed": self.args.seed,
            "minutes": self.args.minutes,
            "hosts": len(self.hosts),
            "entries": [
                {"before": old, "after": new} for old, new in zip(before, after, strict=True)
            ],
            "faults": dict(Counter(trouble.kind for trouble in self.timeline.troubles)),
            "requests": {
                "asked": len(self.requests),
                "served": len(served),
                "failed": dict(Counter(one.reason for one in failed)),
                "median_s": round(median(served), 3) if served else None,
                "slowest_s": round(served[-1], 3) if served else None,
            },
            "recovery": {
                "median_s": round(median(self.recoveries), 3) if self.recoveries else None,
                "slowest_s": round(max(self.recoveries), 3) if self.recoveries else None,
            },
            "untrue": untrue,
            "problems": self.problems,
            "events": self.events,
        }


def _read(answer: Any, stream: bool) -> tuple[str, str | None]:
    """Return (the text, why it ended)."""
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason
    words, finish = [], None
    for chunk in answer:
        for choice in chunk.choices:
            words.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    return "".join(words), finish


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    asked = report["requests"]
    table.add_row("seed", str(report["seed"]))
    table.add_row("faults", ", ".join(f"{n} {kind}" for kind, n in report["faults"].items()))
    table.add_row("asked", str(asked["asked"]))
    table.add_row("served whole and right", str(asked["served"]))
    for reason, count in sorted(asked["failed"].items()):
        table.add_row(f"failed: {reason}", str(count))
    table.add_row("of them, not true", str(len(report["untrue"])))
    table.add_row("served in", f"{asked['median_s']} s (median), {asked['slowest_s']} s (most)")
    back = report["recovery"]
    words = f"{back['median_s']} s (median), {back['slowest_s']} s (most) after it ran again"
    table.add_row("a host is well", words)
    for number, entry in enumerate(report["entries"]):
        old, new = entry["before"], entry["after"]
        words = f"{old['rss_mib']} → {new['rss_mib']} MiB"
        words += f", {old['descriptors']} → {new['descriptors']} descriptors"
        table.add_row(f"entry {number}", words)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for one in report["untrue"]:
        where = f"{one['began']:.3f}-{one['ended']:.3f} {one['entry']} {one['host'] or ''}"
        console.print(f"NOT TRUE {where} {one['outcome']} {one['status'] or ''}: {one['why']}")
        console.print(f"         {one['error']}", highlight=False)
    for problem in report["problems"]:
        console.print(f"PROBLEM {problem}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of traffic (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (default 1)")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--entries", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        cluster = Cluster(Path(folder))
        try:
            report = Run(args, cluster).run()
        finally:
            cluster.close()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)
    return 1 if report["untrue"] or report["problems"] or not report["requests"]["served"] else 0


if __name__ == "__main__":
    sys.exit(main())
