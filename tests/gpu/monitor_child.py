"""Runs a GpuMonitor over the real pynvml, and measures how late the event loop's timers fire.

Each line on stdin is a word to wait for: "known" or "unknown" (the monitor's next such state), or
"rounds" (twenty more rounds). The answer is one JSON line of measurements since the last answer.
"""

from __future__ import annotations

import json
import sys
import threading

import structlog
import trio
from prometheus_client import generate_latest

from meshnode.gpu import GpuMemory
from meshnode.gpu.monitor import GpuMonitor
from meshnode.gpu.nvml import NvmlReader
from meshnode.metrics import Metrics

INTERVAL = 0.05
TICK = 0.005


class Node:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.monitor = GpuMonitor([NvmlReader()], self.metrics, interval=INTERVAL, time_limit=0.2)
        self.changed = trio.Event()
        self.worst_lag = 0.0
        self.began = trio.current_time()

    def on_change(self, memory: GpuMemory | None) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def measure_lag_forever(self) -> None:
        while True:
            due = trio.current_time() + TICK
            await trio.sleep(TICK)
            self.worst_lag = max(self.worst_lag, trio.current_time() - due)

    async def wait_for(self, word: str) -> None:
        if word == "rounds":
            await trio.sleep(20 * INTERVAL)
            return
        while (self.monitor.latest is not None) != (word == "known"):
            await self.changed.wait()

    def report(self) -> dict[str, object]:
        latest, error = self.monitor.latest, self.monitor.error
        answer = {
            "available": latest.available if latest else None,
            "code": error.code if error else None,
            "worst_lag_s": self.worst_lag,
            "elapsed_s": trio.current_time() - self.began,
            "gpu_threads": sum(thread.name == "gpu-nvml" for thread in threading.enumerate()),
            "metrics": generate_latest(self.metrics.registry).decode(),
        }
        self.worst_lag, self.began = 0.0, trio.current_time()
        return answer


async def main() -> None:
    node = Node()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.measure_lag_forever)
        await nursery.start(node.monitor.watch_forever, node.on_change)
        while True:
            # In a process of its own, so an abandoned read of stdin harms nobody.
            line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
            if not line:
                nursery.cancel_scope.cancel()
                return
            with trio.fail_after(10):
                await node.wait_for(line.strip())
            print(json.dumps(node.report()), flush=True)


if __name__ == "__main__":
    # stdout is for the answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    trio.run(main)
