from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.errors import GpuReadError
from meshnode.gpu.unified import (
    SystemMemory,
    UnifiedReader,
    _parse_sysctl,
    read_system_memory,
)

MEMINFO = """\
MemTotal:       65000000 kB
MemFree:         1000000 kB
MemAvailable:   48000000 kB
HugePages_Total:       0
"""


def system_memory() -> SystemMemory:
    return SystemMemory(available=48, total=64)


@pytest.mark.skipif("sys.platform != 'linux'")
def test_available_is_what_can_be_had_without_swapping(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text(MEMINFO)
    assert read_system_memory(file) == SystemMemory(48000000 * 1024, 65000000 * 1024)


@pytest.mark.skipif("sys.platform != 'linux'")
@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemTotal: 5 kB\nMemAvailable: x kB\n"])
def test_a_meminfo_without_the_line_is_an_error_that_says_so(tmp_path: Path, text: str) -> None:
    file = tmp_path / "meminfo"
    file.write_text(text)
    with pytest.raises(GpuReadError) as caught:
        read_system_memory(file)
    assert caught.value.code == "system_memory"


def test_macos_tells_its_size_and_a_percentage() -> None:
    assert _parse_sysctl("17179869184\n50\n") == SystemMemory(8589934592, 17179869184)


def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path) -> None:
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768\0nvidia,tegra234\0")
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    reader = UnifiedReader(
        system_memory=system_memory, device_tree=tmp_path, machine="linux-aarch64"
    )
    memory = reader.read()
    assert (memory.available, memory.total, memory.count) == (48, 64, 1)
    assert memory.devices[0].name == "NVIDIA Jetson Orin Nano"


def test_apple_silicon_needs_no_device_tree(tmp_path: Path) -> None:
    reader = UnifiedReader(
        system_memory=system_memory, device_tree=tmp_path, machine="darwin-arm64"
    )
    assert reader.read().available == 48


def test_a_host_without_a_gpu_never_offers_its_main_memory(tmp_path: Path) -> None:
    (tmp_path / "compatible").write_bytes(b"raspberrypi,5-model-b\0")
    for tree in (tmp_path, tmp_path / "absent"):
        reader = UnifiedReader(
            system_memory=system_memory, device_tree=tree, machine="linux-aarch64"
        )
        with pytest.raises(GpuReadError) as caught:
            reader.read()
        assert caught.value.code == "no_device"
