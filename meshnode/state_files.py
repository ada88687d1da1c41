"""Files of the state folder that may be lost: read within bounds, replaced whole, set aside.

The law here: whoever reads such a file sees the old content or the new one, never a part, even
if the power goes or the disk is full in the middle. All of it blocks; on the event loop, call it
in a thread.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshnode.errors import StateDamaged

_OWNER_ONLY = 0o600
_DRAFT = "new"
# Damaged files that are kept beside the good one: enough to see what went wrong, too few to fill
# a disk if it goes wrong at every start.
_MAX_SET_ASIDE = 9


def read_bounded(path: Path, max_bytes: int) -> bytes | None:
    """Return what is in ``path``, or None if there is no such file.

    Raises:
        StateDamaged: it holds more than ``max_bytes``.
        OSError: it can't be read, or is no file.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            data = file.read(max_bytes + 1) or b""
    except FileNotFoundError:
        return None
    if len(data) > max_bytes:
        raise StateDamaged(f"it is larger than the {max_bytes} bytes that it can have")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` in place of what is in ``path``, by a draft beside it, fsync and rename.

    Raises:
        OSError: no space, no permission, no folder; the old content is still there.
    """
    with _draft_of(path, data) as draft:
        draft.replace(path)
    _sync_folder(path.parent)


def create_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` into ``path`` unless there is such a file: then it stays as it is.

    Raises:
        OSError: no space, no permission, no folder; there is still no such file.
    """
    with _draft_of(path, data) as draft, suppress(FileExistsError):
        os.link(draft, path)  # of two processes that make it, the first one's counts
    _sync_folder(path.parent)


def remove_drafts(path: Path) -> None:
    """Remove what a process that was killed while writing ``path`` left beside it."""
    for draft in path.parent.glob(f"{path.name}.????????.{_DRAFT}"):
        with suppress(OSError):
            draft.unlink()


def set_aside(path: Path) -> Path:
    """Rename a damaged file to ``<name>.damaged-1`` and so on; return its new path.

    Raises:
        OSError: it can't be renamed.
    """
    for number in range(1, _MAX_SET_ASIDE + 1):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            break
    return path.replace(aside)


@contextmanager
def _draft_of(path: Path, data: bytes) -> Iterator[Path]:
    """Write ``data`` beside ``path``, safe on the disk; it is gone when the block is left."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{_DRAFT}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OWNER_ONLY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        with suppress(OSError):
            draft.unlink()


def _open_at_once(path: str, flags: int) -> int:
    # A pipe of that name must not hold up the start.
    return os.open(path, flags | os.O_NONBLOCK)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last; some file systems can't be asked to, and need not be."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
