"""Where peers were reached before, kept across restarts, and its form in the state folder.

The law here: the file may be cut short, of another version, or edited by hand. Whatever bytes
there are, ``decode`` returns peers that each hold by themselves, or says that nothing can be made
of them; it never trusts an entry further than to try it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meshnode.errors import StateDamaged

SCHEMA_VERSION = 1
# A third of them alive is more than enough to find the rest through one ledger.
MAX_KNOWN_PEERS = 256
# The one that worked, and what else the peer says of itself: LAN, VPN, IPv6.
MAX_ADDRS_PER_PEER = 4
_MAX_ADDR = 256  # characters, as in an announcement
# 256 peers of 4 addresses each take 300 KiB at the very most.
MAX_FILE_BYTES = 1024 * 1024
# Faults told to a person; a file with more of them is broken, not mistyped.
_MAX_FAULTS = 8

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{8,128}")


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """A peer, and multiaddrs that end in ``/p2p/<peer_id>``, the one most likely to work first."""

    peer_id: str
    addrs: tuple[str, ...]


class KnownPeers:
    """The peers that a node was linked to, the latest last; bounded.

    Args:
        on_change: called when something changed that is worth writing down.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._addrs: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._addrs)

    def latest_first(self) -> tuple[KnownPeer, ...]:
        return tuple(KnownPeer(*item) for item in reversed(self._addrs.items()))

    def addrs_of(self, peer_id: str) -> tuple[str, ...]:
        return self._addrs.get(peer_id, ())

    def restore(self, peers: Iterable[KnownPeer]) -> None:
        """Take in what was kept, the latest first; what is known already stays as it is."""
        room = MAX_KNOWN_PEERS - len(self._addrs)
        older = [peer for peer in peers if peer.peer_id not in self._addrs][:room]
        self._addrs = {peer.peer_id: peer.addrs for peer in reversed(older)} | self._addrs

    def note(self, peer_id: str, addrs: Sequence[str]) -> None:
        """Remember where a peer is now, the best address first; none that holds changes nothing."""
        kept = tuple(a for a in dict.fromkeys(addrs) if _is_addr_of(a, peer_id))
        if not kept or not _PEER_ID.fullmatch(peer_id):
            return
        before = self._addrs.pop(peer_id, None)
        if len(self._addrs) >= MAX_KNOWN_PEERS:
            del self._addrs[next(iter(self._addrs))]
        self._addrs[peer_id] = kept[:MAX_ADDRS_PER_PEER]
        if before != self._addrs[peer_id]:
            self._on_change()

    def forget(self, peer_id: str) -> None:
        """Drop a peer that is none of this mesh any more."""
        if self._addrs.pop(peer_id, None) is not None:
            self._on_change()


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a file says: of which network, whom it knows, and what in it does not hold."""

    network: str
    peers: tuple[KnownPeer, ...]  # the latest first
    faults: tuple[str, ...]  # for people: where, and what is wrong


def encode(network: str, peers: Iterable[KnownPeer]) -> bytes:
    """Return the file's content: JSON with a line break at its end."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "network": network,
        "peers": [{"peer_id": peer.peer_id, "addrs": list(peer.addrs)} for peer in peers],
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def decode(data: bytes) -> Decoded:
    """Return what ``encode`` wrote, as far as it still holds.

    Raises:
        StateDamaged: it is not such a file at all, or one of a later version.
    """
    try:
        content = json.loads(data)
    # RecursionError: brackets nested a thousand deep.
    except (ValueError, RecursionError) as exc:
        raise StateDamaged(f"it is no JSON: {str(exc)[:200]}") from exc
    if not isinstance(content, dict):
        raise StateDamaged("it is no JSON object")
    version = content.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise StateDamaged(
            f"its schema_version is {str(version)[:20]}, and this program reads {SCHEMA_VERSION}"
        )
    network, rows = content.get("network"), content.get("peers")
    if not isinstance(network, str) or not isinstance(rows, list):
        raise StateDamaged("its network is no text, or its peers are no list")
    peers: dict[str, KnownPeer] = {}
    faults: list[str] = []
    for number, row in enumerate(rows):
        try:
            peer = _peer(row)
        except ValueError as exc:
            faults.append(f"peers[{number}] {exc}")
        else:
            if len(peers) < MAX_KNOWN_PEERS:
                peers.setdefault(peer.peer_id, peer)
    if len(rows) > MAX_KNOWN_PEERS:
        faults.append(f"it has {len(rows)} peers, and only {MAX_KNOWN_PEERS} are kept")
    return Decoded(network, tuple(peers.values()), tuple(faults[:_MAX_FAULTS]))


def _peer(row: object) -> KnownPeer:
    if not isinstance(row, dict):
        raise ValueError("is no object")
    peer_id, addrs = row.get("peer_id"), row.get("addrs")
    if not isinstance(peer_id, str) or not _PEER_ID.fullmatch(peer_id):
        raise ValueError("has no peer_id, or one that is none")
    if not isinstance(addrs, list) or not 1 <= len(addrs) <= MAX_ADDRS_PER_PEER:
        raise ValueError(f"has no addrs, or more than {MAX_ADDRS_PER_PEER}")
    for addr in addrs:
        if not isinstance(addr, str) or not _is_addr_of(addr, peer_id):
            raise ValueError(f"has an address that is no multiaddr ending in /p2p/{peer_id}")
    return KnownPeer(peer_id, tuple(dict.fromkeys(addrs)))


def _is_addr_of(addr: str, peer_id: str) -> bool:
    return (
        len(addr) <= _MAX_ADDR
        and addr.startswith("/")
        and addr.endswith(f"/p2p/{peer_id}")
        and addr.isascii()
        and addr.isprintable()
        and " " not in addr
    )
