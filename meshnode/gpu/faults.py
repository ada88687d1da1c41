"""Why GPU memory can't be read, and what mends it: one row per code.

The codes are stable: they label ``meshnode_gpu_read_errors_total``.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshnode.errors import GpuReadError


@dataclass(frozen=True, slots=True)
class Fault:
    """What a code means."""

    what: str
    advice: str


FAULTS: dict[str, Fault] = {
    "library_not_found": Fault(
        "libnvidia-ml.so.1 is not installed",
        "on an NVIDIA host install its driver (in a container: start it with --gpus all)",
    ),
    "no_device": Fault("there is no GPU of this kind", "nothing to do, unless this host has one"),
    "driver_not_loaded": Fault(
        "the NVIDIA driver is not loaded", "run `nvidia-smi`, or `sudo modprobe nvidia`"
    ),
    "no_permission": Fault(
        "this user may not read the GPU",
        "add the user to the groups `video` and `render` (in a container: pass the device in)",
    ),
    "gpu_is_lost": Fault(
        "the GPU has fallen off the bus",
        "see `dmesg | grep -i xid`; reset it with `sudo nvidia-smi -r`, or reboot",
    ),
    "reset_required": Fault("the GPU wants a reset", "run `sudo nvidia-smi -r`"),
    "version_mismatch": Fault(
        "the NVIDIA library and the kernel module are of different versions",
        "reboot, or reload the nvidia kernel modules after a driver update",
    ),
    "no_mig_instance": Fault(
        "MIG is on, but has no instance that this user can see",
        "create one with `sudo nvidia-smi mig -cgi PROFILE -C`, or turn MIG off",
    ),
    "timeout": Fault(
        "the driver does not answer",
        "run `nvidia-smi`; if that hangs too, reset the GPU or reboot",
    ),
    "system_memory": Fault(
        "the system's available memory can't be read",
        "check that /proc/meminfo is readable, or set --vram",
    ),
    "io_error": Fault("the kernel's file for the GPU can't be read", "see `dmesg`"),
    "reader_failed": Fault(
        "the reader stumbled over what the driver said", "set --vram, and report it"
    ),
    "bad_value": Fault("the source gave a value that is no size", "set --vram, and report it"),
}

# What a host without that hardware says on every reading: no fault, as long as another
# reader finds some.
ABSENT = frozenset({"library_not_found", "no_device"})

# After these the next reader is asked. Any other fault means that hardware is there and fails,
# and a lesser source must not speak for it: an office card's memory is not that of the
# accelerator beside it.
PASSED_ON = ABSENT | {"driver_not_loaded"}


def gpu_error(code: str, detail: str = "") -> GpuReadError:
    """Make the error for ``code``; its text says what, where and what to do next."""
    fault = FAULTS.get(code, Fault(f"the driver reports {code}", "run `nvidia-smi`"))
    where = f" ({detail})" if detail else ""
    return GpuReadError(code, f"{fault.what}{where}; {fault.advice}")


def advice(error: GpuReadError) -> str:
    """Return what to do about ``error``, for a table's last column."""
    fault = FAULTS.get(error.code)
    return fault.advice if fault else "run `nvidia-smi`"
