"""peers.json: written a moment after a change, whatever the disk does."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs

from meshnode.net import peer_file
from meshnode.net.peer_file import PeerFile

A, B = "12D3KooWAAAAAAAA", "12D3KooWBBBBBBBB"


def addr(peer_id: str) -> str:
    return f"/ip4/192.0.2.7/tcp/4201/p2p/{peer_id}"


def ids_in(path: Path) -> list[str]:
    return [row["peer_id"] for row in json.loads(path.read_text())["peers"]]


def loaded(path: Path, network: str = "home") -> PeerFile:
    file = PeerFile(path, network)
    file.load()
    return file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "peers.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real time: a thread writes. The pauses are those of a patient node, not of a test."""
    for name in ("_SETTLE", "_PAUSE", "_RETRY"):
        monkeypatch.setattr(peer_file, name, 0.02)


@contextmanager
def logged() -> Iterator[list[dict]]:
    with capture_logs() as entries:
        yield entries


@contextmanager
def in_the_way(path: Path) -> Iterator[Callable[[], None]]:
    """Put there what nobody can write over, not even root."""
    path.mkdir()
    yield path.rmdir


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    yield
    structlog.reset_defaults()


async def test_a_change_is_on_the_disk_a_moment_later(
    path: Path, quick: None, nursery, wait_until
) -> None:
    file = loaded(path)
    nursery.start_soon(file.save_forever)
    file.known.note(A, (addr(A),))
    await wait_until(path.exists, within=5)
    file.known.note(B, (addr(B),))
    await wait_until(lambda: ids_in(path) == [B, A], within=5)
    assert [p.peer_id for p in loaded(path).known.latest_first()] == [B, A]


async def test_a_change_just_before_the_end_is_not_lost(path: Path, nursery, wait_until) -> None:
    file = loaded(path)
    nursery.start_soon(file.save_forever)
    await trio.testing.wait_all_tasks_blocked()
    file.known.note(A, (addr(A),))
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await wait_until(path.exists, within=5)
    assert ids_in(path) == [A]


def test_damage_is_set_aside_and_said_and_the_good_entries_count(path: Path) -> None:
    good = {"peer_id": A, "addrs": [addr(A)]}
    edited = json.dumps({"schema_version": 1, "network": "home", "peers": [good, {"peer_id": 7}]})
    path.write_text(edited)
    with logged() as entries:
        file = loaded(path)
    assert [p.peer_id for p in file.known.latest_first()] == [A]
    aside = path.with_name("peers.json.damaged-1")
    assert aside.read_text() == edited
    (entry,) = entries
    assert (entry["event"], entry["log_level"]) == ("peers_file_damaged", "warning")
    assert entry["kept_as"] == str(aside)
    assert "peers[1]" in entry["error"]


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b'{"schema_version": 2}', b"x" * 2**21])
def test_a_file_that_is_none_is_set_aside_whole(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with logged() as entries:
        assert len(loaded(path).known) == 0
    assert [entry["event"] for entry in entries] == ["peers_file_damaged"]
    assert path.with_name("peers.json.damaged-1").read_bytes() == content
    assert not path.exists()


def test_peers_of_another_network_are_not_dialled(path: Path) -> None:
    row = {"peer_id": A, "addrs": [addr(A)]}
    path.write_text(json.dumps({"schema_version": 1, "network": "work", "peers": [row]}))
    assert len(loaded(path, "home").known) == 0
    assert len(loaded(path, "work").known) == 1


async def test_a_disk_that_takes_nothing_is_said_once_and_again_when_it_does(
    path: Path, quick: None, nursery, wait_until
) -> None:
    file = loaded(path)
    with logged() as entries, in_the_way(path) as clear:
        nursery.start_soon(file.save_forever)
        file.known.note(A, (addr(A),))
        await wait_until(lambda: entries, within=5)
        file.known.note(B, (addr(B),))
        await trio.sleep(0.3)  # some more tries
        assert [(e["event"], e["log_level"]) for e in entries] == [("peers_not_saved", "warning")]
        clear()
        await wait_until(path.exists, within=5)
        await wait_until(lambda: len(entries) == 2, within=5)
    assert entries[1]["event"] == "peers_saved_again"
    assert ids_in(path) == [B, A]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
async def test_a_folder_that_may_not_be_written_keeps_the_old_file(path: Path, quick: None) -> None:
    file = loaded(path)
    file.known.note(A, (addr(A),))
    await file._save()
    path.parent.chmod(0o500)
    file.known.note(B, (addr(B),))
    await file._save()
    path.parent.chmod(0o700)
    assert ids_in(path) == [A]


async def test_a_hanging_disk_holds_up_neither_the_loop_nor_the_end(
    path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_file, "_WRITE_TIMEOUT", 0.2)
    hanging = threading.Event()
    monkeypatch.setattr(peer_file, "write_atomically", lambda *_: hanging.wait(10))
    file = loaded(path)
    try:
        with logged() as entries, trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.save_forever)
                file.known.note(A, (addr(A),))
                turns = 0
                while not entries:
                    await trio.sleep(0.01)
                    turns += 1
                nursery.cancel_scope.cancel()
        assert "longer than" in entries[0]["error"]
        assert turns > 3
    finally:
        hanging.set()
