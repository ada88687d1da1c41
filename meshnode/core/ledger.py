"""Who was seen when: for each peer its newest NodeData, and when this node last had proof of life.

What holds here, whatever arrives in whatever order:

- Ages come from this node's monotonic clock, handed in as ``now``. A peer's own clock is only
  ever displayed.
- A peer's Seq rises. The same or an older one is a repetition, never a sign of life; a forgotten
  peer's Seq is remembered for a day, so that its old announcements can't bring it back.
- Proof of life never moves back. What another peer relays is as old as that peer says.
- A peer that said it leaves comes back by a newer Seq alone. One that was only lost comes back by
  that, or by any bytes from it.
- Suspicion takes nobody out: a suspect is online until it is found dead, and any sign of life since
  it was suspected ends the suspicion.
- Entries and tombstones are bounded; whoever is offline makes room first, and nobody online does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from meshnode.core.node_data import NodeData

# A mesh of 10,000 is what the announcement budget is reckoned for; about 20 MB of entries.
MAX_ENTRIES = 10_000
# Longer than any window, and than any host is likely to replay from its queues.
TOMBSTONE_TTL = 86_400.0  # seconds
# Past the longest online window (3,600 s) a record says nothing about now, however old it is.
MAX_RELAYED_AGE = 86_400.0  # seconds

_NEVER = float("-inf")

EntryState = Literal["up", "draining", "suspect", "left", "offline"]
# What the last sign of life was: the peer's own announcement, one that another handed on, bytes.
Proof = Literal["announced", "relayed", "bytes"]
_WHY_UP = {
    "announced": "its announcement was heard",
    "relayed": "a member handed on its announcement",
    "bytes": "bytes came over its link",
}


class Observation(Enum):
    """What one announcement told the ledger."""

    NEW = "new"  # a peer that was not in the ledger
    NEWER = "newer"  # fresh news of a known peer, which leave it as online or offline as it was
    RETURNED = "returned"  # a peer that was offline, down or gone is online again
    STALE = "stale"  # the same or an older Seq: no news, and no sign of life
    LEFT = "left"  # the peer says goodbye
    FULL = "full"  # the ledger is full of peers that are online: not admitted


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is known of one peer. Times are seconds on this node's monotonic clock."""

    node: NodeData
    envelope: bytes  # the signed announcement, to be relayed as it came; b"" if unknown
    last_seen: float  # the last proof of life
    first_seen: float
    down_reason: str | None = None  # why it was taken out, if it was
    down_at: float = _NEVER  # when this node found it dead; older news can't undo that
    suspicion: str | None = None  # why this node doubts that it is there, while it finds out
    suspected_at: float = _NEVER
    proof: Proof = "announced"  # what ``last_seen`` is the time of
    online_until: float = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Reckoned once: a lease asks it of every candidate, and entries change far more seldom.
        gone = self.down_reason is not None or self.node.state == "leaving"
        until = _NEVER if gone else self.last_seen + self.node.window_s
        object.__setattr__(self, "online_until", until)

    @property
    def peer_id(self) -> str:
        return self.node.id

    @property
    def state(self) -> EntryState:
        """What the peer said or what was found out; silence shows here once ``expire`` saw it."""
        if self.node.state == "leaving":
            return "left"
        if self.down_reason is not None:
            return "offline"
        if self.suspicion is not None:
            return "suspect"
        return self.node.state

    def state_at(self, now: float) -> EntryState:
        """Return ``state``, where silence up to ``now`` counts as offline at once."""
        state = self.state
        return "offline" if state != "left" and now >= self.online_until else state

    def reason_at(self, now: float) -> str:
        """Return why the peer is in ``state_at(now)``, in words for a person."""
        match self.state_at(now):
            case "left":
                return "it said goodbye"
            case "offline":
                return self.down_reason or "silent"
            case "suspect":
                return self.suspicion or ""
            case "draining":
                return "it takes no new work"
            case _:
                return _WHY_UP[self.proof]

    def is_online_at(self, now: float) -> bool:
        """Say whether the last proof of life is within the peer's window and nothing ended it."""
        return now < self.online_until


@dataclass(frozen=True, slots=True)
class _Tombstone:
    seq: int
    until: float


class Ledger:
    """Every known peer, this node included while it observes its own announcements.

    Args:
        self_id: this node's peer ID; its entry is never evicted, marked down or forgotten.
        max_entries: bound on the entries, and apart from them on the tombstones.
        tombstone_ttl: seconds for which a forgotten peer's Seq is kept; an entry that has been
            offline for as long is forgotten by itself.
    """

    def __init__(
        self,
        self_id: str,
        *,
        max_entries: int = MAX_ENTRIES,
        tombstone_ttl: float = TOMBSTONE_TTL,
    ) -> None:
        self.self_id = self_id
        self._max_entries = max_entries
        self._tombstone_ttl = tombstone_ttl
        self._entries: dict[str, LedgerEntry] = {}
        # Those online when last looked at, so that reading them costs nothing for the offline.
        self._live: dict[str, LedgerEntry] = {}
        self._live_by_service: dict[str, dict[str, LedgerEntry]] = {}
        self._tombstones: dict[str, _Tombstone] = {}  # the oldest first
        self._watchers: list[Callable[[str], None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def watch(self, watcher: Callable[[str], None]) -> None:
        """Tell ``watcher`` of each peer whose news, being online or being suspect changed."""
        self._watchers.append(watcher)

    # What is known

    @property
    def online_count(self) -> int:
        """How many were online when last looked at, this node included; costs nothing."""
        return len(self._live)

    def get(self, peer_id: str) -> LedgerEntry | None:
        """Return the peer's entry, online or not."""
        return self._entries.get(peer_id)

    def entries(self) -> tuple[LedgerEntry, ...]:
        """Return every entry, in the order of first hearing."""
        return tuple(self._entries.values())

    def online(self, now: float) -> tuple[LedgerEntry, ...]:
        """Return the entries online at ``now``, draining ones included, in no order of meaning."""
        return tuple(entry for entry in self._live.values() if now < entry.online_until)

    def offering(self, service_id: str, now: float) -> list[LedgerEntry]:
        """Return the entries online at ``now`` that expose the service, in no order of meaning."""
        live = self._live_by_service.get(service_id)
        if live is None:
            return []
        return [entry for entry in live.values() if now < entry.online_until]

    def services_online(self, now: float) -> tuple[str, ...]:
        """Return the names of all services that somebody online exposes, sorted."""
        return tuple(
            sorted(
                service_id
                for service_id, live in self._live_by_service.items()
                if any(now < entry.online_until for entry in live.values())
            )
        )

    def offers_any(self, now: float) -> bool:
        """Say whether somebody online exposes a service."""
        for live in self._live_by_service.values():
            for entry in live.values():
                if now < entry.online_until:
                    return True
        return False

    def seq_floor(self, peer_id: str, now: float) -> int | None:
        """Return the Seq that an announcement must exceed to be news; None if any will do."""
        entry = self._entries.get(peer_id)
        if entry is not None:
            return entry.node.seq
        tombstone = self._tombstones.get(peer_id)
        return tombstone.seq if tombstone is not None and now < tombstone.until else None

    def seq_floors(self, now: float) -> Iterator[tuple[str, int]]:
        """Yield each peer that has a ``seq_floor``, and that."""
        for peer_id, entry in self._entries.items():
            yield peer_id, entry.node.seq
        for peer_id, tombstone in self._tombstones.items():
            if now < tombstone.until and peer_id not in self._entries:
                yield peer_id, tombstone.seq

    # What is heard

    def observe(
        self, node: NodeData, *, envelope: bytes = b"", now: float, age: float = 0.0
    ) -> Observation:
        """Take in one announcement whose signer was found to be ``node.id``.

        Args:
            node: what the peer said of itself.
            envelope: its signed form, kept for relaying.
            now: seconds on this node's monotonic clock.
            age: seconds since the peer that relays it had proof of life; 0 if heard directly.
        """
        floor = self.seq_floor(node.id, now)
        if floor is not None and node.seq <= floor:
            return Observation.STALE
        heard = now - _bounded_age(age)
        old = self._entries.get(node.id)
        if old is not None:
            return self._renew(old, node, envelope, heard, now)
        proof: Proof = "relayed" if age > 0.0 else "announced"
        entry = LedgerEntry(node, envelope, last_seen=heard, first_seen=now, proof=proof)
        if not self._admit(entry, now):
            return Observation.FULL
        self._tombstones.pop(node.id, None)
        self._put(entry, now)
        self._tell(node.id)
        return Observation.LEFT if node.state == "leaving" else Observation.NEW

    def touch(self, peer_id: str, now: float) -> bool:
        """Take bytes from the peer as proof of life; say whether that brought it back online.

        A peer that said it leaves stays gone: its connection outlives its goodbye for a moment.
        """
        old = self._entries.get(peer_id)
        if old is None or old.node.state == "leaving":
            return False
        was_online = old.is_online_at(now)
        entry = replace(
            old,
            last_seen=max(old.last_seen, now),
            down_reason=None,
            down_at=_NEVER,
            suspicion=None if now >= old.suspected_at else old.suspicion,
            proof="bytes",
        )
        self._put(entry, now)
        if not was_online or entry.suspicion != old.suspicion:
            self._tell(peer_id)
        return not was_online

    def forgive(self, seconds: float, now: float) -> None:
        """Leave out of everybody's silence ``seconds`` during which this node stood still.

        What came meanwhile waits to be read, so those seconds prove nothing against anybody.
        """
        for entry in tuple(self._live.values()):
            self._put(replace(entry, last_seen=min(now, entry.last_seen + seconds)), now)

    # What is lost

    def suspect(self, peer_id: str, reason: str, now: float) -> bool:
        """Doubt, from ``now`` on, that the peer is there; say whether that is news.

        It stays online, until it is found dead or shows life. This node never doubts itself here.
        """
        old = self._entries.get(peer_id)
        if old is None or peer_id == self.self_id or not old.is_online_at(now):
            return False
        since = now if old.suspicion is None else old.suspected_at
        self._put(replace(old, suspicion=reason, suspected_at=since), now)
        if old.suspicion is None:
            self._tell(peer_id)
        return old.suspicion is None

    def mark_down(self, peer_id: str, reason: str, now: float) -> bool:
        """Take the peer offline at once; say whether it was online until now.

        Whoever is offline already keeps the reason it has. This node itself is never down.
        """
        old = self._entries.get(peer_id)
        if old is None or peer_id == self.self_id or not old.is_online_at(now):
            return False
        self._put(replace(old, down_reason=reason, down_at=now, suspicion=None), now)
        self._tell(peer_id)
        return True

    def forget(self, peer_id: str, now: float) -> None:
        """Drop the peer's entry, and keep its Seq so that nothing older brings it back."""
        entry = self._entries.get(peer_id)
        if entry is None or peer_id == self.self_id:
            return
        del self._entries[peer_id]
        self._unlist(entry)
        self._bury(peer_id, entry.node.seq, now)
        self._tell(peer_id)

    def expire(self, now: float) -> list[str]:
        """Take those offline whose window ran out; return their peer IDs.

        Also forgets who has been offline for ``tombstone_ttl``, and tombstones past it. Meant to
        be called about once a second: it looks at every entry.
        """
        silent = [entry for entry in self._live.values() if now >= entry.online_until]
        for entry in silent:
            # Silence is no finding of a time: any newer record ends it, however it is dated, and
            # the window then says whether the peer is online.
            down = replace(entry, down_reason="silent", down_at=_NEVER, suspicion=None)
            self._put(down, now)
            self._tell(entry.peer_id)
        for peer_id in [e.peer_id for e in self._entries.values() if self._is_outdated(e, now)]:
            self.forget(peer_id, now)
        for peer_id in list(self._outdated_tombstones(now)):
            del self._tombstones[peer_id]
        return [entry.peer_id for entry in silent]

    # How it is kept

    def _renew(
        self, old: LedgerEntry, node: NodeData, envelope: bytes, heard: float, now: float
    ) -> Observation:
        was_online = old.is_online_at(now)
        # Lost since that was heard elsewhere: newer news than ours, yet no sign of life.
        still_down = heard < old.down_at
        proof: Proof = "relayed" if heard < now else "announced"
        entry = replace(
            old,
            node=node,
            envelope=envelope,
            last_seen=max(old.last_seen, heard),
            down_reason=old.down_reason if still_down else None,
            down_at=old.down_at if still_down else _NEVER,
            suspicion=old.suspicion if heard < old.suspected_at else None,
            proof=proof if heard >= old.last_seen else old.proof,
        )
        self._put(entry, now)
        self._tell(node.id)
        if node.state == "leaving":
            return Observation.LEFT
        if entry.is_online_at(now) and not was_online:
            return Observation.RETURNED
        return Observation.NEWER

    def _admit(self, newcomer: LedgerEntry, now: float) -> bool:
        """Make room for a newcomer; say whether there is any."""
        if len(self._entries) < self._max_entries or newcomer.peer_id == self.self_id:
            return True
        if not newcomer.is_online_at(now):
            return False  # nobody makes room for one who is gone already
        offline = (
            entry
            for entry in self._entries.values()
            if now >= entry.online_until and entry.peer_id != self.self_id
        )
        longest_gone = min(offline, key=lambda entry: entry.last_seen, default=None)
        if longest_gone is None:
            return False
        self.forget(longest_gone.peer_id, now)
        return True

    def _tell(self, peer_id: str) -> None:
        for watcher in self._watchers:
            watcher(peer_id)

    def _put(self, entry: LedgerEntry, now: float) -> None:
        peer_id = entry.peer_id
        old = self._live.get(peer_id)
        self._entries[peer_id] = entry
        if old is not None and (
            old.node.services is not entry.node.services or now >= entry.online_until
        ):
            self._unlist(old)
        if now < entry.online_until:
            self._live[peer_id] = entry
            for service in entry.node.services:
                self._live_by_service.setdefault(service.service_id, {})[peer_id] = entry

    def _unlist(self, entry: LedgerEntry) -> None:
        peer_id = entry.peer_id
        if self._live.pop(peer_id, None) is None:
            return
        for service in entry.node.services:
            live = self._live_by_service.get(service.service_id, {})
            live.pop(peer_id, None)
            if not live:
                self._live_by_service.pop(service.service_id, None)

    def _bury(self, peer_id: str, seq: int, now: float) -> None:
        self._tombstones.pop(peer_id, None)  # so that the newest stands last
        self._tombstones[peer_id] = _Tombstone(seq, now + self._tombstone_ttl)
        while len(self._tombstones) > self._max_entries:
            del self._tombstones[next(iter(self._tombstones))]

    def _is_outdated(self, entry: LedgerEntry, now: float) -> bool:
        return (
            now >= entry.online_until
            and now - entry.last_seen >= self._tombstone_ttl
            and entry.peer_id != self.self_id
        )

    def _outdated_tombstones(self, now: float) -> Iterator[str]:
        for peer_id, tombstone in self._tombstones.items():
            if now < tombstone.until:
                return
            yield peer_id


def _bounded_age(age: float) -> float:
    """Return ``age`` within 0..MAX_RELAYED_AGE; one that is no number counts as the oldest."""
    if 0.0 <= age <= MAX_RELAYED_AGE:
        return age
    return 0.0 if age < 0.0 else MAX_RELAYED_AGE
