"""Hosts whose GPU has no memory of its own: the system's available memory stands for it.

Linux says it in ``/proc/meminfo``: MemAvailable counts what can be had without swapping.
macOS has no such line; ``kern.memorystatus_level`` is the percentage that its own memory
watchdog calls available, and comes from the same ``sysctl`` call as the size.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshnode.gpu import GpuDevice, GpuMemory, sum_devices
from meshnode.gpu.faults import gpu_error

MEMINFO = Path("/proc/meminfo")
DEVICE_TREE = Path("/proc/device-tree")

_SYSCTL = ("/usr/sbin/sysctl", "-n", "hw.memsize", "kern.memorystatus_level")


@dataclass(frozen=True, slots=True)
class SystemMemory:
    """The memory of the host, bytes."""

    available: int
    total: int


SystemMemorySource = Callable[[], SystemMemory]


def read_system_memory(meminfo: Path = MEMINFO) -> SystemMemory:
    """Return the host's memory.

    Raises:
        GpuReadError: the kernel doesn't say.
    """
    try:
        if sys.platform == "darwin":
            return _parse_sysctl(
                subprocess.run(
                    _SYSCTL, capture_output=True, text=True, timeout=2, check=True
                ).stdout
            )
        return _parse_meminfo(meminfo.read_text(encoding="ascii", errors="replace"))
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as exc:
        raise gpu_error("system_memory", f"{type(exc).__name__}: {exc}") from exc


def _parse_meminfo(text: str) -> SystemMemory:
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return SystemMemory(available=_kib(rows["MemAvailable"]), total=_kib(rows["MemTotal"]))


def _kib(value: str) -> int:
    return int(value.split()[0]) * 1024


def _parse_sysctl(text: str) -> SystemMemory:
    total, percent = (int(line) for line in text.split())
    return SystemMemory(available=total * min(max(percent, 0), 100) // 100, total=total)


class UnifiedReader:
    """Apple silicon, and Jetsons older than NVML on Jetson.

    Any other host without a GPU must not offer its main memory as if it had one, so the reader
    looks for the two it knows before it answers.
    """

    source = "unified"

    def __init__(
        self,
        *,
        system_memory: SystemMemorySource = read_system_memory,
        device_tree: Path = DEVICE_TREE,
        machine: str | None = None,
    ) -> None:
        self._system_memory = system_memory
        self._device_tree = device_tree
        self._machine = machine or f"{sys.platform}-{platform.machine()}"

    def read(self) -> GpuMemory:
        name = self._device_name()
        if name is None:
            raise gpu_error("no_device", "neither Apple silicon nor a Jetson")
        memory = self._system_memory()
        return sum_devices(
            [GpuDevice("0", name, self.source, memory.available, memory.total, shared=True)]
        )

    def _device_name(self) -> str | None:
        if self._machine == "darwin-arm64":
            return "Apple silicon"
        try:
            compatible = (self._device_tree / "compatible").read_bytes()
            if b"nvidia,tegra" not in compatible:
                return None
            model = (self._device_tree / "model").read_bytes()
        except OSError:
            return None  # most hosts have no device tree at all
        return model.rstrip(b"\0").decode("utf-8", "replace")
