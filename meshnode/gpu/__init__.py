"""Free GPU memory, from whichever source this host has.

A reader knows one source. The first that finds hardware speaks for the host, and the monitor
reads it again and again without ever letting it hold up the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshnode.errors import GpuReadError

__all__ = ["GpuDevice", "GpuMemory", "VramReader", "sum_devices"]


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One GPU, or one MIG instance, as one reader sees it."""

    index: str  # "0"; "0:1" is MIG instance 1 of GPU 0
    name: str
    source: str  # which reader: nvml, amd, unified, fixed
    available: int | None = None  # free bytes; None = unknown
    total: int | None = None  # bytes
    shared: bool = False  # the memory is the system's, shared by every device so marked
    error: GpuReadError | None = None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """The GPU memory of this host, summed over its devices."""

    available: int  # free bytes
    total: int  # bytes
    count: int  # GPUs; MIG instances count one each
    devices: tuple[GpuDevice, ...] = field(default=(), compare=False, repr=False)


class VramReader(Protocol):
    """One source of GPU memory."""

    @property
    def source(self) -> str:
        """A short word for logs and tables."""
        ...

    def read(self) -> GpuMemory:
        """Read now; may block for as long as a driver likes.

        Raises:
            GpuReadError: nothing can be read; its code is one of ``faults.py``.
        """
        ...


def sum_devices(devices: Sequence[GpuDevice]) -> GpuMemory:
    """Sum those that can be read; the system's memory counts once, however many share it.

    Raises:
        GpuReadError: none can be read; it is the first device's own error.
    """
    readable = [device for device in devices if device.available is not None]
    if not readable:
        for device in devices:
            if device.error is not None:
                raise device.error
        raise GpuReadError("no_device", "there is no GPU")
    counted = [device for device in readable if not device.shared]
    counted += [device for device in readable if device.shared][:1]
    return GpuMemory(
        available=sum(device.available or 0 for device in counted),
        total=sum(device.total or 0 for device in counted),
        count=len(readable),
        devices=tuple(devices),
    )
