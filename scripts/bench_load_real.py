"""The same measure on real processes: hosts before engines, entry points, clients over HTTP.

Prints a JSON list with one row for each number of entry points, for scripts/bench_load.py.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.cluster import Cluster, Engine, Node, eventually

WORDS = 60
WORDS_PER_SECOND = 20.0  # so that one answer takes three seconds
SAMPLE = 0.25  # seconds
SETTLE = 6.0  # seconds before the first sample


def start(cluster: Cluster, hosts: int, entries: int) -> tuple[list[Engine], list[Node]]:
    engines = [
        cluster.start_engine(f"h{n}", "--tokens-per-second", str(WORDS_PER_SECOND))
        for n in range(hosts)
    ]
    nodes: list[Node] = []
    for number, engine in enumerate(engines):
        service = f"llm={engine.wait_ready().address}"
        vram = f"{8 + 8 * number}GiB"
        first = nodes[0] if nodes else None
        nodes.append(
            cluster.node(f"h{number}", "--vram", vram, "--expose", service, bootstrap=first)
        )
    doors = [
        cluster.node(f"e{n}", "--proxy", "127.0.0.1:0", bootstrap=nodes[0]) for n in range(entries)
    ]
    everybody = {f"h{n}" for n in range(hosts)}
    eventually(lambda: all(door.online() >= everybody for door in doors), within=60)
    return engines, doors


def ask(client: httpx.Client, door: Node) -> None:
    body = {
        "model": "demo-model",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": WORDS,
        "stream": True,
    }
    with client.stream("POST", f"{door.base_url}/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for _ in answer.iter_raw():
            continue


def measure(entries: int, hosts: int, per_host: float, seconds: float) -> dict[str, object]:
    rng = random.Random(1)
    rate = per_host * hosts / (WORDS / WORDS_PER_SECOND)
    samples: list[float] = []
    asked = 0
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        try:
            engines, doors = start(cluster, hosts, entries)
            over = threading.Event()

            def sample() -> None:
                while not over.wait(SAMPLE):
                    loads = [engine.stats()["in_flight"] for engine in engines]
                    if any(loads):
                        samples.append(max(loads) / mean(loads))

            limits = httpx.Limits(max_connections=None)
            with (
                httpx.Client(timeout=60, limits=limits) as client,
                ThreadPoolExecutor(256) as pool,
            ):
                until = time.monotonic() + SETTLE + seconds
                watching = threading.Timer(SETTLE, sample)
                watching.start()
                asking = []
                while time.monotonic() < until:
                    asking.append(pool.submit(ask, client, rng.choice(doors)))
                    asked += 1
                    time.sleep(rng.expovariate(rate))
                over.set()
                for one in asking:
                    one.result()
                watching.join()
        finally:
            cluster.close()
    return {"entries": entries, "hosts": hosts, "imbalance": mean(samples), "requests": asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--per-host", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    rows = [
        measure(entries, options.hosts, options.per_host, options.seconds) for entries in (1, 3)
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
