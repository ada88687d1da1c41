"""The HTTP gateway against its targets: an engine, a host, an entry node and a client on loopback.

Engine and client are cheap by design (bench_http.py); the two nodes are ``meshnode up`` as a user
starts it. All of them share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CLIENT = [sys.executable, str(HERE / "bench_http.py")]
READY_LIMIT = 30.0  # seconds
CONNECTIONS = 32
STREAMS = 200
CPU_STREAMS = 40  # few enough that events are not read several at a time
CANDIDATES = 1000
WINDOWS = {
    "head": "before the answer's head",
    "stream": "in mid-stream",
    "whole": "in an answer that is no stream",
}


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    key: str
    label: str
    value: float
    unit: str
    at_most: float | None = None  # the target, where less is better
    at_least: float | None = None  # the target, where more is
    note: str = ""

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:,g} {self.unit}"
        return "" if self.at_least is None else f"≥ {self.at_least:,g} {self.unit}"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def for_json(self) -> dict[str, object]:
        return {
            "key": self.key,
            "label": self.label,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "met": self.met,
            "note": self.note,
        }


def client(*args: object) -> dict[str, float]:
    done = subprocess.run(
        [*CLIENT, *map(str, args)], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@contextmanager
def child(argv: list[str], **env: str) -> Iterator[dict[str, Any]]:
    """Run a child until the block is left; yields the JSON line it begins with, and its pid."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
    with subprocess.Popen(
        argv,
        env=clean | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield json.loads(process.stdout.readline()) | {"pid": process.pid}
        finally:
            process.stdin.close()
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def node(folder: str, token: str, name: str, *flags: str) -> tuple[list[str], dict[str, str]]:
    argv = [sys.executable, "-m", "meshnode", "up", "--name", name, "--no-mdns"]
    argv += ["--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--log-format", "json"]
    argv += ["--log-level", "warning", "--state-dir", f"{folder}/{name}", *flags]
    return argv, {"MESHNODE_TOKEN": token}


def wait_until_served(address: str) -> None:
    deadline = time.monotonic() + READY_LIMIT
    body = json.dumps({"model": "bench", "messages": []}).encode()
    while True:
        asked = urllib.request.Request(f"http://{address}/v1/chat/completions", data=body)
        try:
            with urllib.request.urlopen(asked, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise SystemExit("the entry node did not find the host in time") from None
            time.sleep(0.1)


@contextmanager
def haproxy(engine: str, folder: str) -> Iterator[str | None]:
    """Run HAProxy in TCP mode before the engine, where it is installed."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = Path(folder) / "haproxy.cfg"
    config.write_text(
        "defaults\n mode tcp\n timeout connect 3s\n timeout client 60s\n timeout server 60s\n"
        f"listen l\n bind 127.0.0.1:{port}\n server s {engine}\n"
    )
    with subprocess.Popen(
        [program, "-f", str(config), "-db"], stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until_served(f"127.0.0.1:{port}")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def choosing() -> float:
    """Return the median milliseconds of one choice among 1,000 peers that have the model."""
    from meshnode.core.ledger import Ledger
    from meshnode.core.model_router import ModelRequest, ModelRouter
    from meshnode.core.node_data import NodeData, ServiceData
    from meshnode.core.router import Router

    ledger = Ledger("self")
    rng = random.Random(1)
    models = ModelRouter(Router(ledger, self_id="self", policy="vram", rng=rng), ledger, rng=rng)
    service = ServiceData(service_id="llm", models=("bench",), loaded=("bench",))
    for number in range(CANDIDATES):
        vram = rng.randrange(80) * 2**30
        peer = NodeData(id=f"peer{number}", services=(service,), available_vram=vram, seq=1)
        ledger.observe(peer, now=0.0)
    taken = []
    prompt = "You are a helpful assistant. " * 40
    for number in range(2000):
        asked = ModelRequest(now=1.0, model="bench", prompt=f"{prompt}{number % 50}")
        began = time.perf_counter()
        lease = models.lease(asked)
        taken.append(time.perf_counter() - began)
        lease.release()
    return statistics.median(taken) * 1000


@dataclass(frozen=True)
class Nodes:
    """What a request goes through: the client asks ``entry``, which asks ``host``."""

    folder: str
    engine: str  # HOST:PORT
    entry: str  # HOST:PORT
    pids: dict[str, int]  # of the two nodes


@contextmanager
def nodes(tell: Callable[[str], None]) -> Iterator[Nodes]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        made = subprocess.run(
            [sys.executable, "-m", "meshnode", "token", "new", "--network", "bench"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        token = made.stdout.strip()
        engine = stack.enter_context(child([*CLIENT, "engine"]))["address"]
        tell("starting two nodes")
        argv, env = node(folder, token, "host", "--expose", f"llm={engine}", "--health", "llm=tcp")
        host = stack.enter_context(child(argv, **env))
        argv, env = node(
            folder, token, "entry", "--proxy", "127.0.0.1:0", "--bootstrap", host["addrs"][0]
        )
        entry = stack.enter_context(child(argv, **env))
        wait_until_served(entry["proxy"])
        yield Nodes(folder, engine, entry["proxy"], {"entry": entry["pid"], "host": host["pid"]})


def measure(tell: Callable[[str], None], *, quick: bool) -> list[Row]:
    with nodes(tell) as path:
        rows = [added_latency(tell, path, 300 if quick else 1500)]
        rows.append(throughput(tell, path, 2 if quick else 6))
        rows.append(events(tell, path, 100 if quick else 400))
        rows += [freed(tell, path, window, 50 if quick else 200) for window in WINDOWS]
    if not quick:
        rows.append(first_token(tell))
    tell(f"choosing among {CANDIDATES:,}")
    rows.append(
        Row("choosing_ms", f"choosing among {CANDIDATES:,} peers", choosing(), "ms", at_most=0.3)
    )
    return rows


def measure_cpu(tell: Callable[[str], None], *, quick: bool) -> list[Row]:
    """Return what one request and one event cost each node; a busy machine changes it less."""
    rows = []
    with nodes(tell) as path:
        client("rate", CONNECTIONS, 1, path.entry)
        for what, argv in (
            ("request", ("rate", CONNECTIONS, 3 if quick else 8)),
            ("event", ("streams", CPU_STREAMS, 100 if quick else 200)),
        ):
            tell(f"the CPU time of one {what}")
            before = {name: cpu_time(pid) for name, pid in path.pids.items()}
            figures = client(*argv, path.entry)
            count = figures[f"{what}s"]
            for name, pid in path.pids.items():
                spent = (cpu_time(pid) - before[name]) / count * 1000
                label = f"CPU time of one {what}, {name}"
                rows.append(Row(f"{what}_cpu_ms_{name}", label, spent, "ms", note=f"{count:,}"))
    return rows


def cpu_time(pid: int) -> float:
    """Return the seconds of CPU time that a process of one thread has had (Linux)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def added_latency(tell: Callable[[str], None], path: Nodes, count: int) -> Row:
    tell("small requests, one after another")
    engine, entry = path.engine, path.entry
    medians = client("latency", count, engine, entry)
    note = f"{medians[entry]:.2f} ms, {medians[engine]:.2f} ms directly"
    added = medians[entry] - medians[engine]
    label = "added latency of a small request, median"
    return Row("added_ms", label, added, "ms", at_most=1.5, note=note)


def throughput(tell: Callable[[str], None], path: Nodes, seconds: int) -> Row:
    tell(f"{CONNECTIONS} connections at once")
    ours = client("rate", CONNECTIONS, seconds, path.entry)["per_second"]
    direct = client("rate", CONNECTIONS, seconds, path.engine)["per_second"]
    note = f"directly {direct:,.0f}/s"
    with haproxy(path.engine, path.folder) as address:
        if address is None:
            note += "; no HAProxy here"
        else:
            other = client("rate", CONNECTIONS, seconds, address)["per_second"]
            note += f"; HAProxy in TCP mode {other:,.0f}/s, ratio {ours / other:.2f}"
    label = f"requests/s, {CONNECTIONS} connections"
    return Row("per_second", label, ours, "/s", at_least=2500, note=note)


def events(tell: Callable[[str], None], path: Nodes, chunks: int) -> Row:
    tell(f"{STREAMS} streams of events")
    direct = client("streams", STREAMS, chunks, path.engine)
    ours = client("streams", STREAMS, chunks, path.entry)
    note = (
        f"{ours['events']:,.0f} events in order; p50 {ours['p50_ms']:.1f} ms, "
        f"p99 {ours['p99_ms']:.1f} ms; directly p99 {direct['p99_ms']:.1f} ms"
    )
    added = ours["p99_ms"] - direct["p99_ms"]
    label = f"{STREAMS} streams at 50 events/s, added p99"
    return Row("event_p99_ms", label, added, "ms", at_most=20, note=note)


def freed(tell: Callable[[str], None], path: Nodes, window: str, count: int) -> Row:
    """Return how soon the engine's connection is closed once a client has left."""
    where = WINDOWS[window]
    tell(f"{count} clients leave {where}")
    took = client("leave", window, count, path.engine, path.entry)
    note = f"p50 {took['p50_ms']:.1f} ms, longest {took['max_ms']:.1f} ms of {count}"
    label = f"engine freed when its client leaves {where}, p99"
    return Row(f"freed_{window}_p99_ms", label, took["p99_ms"], "ms", at_most=100, note=note)


def first_token(tell: Callable[[str], None]) -> Row:
    """Return how much sooner warm caches answer, by scripts/bench_prefix.py."""
    tell("conversations with four hosts, a minute")
    argv = [sys.executable, str(HERE / "bench_prefix.py"), "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    told = json.loads(done.stdout)
    warm, rotated = told["ways"]["prefix"], told["ways"]["round robin"]
    note = (
        f"median {warm['median_ms']:.0f} ms, round robin {rotated['median_ms']:.0f} ms; "
        f"p99 {warm['p99_ms']:.0f} and {rotated['p99_ms']:.0f} ms; "
        f"busiest host {warm['max_over_mean']:.2f} times the mean (≤ 1.3)"
    )
    label = "50 conversations, 4 hosts, first token sooner than round robin"
    return Row("first_token_times", label, told["times_faster"], "×", at_least=2, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench gateway", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a quarter of the time: less exact, and without the conversations",
    )
    parser.add_argument("--cpu", action="store_true", help="CPU time per request and event instead")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    with Console(stderr=True).status("measuring") as status:
        rows = (measure_cpu if options.cpu else measure)(status.update, quick=options.quick)
    if options.json:
        print(json.dumps({"schema_version": 1, "rows": [row.for_json() for row in rows]}))
        return
    out = Console()
    out.print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    table = Table()
    columns = ("", "measured") if options.cpu else ("", "", "measured", "target")
    for column in (*columns, "beside"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for row in rows:
        shown = f"{row.value:,.{3 if options.cpu else 2}f} {row.unit}"
        if row.met is None:
            table.add_row(row.label, shown, row.note)
        else:
            table.add_row("met" if row.met else "MISS", row.label, shown, row.target, row.note)
    out.print(table)


if __name__ == "__main__":
    main()
