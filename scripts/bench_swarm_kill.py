"""Kills one of twenty real processes and times until each survivor has it offline.

Prints a JSON list of seconds, one for each survivor and run: ``bench_swarm_kill.py RUNS``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.cluster import Cluster, Node

PROCESSES = 20
LIMIT = 20.0  # seconds


def wait_for(check: object, within: float) -> None:
    deadline = time.monotonic() + within
    while not check():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"not so within {within:g} s")
        time.sleep(0.1)


def one_run(folder: Path) -> list[float]:
    cluster = Cluster(folder)
    try:
        first = cluster.node("node0")
        nodes = [cluster.start_node(f"node{n}", bootstrap=first) for n in range(1, PROCESSES)]
        nodes = [first, *(node.wait_ready() for node in nodes)]
        wait_for(lambda: all(len(node.online()) == PROCESSES for node in nodes), 60)
        time.sleep(5)  # until the links stand
        victim = nodes.pop()
        after: dict[str, float] = {}
        victim.kill()
        killed = time.monotonic()
        watchers = [
            threading.Thread(target=watch, args=(node, victim.peer_id, killed, after))
            for node in nodes
        ]
        for watcher in watchers:
            watcher.start()
        for watcher in watchers:
            watcher.join()
        if len(after) < len(nodes):
            raise SystemExit(f"{len(nodes) - len(after)} survivors noticed nothing")
        return list(after.values())
    finally:
        cluster.close()


def watch(node: Node, peer_id: str, killed: float, after: dict[str, float]) -> None:
    while time.monotonic() - killed < LIMIT:
        rows = {row["peer_id"]: row["online"] for row in node.peers()}
        if not rows.get(peer_id, False):
            after[node.peer_id] = time.monotonic() - killed
            return
        time.sleep(0.02)


def main() -> None:
    seconds: list[float] = []
    for _ in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as folder:
            seconds += one_run(Path(folder))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
