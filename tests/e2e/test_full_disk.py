"""A state folder on a disk that fills up: a warning, and the node goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import Cluster


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root, and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_node_comes_up_on_a_full_disk_with_its_old_identity_and_says_what_is_missing(
    cluster: Cluster, disk: Path
) -> None:
    state = ("--state-dir", str(disk))
    first = cluster.node("first", *state)
    first.close()
    kept = (disk / "identity.key").read_bytes()
    fill(disk)
    again = cluster.node("again", *state)
    assert again.peer_id == first.peer_id
    assert (disk / "identity.key").read_bytes() == kept
    (told,) = [line for line in again.log() if line["event"] == "api_key_not_written"]
    assert told["level"] == "warning" and "No space left" in told["error"]
    assert again.get("/healthz")


def test_without_room_for_an_identity_a_new_node_says_so_and_leaves_nothing_behind(
    cluster: Cluster, disk: Path
) -> None:
    fill(disk)
    node = cluster.start_node("new", "--state-dir", str(disk))
    assert node.wait(60) == 2
    assert "No space left on device" in node.log()[-1]["error"]
    assert [one.name for one in disk.iterdir()] == ["ballast"]
