"""AMD GPUs through sysfs: the amdgpu driver writes two plain numbers, so no library is needed.

Format: https://docs.kernel.org/gpu/amdgpu/driver-misc.html (mem_info_vram_total, ..._used).
"""

from __future__ import annotations

import re
from pathlib import Path

from meshnode.errors import GpuReadError
from meshnode.gpu import GpuDevice, GpuMemory, sum_devices
from meshnode.gpu.faults import gpu_error

DRM = Path("/sys/class/drm")

# Connectors (card0-DP-1) and render nodes stand in the same folder.
_CARD = re.compile(r"card(\d+)")


class AmdReader:
    """Every card under ``root`` whose driver tells its VRAM."""

    source = "amd"

    def __init__(self, root: Path = DRM) -> None:
        self._root = root

    def read(self) -> GpuMemory:
        devices = [self._device(number, folder) for number, folder in self._cards()]
        if not devices:
            raise gpu_error("no_device", f"no card under {self._root} tells its VRAM")
        return sum_devices(devices)

    def _cards(self) -> list[tuple[int, Path]]:
        try:
            entries = list(self._root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise _translate(exc) from exc
        matches = ((_CARD.fullmatch(entry.name), entry / "device") for entry in entries)
        cards = [(int(match[1]), folder) for match, folder in matches if match]
        # Cards of other makers have no such file.
        return sorted(card for card in cards if (card[1] / "mem_info_vram_total").exists())

    def _device(self, number: int, folder: Path) -> GpuDevice:
        name = _read_name(folder)
        try:
            total = _read_size(folder / "mem_info_vram_total")
            used = _read_size(folder / "mem_info_vram_used")
        except GpuReadError as error:
            return GpuDevice(str(number), name, self.source, error=error)
        return GpuDevice(str(number), name, self.source, max(0, total - used), total)


def _read_size(path: Path) -> int:
    try:
        size = int(path.read_text(encoding="ascii"))
    except OSError as exc:
        raise _translate(exc) from exc
    except ValueError as exc:
        raise gpu_error("bad_value", str(path)) from exc
    if size < 0:
        raise gpu_error("bad_value", str(path))
    return size


def _read_name(folder: Path) -> str:
    for file in ("product_name", "device"):
        try:
            text = (folder / file).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue  # only some boards carry a product name
        if text:
            return text if file == "product_name" else f"AMD GPU {text}"
    return "AMD GPU"


def _translate(exc: OSError) -> GpuReadError:
    code = "no_permission" if isinstance(exc, PermissionError) else "io_error"
    return gpu_error(code, f"{exc.filename}: {exc.strerror}")
