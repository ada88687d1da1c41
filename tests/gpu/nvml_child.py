"""Reads through the real pynvml once per line on stdin; answers one JSON line each."""

from __future__ import annotations

import dataclasses
import json
import sys

from meshnode.errors import GpuReadError
from meshnode.gpu.nvml import NvmlReader
from meshnode.gpu.probe import describe
from meshnode.gpu.unified import SystemMemory

GIB = 1024**3


def system_memory() -> SystemMemory:
    return SystemMemory(available=100 * GIB, total=128 * GIB)


def main() -> None:
    reader = NvmlReader(system_memory=system_memory)
    for line in sys.stdin:
        answer: dict[str, object]
        if line.strip() == "describe":
            rows = describe([reader], time_limit=0.5)
            answer = {"rows": [dataclasses.asdict(row) for row in rows]}
        else:
            try:
                memory = reader.read()
            except GpuReadError as error:
                answer = {"code": error.code, "message": str(error)}
            else:
                answer = {
                    "available_gib": memory.available / GIB,
                    "total_gib": memory.total / GIB,
                    "count": memory.count,
                    "names": [device.name for device in memory.devices],
                    "indices": [device.index for device in memory.devices],
                    "codes": [d.error.code for d in memory.devices if d.error],
                }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
