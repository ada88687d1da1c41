"""Which readers this host has, and what each of them says: the rows of ``meshnode gpus``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from meshnode.errors import GpuReadError
from meshnode.gpu import GpuDevice, GpuMemory, VramReader
from meshnode.gpu.amd import AmdReader
from meshnode.gpu.faults import PASSED_ON, advice, gpu_error
from meshnode.gpu.fixed import FixedReader
from meshnode.gpu.nvml import NvmlReader
from meshnode.gpu.unified import UnifiedReader


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One line of ``meshnode gpus``; unknown values are None."""

    source: str
    index: str | None  # None: the reader found no device
    name: str | None
    available: int | None  # bytes
    total: int | None  # bytes
    shared: bool  # the system's own memory, counted once over all devices
    announced: bool  # part of what this host announces
    error: str | None  # a code
    message: str | None
    advice: str | None


def find_readers(vram: int | None = None) -> tuple[VramReader, ...]:
    """Return the readers in order of precedence; ``vram`` (bytes) overrules them all."""
    if vram is not None:
        return (FixedReader(vram),)
    return (NvmlReader(), AmdReader(), UnifiedReader())


def describe(readers: Sequence[VramReader], *, time_limit: float = 3.0) -> tuple[GpuRow, ...]:
    """Ask every reader once, each for at most ``time_limit`` seconds."""
    rows: list[GpuRow] = []
    found = False  # a reader above has spoken for the host, as in GpuMonitor
    for reader in readers:
        answer = _read_with_limit(reader, time_limit)
        if isinstance(answer, GpuReadError):
            rows.append(_row(GpuDevice("", "", reader.source, error=answer), announced=False))
            found = found or answer.code not in PASSED_ON
            continue
        rows += [_row(device, announced=not found) for device in answer.devices]
        found = True
    return tuple(rows)


def _read_with_limit(reader: VramReader, time_limit: float) -> GpuMemory | GpuReadError:
    answers: list[GpuMemory | GpuReadError] = []

    def read() -> None:
        try:
            answers.append(reader.read())
        except GpuReadError as error:
            answers.append(error)

    # A daemon: a hung driver must not keep the command from ending.
    thread = threading.Thread(target=read, name=f"gpu-{reader.source}", daemon=True)
    thread.start()
    thread.join(time_limit)
    # The thread may answer between the two lines, so the answer is asked and not the thread.
    return answers[0] if answers else gpu_error("timeout", reader.source)


def _row(device: GpuDevice, *, announced: bool) -> GpuRow:
    error = device.error
    return GpuRow(
        source=device.source,
        index=device.index or None,
        name=device.name or None,
        available=device.available,
        total=device.total,
        shared=device.shared,
        announced=announced and device.available is not None,
        error=error.code if error else None,
        message=str(error) if error else None,
        advice=advice(error) if error else None,
    )
