"""Files that may be lost: never half written, never in the way of a start."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.errors import StateDamaged
from meshnode.state_files import (
    create_atomically,
    read_bounded,
    remove_drafts,
    set_aside,
    write_atomically,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "things.json"


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.parent.iterdir())


def test_what_was_written_is_read_and_only_its_owner_may(path: Path) -> None:
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert read_bounded(path, 3) == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(path) == ["things.json"]


def test_a_file_that_is_not_there_is_none(path: Path) -> None:
    assert read_bounded(path, 10) is None


def test_a_file_beyond_its_bound_is_damaged(path: Path) -> None:
    path.write_bytes(b"x" * 11)
    with pytest.raises(StateDamaged, match="larger than the 10 bytes"):
        read_bounded(path, 10)


def test_a_folder_or_a_pipe_in_its_place_does_not_hold_up_the_start(path: Path) -> None:
    os.mkfifo(path)
    assert read_bounded(path, 10) == b""
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        read_bounded(path, 10)


@pytest.mark.parametrize("step", ["os.fdopen", "os.fsync", "pathlib.Path.replace"])
def test_whatever_fails_the_old_content_stays_and_no_draft(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(path) == ["things.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(path, b"old")
    real_open = os.open
    monkeypatch.setattr(
        "os.open", lambda _path, _flags, _mode=0: real_open("/dev/full", os.O_WRONLY)
    )
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"


def test_a_writer_killed_again_and_again_never_leaves_half_a_file(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from meshnode.state_files import write_atomically\n"
        "path = Path(sys.argv[1])\n"
        "print(flush=True)\n"
        "while True:\n"
        "    for letter in b'ab': write_atomically(path, bytes([letter]) * 300_000)\n"
    )
    for attempt in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            # Nothing to wait for but the passing of some writes.
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(0.05 + 0.013 * attempt)
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert content in (b"a" * 300_000, b"b" * 300_000)
    remove_drafts(path)
    assert names(path) == ["things.json"]


def test_only_drafts_of_this_very_file_are_removed(path: Path) -> None:
    kept = ["identity.key", "identity.key.01234567.new", "things.json", "things.json.damaged-1"]
    for name in [*kept, "things.json.89abcdef.new"]:
        (path.parent / name).touch()
    remove_drafts(path)
    assert names(path) == kept


def test_damaged_ones_are_kept_and_bounded(path: Path) -> None:
    for number in range(1, 13):
        path.write_text(str(number))
        aside = set_aside(path)
        assert not path.exists()
        assert aside.read_text() == str(number)
    assert len(names(path)) == 9
    assert (path.parent / "things.json.damaged-1").read_text() == "1"
    assert (path.parent / "things.json.damaged-9").read_text() == "12"


def test_what_is_made_once_is_never_replaced(path: Path) -> None:
    create_atomically(path, b"first")
    create_atomically(path, b"second")
    assert read_bounded(path, 10) == b"first"
    assert names(path) == ["things.json"]


@pytest.mark.parametrize("step", ["os.fdopen", "os.fsync", "os.link"])
def test_what_could_not_be_made_is_not_there_in_part(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space left"):
        create_atomically(path, b"new")
    monkeypatch.undo()
    assert names(path) == []
