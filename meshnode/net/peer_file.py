"""``peers.json``: the peers a node was linked to, written down so that it finds them again.

Nothing of the mesh waits for the disk: a change is written a moment later in a thread. Nothing of
the mesh ends by it either: what can't be read is set aside, what can't be written is said once,
and the node goes on with what it has in memory.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import structlog
import trio

from meshnode.core import known_peers
from meshnode.core.known_peers import KnownPeers
from meshnode.errors import StateDamaged
from meshnode.state_files import read_bounded, remove_drafts, set_aside, write_atomically

FILE_NAME = "peers.json"
# Changes come in bursts, when a node joins; a kill -9 loses no more than this.
_SETTLE = 1.0  # seconds
_PAUSE = 5.0  # seconds between two writes
_RETRY = 30.0  # seconds after a write that failed
# A disk that hangs holds up neither the loop nor, for longer than this, the node's end.
_WRITE_TIMEOUT = 2.0  # seconds

log = structlog.get_logger(__name__)


class PeerFile:
    """Keeps ``known`` and a file in step.

    Args:
        network: peers that a file names under another network are not dialled.
    """

    def __init__(self, path: Path, network: str) -> None:
        self.known = KnownPeers(on_change=self._note_change)
        self._path = path
        self._network = network
        self._changed = trio.Event()
        self._is_failing = False

    def load(self) -> None:
        """Read the file before the node starts; what is wrong with it is a warning at most."""
        remove_drafts(self._path)
        try:
            data = read_bounded(self._path, known_peers.MAX_FILE_BYTES)
            content = known_peers.decode(data) if data is not None else None
        except StateDamaged as exc:
            self._set_aside(str(exc))
            return
        except OSError as exc:
            log.warning("peers_file_unreadable", path=str(self._path), error=_why(exc))
            return
        if content is None:
            return
        if content.faults:
            self._set_aside("; ".join(content.faults))
        if content.network != self._network:
            log.info("peers_file_of_another_network", path=str(self._path))
            return
        self.known.restore(content.peers)

    async def save_forever(self) -> None:
        """Write the file whenever something changed, and once more when cancelled."""
        try:
            while True:
                await self._changed.wait()
                await trio.sleep(_SETTLE)
                self._changed = trio.Event()
                await self._save()
                if self._is_failing:
                    self._changed.set()
                await trio.sleep(_RETRY if self._is_failing else _PAUSE)
        finally:
            if self._changed.is_set() and not self._is_failing:
                await self._save()

    async def _save(self) -> None:
        data = known_peers.encode(self._network, self.known.latest_first())
        write = partial(write_atomically, self._path, data)
        error: str | None = f"the disk took longer than {_WRITE_TIMEOUT:g} s"
        # Shielded: a write that was begun is waited for, or the last one would race with it.
        with trio.move_on_after(_WRITE_TIMEOUT, shield=True):
            try:
                await trio.to_thread.run_sync(write, abandon_on_cancel=True)
            except OSError as exc:
                error = _why(exc)
            else:
                error = None
        self._tell(error)

    def _tell(self, error: str | None) -> None:
        """Log when saving begins to fail, and when it works again."""
        if error is not None and not self._is_failing:
            log.warning(
                "peers_not_saved",
                path=str(self._path),
                error=error,
                advice="the node goes on; after a restart it needs a bootstrap to find its mesh",
            )
        elif error is None and self._is_failing:
            log.info("peers_saved_again", path=str(self._path))
        self._is_failing = error is not None

    def _set_aside(self, why: str) -> None:
        try:
            kept_as: str | None = str(set_aside(self._path))
        except OSError as exc:
            kept_as, why = None, f"{why}; it can't be set aside: {_why(exc)}"
        log.warning("peers_file_damaged", path=str(self._path), error=why, kept_as=kept_as)

    def _note_change(self) -> None:
        self._changed.set()


def _why(exc: OSError) -> str:
    return exc.strerror or str(exc)
