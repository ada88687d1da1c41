"""NVIDIA GPUs through NVML, the driver's own library, by way of ``pynvml`` (nvidia-ml-py).

Three habits of NVML shape this file. With MIG on, a GPU's memory is that of its instances. A GPU
that shares the system's memory (GB10, Jetson) answers NOT_SUPPORTED, or a total of zero. And in a
container the count includes devices that the container may not open.
"""

from __future__ import annotations

from collections.abc import Iterator

import pynvml  # type: ignore[import-untyped]

from meshnode.errors import GpuReadError
from meshnode.gpu import GpuDevice, GpuMemory, sum_devices
from meshnode.gpu.faults import gpu_error
from meshnode.gpu.unified import SystemMemorySource, read_system_memory

_CODES: dict[int, str] = {
    pynvml.NVML_ERROR_UNINITIALIZED: "uninitialized",
    pynvml.NVML_ERROR_INVALID_ARGUMENT: "invalid_argument",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "not_supported",
    pynvml.NVML_ERROR_NO_PERMISSION: "no_permission",
    pynvml.NVML_ERROR_NOT_FOUND: "not_found",
    pynvml.NVML_ERROR_INSUFFICIENT_POWER: "insufficient_power",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "driver_not_loaded",
    pynvml.NVML_ERROR_TIMEOUT: "timeout",
    pynvml.NVML_ERROR_IRQ_ISSUE: "irq_issue",
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "library_not_found",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "function_not_found",
    pynvml.NVML_ERROR_CORRUPTED_INFOROM: "corrupted_inforom",
    pynvml.NVML_ERROR_GPU_IS_LOST: "gpu_is_lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "reset_required",
    pynvml.NVML_ERROR_OPERATING_SYSTEM: "operating_system",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "version_mismatch",
    pynvml.NVML_ERROR_MEMORY: "out_of_memory",
    pynvml.NVML_ERROR_NOT_READY: "not_ready",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "gpu_not_found",
    pynvml.NVML_ERROR_UNKNOWN: "unknown",
}

# Errors that say nothing against the library's handles; all others make the next read start anew.
_HARMLESS = frozenset({"no_permission", "no_mig_instance", "system_memory"})


class NvmlReader:
    """Every NVIDIA GPU of this host. Not thread-safe: one read at a time."""

    source = "nvml"

    def __init__(self, *, system_memory: SystemMemorySource = read_system_memory) -> None:
        self._system_memory = system_memory
        self._initialised = False

    def read(self) -> GpuMemory:
        try:
            devices = self._read_devices()
        except pynvml.NVMLError as exc:
            self._shut_down()
            raise _translate(exc) from exc
        if any(device.error and device.error.code not in _HARMLESS for device in devices):
            # A lost GPU's handles never recover, even after the GPU does.
            self._shut_down()
        return sum_devices(devices)

    def _read_devices(self) -> list[GpuDevice]:
        if not self._initialised:
            pynvml.nvmlInit()
            self._initialised = True
        count = pynvml.nvmlDeviceGetCount()
        if count == 0:
            raise gpu_error("no_device", "the NVIDIA driver runs, but lists none")
        return [device for index in range(count) for device in self._read_gpu(index)]

    def _shut_down(self) -> None:
        if not self._initialised:
            return
        self._initialised = False
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            return  # the driver is gone; the next nvmlInit says how

    def _read_gpu(self, index: int) -> Iterator[GpuDevice]:
        label = str(index)
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = _name(handle, f"NVIDIA GPU {index}")
            instances = list(_mig_instances(handle)) if _mig_is_on(handle) else None
        except pynvml.NVMLError as exc:
            error = _translate(exc, f"GPU {index}")
            yield GpuDevice(label, f"NVIDIA GPU {index}", self.source, error=error)
            return
        if instances is None:
            yield self._read_memory(handle, label, name)
        elif not instances:
            error = gpu_error("no_mig_instance", f"GPU {index}")
            yield GpuDevice(label, name, self.source, error=error)
        else:
            for number, instance in instances:
                yield self._read_memory(instance, f"{index}:{number}", _name(instance, name))

    def _read_memory(self, handle: object, label: str, name: str) -> GpuDevice:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            free, total = int(memory.free), int(memory.total)
        except pynvml.NVMLError as exc:
            if exc.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
                error = _translate(exc, f"GPU {label}")
                return GpuDevice(label, name, self.source, error=error)
            free = total = 0
        if total == 0:
            return self._read_shared(label, name)
        return GpuDevice(label, name, self.source, min(free, total), total)

    def _read_shared(self, label: str, name: str) -> GpuDevice:
        try:
            memory = self._system_memory()
        except GpuReadError as error:
            return GpuDevice(label, name, self.source, error=error, shared=True)
        return GpuDevice(label, name, self.source, memory.available, memory.total, shared=True)


def _mig_is_on(handle: object) -> bool:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError as exc:
        # Most GPUs have no MIG, and drivers before 450 lack the call.
        if exc.value in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return False
        raise
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _mig_instances(handle: object) -> Iterator[tuple[int, object]]:
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield number, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError as exc:
            # An empty slot, or another container's instance.
            if exc.value in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION):
                continue
            raise


def _name(handle: object, fallback: str) -> str:
    try:
        return str(pynvml.nvmlDeviceGetName(handle)) or fallback
    except (pynvml.NVMLError, UnicodeDecodeError):
        return fallback  # a name is decoration; the memory decides


def _translate(exc: pynvml.NVMLError, detail: str = "") -> GpuReadError:
    return gpu_error(_CODES.get(exc.value, f"nvml_{exc.value}"), detail)
