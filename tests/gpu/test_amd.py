from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.errors import GpuReadError
from meshnode.gpu.amd import AmdReader


def add_card(root: Path, name: str, total: str, used: str, **files: str) -> Path:
    folder = root / name / "device"
    folder.mkdir(parents=True)
    (folder / "mem_info_vram_total").write_text(total)
    (folder / "mem_info_vram_used").write_text(used)
    for file, text in files.items():
        (folder / file).write_text(text)
    return folder


def test_free_is_total_less_used_over_all_cards(tmp_path: Path) -> None:
    add_card(tmp_path, "card1", "17163091968\n", "163091968\n", product_name="Radeon PRO W7800\n")
    add_card(tmp_path, "card0", "8000000000\n", "1000000000\n", device="0x744c\n")
    memory = AmdReader(tmp_path).read()
    assert (memory.available, memory.total, memory.count) == (24000000000, 25163091968, 2)
    names = [(device.index, device.name) for device in memory.devices]
    assert names == [("0", "AMD GPU 0x744c"), ("1", "Radeon PRO W7800")]


def test_connectors_render_nodes_and_other_makers_are_no_amd_gpu(tmp_path: Path) -> None:
    add_card(tmp_path, "card0-DP-1", "8", "1")
    add_card(tmp_path, "renderD128", "8", "1")
    (tmp_path / "card2" / "device").mkdir(parents=True)
    with pytest.raises(GpuReadError) as caught:
        AmdReader(tmp_path).read()
    assert caught.value.code == "no_device"


def test_a_host_without_sysfs_has_no_amd_gpu(tmp_path: Path) -> None:
    with pytest.raises(GpuReadError) as caught:
        AmdReader(tmp_path / "absent").read()
    assert caught.value.code == "no_device"


@pytest.mark.parametrize("text", ["", "twelve", "-5"])
def test_a_value_that_is_no_size_is_an_error_and_not_a_zero(tmp_path: Path, text: str) -> None:
    add_card(tmp_path, "card0", text, "0")
    with pytest.raises(GpuReadError) as caught:
        AmdReader(tmp_path).read()
    assert caught.value.code == "bad_value"


def test_a_card_that_fails_does_not_hide_the_other(tmp_path: Path) -> None:
    add_card(tmp_path, "card0", "8000", "1000")
    broken = add_card(tmp_path, "card1", "8000", "0")
    (broken / "mem_info_vram_used").unlink()
    memory = AmdReader(tmp_path).read()
    assert (memory.available, memory.count) == (7000, 1)
    assert [device.error.code for device in memory.devices if device.error] == ["io_error"]


def test_more_used_than_there_is_means_nothing_free(tmp_path: Path) -> None:
    add_card(tmp_path, "card0", "1000", "1500")
    assert AmdReader(tmp_path).read().available == 0
