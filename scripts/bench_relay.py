"""A link through a relay beside a direct one: three processes on loopback, two of them talking.

The two take turns, round by round; quoted are medians and ratios. Each byte is encrypted twice by
both ends and once more by the relay, so on a machine with few cores all three share them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess

from bench_streams import STREAM_FIGURES, median, pair, python_peer, show
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

TARGETS = {"one_stream_mb_s": "≥ 50 MB/s"}


def measure_relayed() -> dict[str, float]:
    with subprocess.Popen(
        python_peer("ours", "relay"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as relay:
        assert relay.stdin is not None
        assert relay.stdout is not None
        try:
            addr = json.loads(relay.stdout.readline())["addr"]
            behind = [*python_peer("ours", "behind"), addr]
            figures = pair(behind, python_peer("ours", "bench"))
            relay.stdin.close()
            relay.wait(20)
        finally:
            relay.kill()
    return figures


def measure_direct() -> dict[str, float]:
    return pair(python_peer("ours", "serve"), python_peer("ours", "bench"))


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    out = Table(title="medians", title_justify="left")
    for column in ("", "unit", "direct", "relayed", "relayed / direct", "target"):
        out.add_column(column, justify="left" if column in ("", "target") else "right")
    for key, label, unit, _ in STREAM_FIGURES:
        direct, relayed = (median(results[name], key) for name in ("direct", "relayed"))
        if direct is None or relayed is None:
            continue
        figures = map(show, (direct, relayed, relayed / direct))
        out.add_row(label, unit, *figures, TARGETS.get(key, ""))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench relay", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--json", action="store_true", help="print every round as JSON")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"direct": [], "relayed": []}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=options.rounds * len(results))
        for _ in range(options.rounds):
            for name, measure in (("direct", measure_direct), ("relayed", measure_relayed)):
                progress.update(task, description=f"measuring {name}")
                results[name].append(measure())
                progress.advance(task)
    if options.json:
        print(json.dumps({"schema_version": 1, "rounds": results}))
        return
    out = Console()
    out.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        f"scripts/bench relay --rounds {options.rounds}"
    )
    out.print(table(results))


if __name__ == "__main__":
    main()
