"""Who belongs: the keys that prove membership, and the peers that are let in or kept out.

It may change while a node runs, as when a token is rotated; whoever acts on it watches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshnode.core.membership import MAX_KEYS, key_id


@dataclass(frozen=True, slots=True)
class Belonging:
    """What decides whether a peer belongs, at one time."""

    keys: tuple[bytes, ...]  # 1 to MAX_KEYS of 32 bytes, the preferred one first
    allowed: frozenset[str] | None = None  # peer IDs; None lets in whoever has a key
    blocked: frozenset[str] = frozenset()  # peer IDs; goes before ``allowed``

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= MAX_KEYS:
            raise ValueError(f"membership needs 1 to {MAX_KEYS} keys, not {len(self.keys)}")

    def objection(self, peer_id: str) -> str | None:
        """Return why the peer is kept out, whatever key it has; None if it is not."""
        if peer_id in self.blocked:
            return "it is on this node's block-list"
        if self.allowed is not None and peer_id not in self.allowed:
            return "it is not on this node's allow-list"
        return None

    def holds(self, identifier: bytes) -> bool:
        """Say whether the key named so (see ``membership.key_id``) is still valid."""
        return any(key_id(key) == identifier for key in self.keys)


class Membership:
    """The ``Belonging`` that holds now; watchers are told of each change, synchronously."""

    def __init__(self, first: Belonging) -> None:
        self.now = first
        self._watchers: list[Callable[[], None]] = []

    def watch(self, watcher: Callable[[], None]) -> None:
        self._watchers.append(watcher)

    def change(self, belonging: Belonging) -> bool:
        """Let ``belonging`` hold from now on; say whether that changes anything."""
        if belonging == self.now:
            return False
        self.now = belonging
        for watcher in self._watchers:
            watcher()
        return True


def by_keys(keys: Sequence[bytes]) -> Membership:
    """Return a membership that keeps nobody out who has one of ``keys``."""
    return Membership(Belonging(tuple(keys)))
