"""Streams and announcements: meshnode's host beside stock py-libp2p, and beside go-libp2p.

Every measurement runs between two processes on loopback. The stacks take turns, round by round,
so that a drift of the machine's speed falls on all of them; quoted are medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
GO_SOURCE = HERE.parent / "tests" / "interop" / "go"
STREAM_FIGURES = (
    ("connect_ms", "connect", "ms", False),
    ("open_ms", "open a stream + first round trip", "ms", False),
    ("ping_pong_ms", "ping-pong, 64 bytes", "ms", False),
    ("one_stream_mb_s", "one stream, one way", "MB/s", True),
    ("streams_trips_s", "1,000 streams at once, 64 bytes", "round trips/s", True),
    ("cpu_ms", "CPU per announcement heard", "ms", False),
)
TARGETS = {
    "connect_ms": "≤ 10 ms",
    "open_ms": "below stock",
    "ping_pong_ms": "below stock",
    "one_stream_mb_s": "≥ 1.5 × stock, ≥ 0.6 of go",
    "streams_trips_s": "≥ 8,000/s",
    "cpu_ms": "≤ 0.7 ms",
}
LIMIT_S = 180


def pair(
    server: list[str], client: list[str], *, server_says_last: bool = False
) -> dict[str, float]:
    """Run a server and its client; return what the client (or at last the server) printed."""
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as serving:
        assert serving.stdin is not None
        assert serving.stdout is not None
        try:
            addr = json.loads(serving.stdout.readline())["addr"]
            done = subprocess.run(
                [*client, addr], stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
            )
            serving.stdin.close()
            said = serving.stdout.read() if server_says_last else done.stdout
            result: dict[str, float] = json.loads(said)
            serving.wait(20)
        finally:
            serving.kill()
    return result


def python_peer(stack: str, role: str) -> list[str]:
    return [sys.executable, str(HERE / "bench_peer.py"), stack, role]


def measure_python(stack: str) -> dict[str, float]:
    figures = pair(python_peer(stack, "serve"), python_peer(stack, "bench"))
    heard = pair(python_peer(stack, "hear"), python_peer(stack, "tell"), server_says_last=True)
    return figures | heard


def build_go(folder: str) -> tuple[str | None, str]:
    """Return the path of the built Go peer, or None and the reason."""
    if shutil.which("go") is None:
        return None, "no Go toolchain on this machine"
    target = os.path.join(folder, "peer")
    built = subprocess.run(
        ["go", "build", "-o", target, "."],
        cwd=GO_SOURCE,
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        return None, "the Go peer does not build: " + built.stderr.strip().splitlines()[-1]
    return target, ""


def median(rounds: list[dict[str, float]], key: str) -> float | None:
    values = [figures[key] for figures in rounds if figures.get(key) is not None]
    return statistics.median(values) if values else None


def show(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    out = Table(title="medians", title_justify="left")
    out.add_column("")
    for column in ("unit", *results, "ours / stock", "ours / go", "target for ours"):
        out.add_column(column, justify="left" if "target" in column else "right")
    for key, label, unit, _ in STREAM_FIGURES:
        medians = {stack: median(rounds, key) for stack, rounds in results.items()}
        ours = medians["ours"]
        ratios = [
            show(ours / other) if ours and (other := medians.get(stack)) else "–"
            for stack in ("stock", "go")
        ]
        out.add_row(label, unit, *map(show, medians.values()), *ratios, TARGETS[key])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each stack (default 3)")
    parser.add_argument("--json", action="store_true", help="print every round as JSON")
    options = parser.parse_args()
    console = Console(stderr=True)
    results: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        with console.status("building the Go peer"):
            go, reason = build_go(folder)
        if go is None:
            console.print(f"without go-libp2p: {reason}")
        else:
            results["go"] = []
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=options.rounds * len(results))
            for _ in range(options.rounds):
                for stack, rounds in results.items():
                    progress.update(task, description=f"measuring {stack}")
                    if go is not None and stack == "go":
                        rounds.append(pair([go, "serve"], [go, "bench"]))
                    else:
                        rounds.append(measure_python(stack))
                    progress.advance(task)
    if options.json:
        print(json.dumps({"schema_version": 1, "rounds": results}))
        return
    out = Console()
    out.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        f"scripts/bench streams --rounds {options.rounds}"
    )
    out.print(table(results))
    opened = median(results["stock"], "streams_open")
    if opened is not None and opened < 1000:
        out.print(f"stock opened {opened:,.0f} of 1,000 streams, then waited for ever")


if __name__ == "__main__":
    main()
