"""A member in another language: a program that is told what to do by lines of JSON."""

from __future__ import annotations

import base64
import json
import queue
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import pytest

PATIENCE = 20.0  # seconds


class ForeignPeer:
    """One such program; it tells ``ready`` with its peer ID and its address first."""

    def __init__(self, argv: Sequence[str], cwd: str | None = None) -> None:
        self.child = subprocess.Popen(
            argv,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._events: dict[str, queue.Queue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = self.next("ready")
        self.peer_id = str(self.ready["peer"])
        self.addr = str(self.ready["addr"])

    def _of(self, event: str) -> queue.Queue[dict[str, Any]]:
        with self._lock:
            return self._events.setdefault(event, queue.Queue())

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            fields = json.loads(line)
            self._of(fields["event"]).put(fields)

    def next(self, event: str) -> dict[str, Any]:
        try:
            return self._of(event).get(timeout=PATIENCE)
        except queue.Empty:
            pytest.fail(f"the other peer told nothing of {event!r} within {PATIENCE:g} s")

    def next_of(self, event: str, peer_id: str) -> dict[str, Any]:
        """The next event about one peer; none of the others may be an error."""
        while True:
            told = self.next(event)
            assert "error" not in told, told
            if told["peer"] == peer_id:
                return told

    def do(self, what: str, **fields: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"do": what} | fields) + "\n")
        self.child.stdin.flush()
        return self.next(what)

    def tunnel(self, peer_id: str, service: str, data: bytes, **more: Any) -> dict[str, Any]:
        text = base64.b64encode(data).decode()
        return self.do("tunnel", peer=peer_id, service=service, data=text, **more)

    def close(self) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.close()
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait(5)
        self._reader.join(5)
        self.child.stdout.close()
