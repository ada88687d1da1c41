"""A size set by hand (``--vram``), for tests and for hosts whose GPU no reader knows."""

from __future__ import annotations

from meshnode.gpu import GpuDevice, GpuMemory, sum_devices


class FixedReader:
    """Always says that ``vram`` bytes are free, out of as many."""

    source = "fixed"

    def __init__(self, vram: int) -> None:
        self._vram = vram

    def read(self) -> GpuMemory:
        device = GpuDevice("0", "set by --vram", self.source, self._vram, self._vram)
        return sum_devices([device])
