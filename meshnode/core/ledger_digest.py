"""What one ledger has that another has not, found from a digest of the other alone.

A digest names each node by a key and gives the newest Seq known of it. Who is online at the asker
and who is gone are told apart, so that nobody asks for records of the long dead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from meshnode.core.ledger import Ledger, LedgerEntry
from meshnode.core.ledger_exchange import ENTRY_BYTES, KEY_BYTES, SEQ_BYTES, Digest, Record
from meshnode.core.node_data import MAX_ONLINE_WINDOW


# The same nodes are in every exchange; twice what a ledger holds, as it keeps tombstones too.
@lru_cache(maxsize=20_000)
def key_of(peer_id: str) -> bytes:
    """Return by what a digest names a node."""
    return hashlib.sha256(peer_id.encode()).digest()[:KEY_BYTES]


def digest_entries(ledger: Ledger, now: float) -> tuple[list[bytes], list[bytes]]:
    """Return (those online, those gone), each as a key with a Seq.

    Whoever has been silent for longer than any window is nobody's candidate, and left out.
    """
    online: list[bytes] = []
    gone: list[bytes] = []
    for entry in ledger.entries():
        packed = key_of(entry.peer_id) + entry.node.seq.to_bytes(SEQ_BYTES, "big")
        if entry.is_online_at(now):
            online.append(packed)
        elif now - entry.last_seen < MAX_ONLINE_WINDOW:
            gone.append(packed)
    return online, gone


@dataclass(frozen=True, slots=True)
class Difference:
    """What has to go which way for both ledgers to know the same."""

    to_send: list[LedgerEntry]  # newer here, or unknown there
    wanted: list[bytes]  # keys of those newer there, or unknown here
    disputed: list[LedgerEntry]  # as new on both sides, but online on one alone


def compare(ledger: Ledger, digests: Iterable[Digest], now: float) -> Difference:
    """Return the difference between this ledger and one of which there is a digest."""
    online: dict[bytes, int] = {}
    gone: dict[bytes, int] = {}
    for digest in digests:
        (gone if digest.gone else online).update(_unpack(digest.entries))
    floors = {key_of(peer_id): seq for peer_id, seq in ledger.seq_floors(now)}
    to_send: list[LedgerEntry] = []
    disputed: list[LedgerEntry] = []
    online_here: set[bytes] = set()
    for entry in ledger.entries():
        key = key_of(entry.peer_id)
        is_online = entry.is_online_at(now)
        if is_online:
            online_here.add(key)
        # One that is gone is told to whoever still has it online: a goodbye may have been lost.
        known = online.get(key, gone.get(key, -1) if is_online else None)
        if entry.envelope and known is not None and entry.node.seq > known:
            to_send.append(entry)
        elif (gone if is_online else online).get(key) == entry.node.seq:
            disputed.append(entry)
    wanted = [key for key, seq in online.items() if seq > floors.get(key, -1)]
    wanted += [key for key, seq in gone.items() if key in online_here and seq > floors[key]]
    return Difference(to_send, wanted, disputed)


def chosen(ledger: Ledger, keys: Sequence[bytes]) -> list[LedgerEntry]:
    """Return the entries that another asked for by their keys, each once."""
    asked = set(keys)
    return [entry for entry in ledger.entries() if key_of(entry.peer_id) in asked]


def records(entries: Iterable[LedgerEntry], now: float) -> Iterator[Record]:
    """Yield the entries as records, the freshest first."""
    for entry in sorted(entries, key=lambda entry: -entry.last_seen):
        if entry.envelope:
            yield Record(envelope=entry.envelope, age=max(0.0, now - entry.last_seen))


def split_keys(packed: bytes) -> list[bytes]:
    """Return the keys that a Want names."""
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def _unpack(packed: bytes) -> Iterator[tuple[bytes, int]]:
    for at in range(0, len(packed), ENTRY_BYTES):
        seq = packed[at + KEY_BYTES : at + ENTRY_BYTES]
        yield packed[at : at + KEY_BYTES], int.from_bytes(seq, "big")
