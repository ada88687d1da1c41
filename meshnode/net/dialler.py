"""Connections made: to whom, at which of its addresses, how many at a time, how soon again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trio

from meshnode.core.known_peers import KnownPeers
from meshnode.core.ledger import Ledger
from meshnode.core.membership import TIMEOUT as MEMBERSHIP_TIMEOUT
from meshnode.errors import ConfigError, MeshError, PeerLate, PeerUnreachable, TokenRefused
from meshnode.net.mesh import Mesh
from meshnode.net.rng import Rng

# Dialling many at once makes every handshake late, and then all of them fail.
MAX_DIALS = 6
DIAL_TIMEOUT = 3.0  # seconds, for one peer with all its addresses
# After a power cut everybody dials the same bootstrap at once. It gets round to each, but late, and
# whoever gives up and begins anew only makes it later still.
_BOOTSTRAP_PATIENCE = MEMBERSHIP_TIMEOUT  # as long as it waits for us
_ADDR_TIMEOUT = 1.5  # seconds for one address while there is another to try
# Where a relay is known, direct ways may take this share of the time, in all; and for a while after
# they led nowhere they are left to whoever replaces relayed links.
_DIRECT_SHARE = 0.5
_DIRECT_REST = 60.0  # seconds
CIRCUIT = "/p2p-circuit/"  # in a multiaddr that leads through a relay
# Of a peer that others lost: one packet of the handshake may get lost too.
PROBE_TIMEOUT = 2.0  # seconds for one address
_PROBED_ADDRS = 4  # the likeliest; each may take the whole time
FIRST_RETRY = 0.25  # seconds
LAST_RETRY = 30.0  # seconds
# Peers whose failures are remembered; more than a ledger holds are never dialled.
_MAX_REMEMBERED = 10_000
# Peers that were found rather than told; a local network is smaller.
_MAX_FOUND = 1_000


class Backoff:
    """How long to wait after the next failure: doubled each time, with jitter."""

    def __init__(self, rng: Rng, first: float = FIRST_RETRY, last: float = LAST_RETRY) -> None:
        self._rng = rng
        self._first = first
        self._last = last
        self._next = first

    def after_failure(self, *, at_most: float = LAST_RETRY) -> float:
        """Return the seconds to wait now, no more than ``at_most``."""
        delay = min(self._next, at_most)
        self._next = min(self._next * 2, self._last)
        # Without jitter, hosts that lost the same peer come back to it in step.
        return delay * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._next = self._first


@dataclass(frozen=True, slots=True)
class DialLimits:
    """How many dials at a time and for how long; members of one process share its time and these.

    Attributes:
        slots: of dials that wait for their turn.
        timeout: seconds, for one peer with all its addresses.
    """

    slots: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(MAX_DIALS))
    timeout: float = DIAL_TIMEOUT


@dataclass(slots=True)
class _Failures:
    backoff: Backoff
    not_before: float


class Dialler:
    """Connects to peers by whichever of their addresses works.

    Args:
        limits: of this node alone, unless members share a process.
    """

    def __init__(
        self,
        mesh: Mesh,
        ledger: Ledger,
        known: KnownPeers,
        rng: Rng,
        limits: DialLimits | None = None,
    ) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._known = known
        self._rng = rng
        self._limits = limits or DialLimits()
        self._waiting: set[str] = set()  # for their turn
        self._under_way: dict[str, trio.Event] = {}
        self._failures: dict[str, _Failures] = {}
        self._worked: dict[str, str] = {}  # the address that last led to a peer
        self._relayed_until: dict[str, float] = {}  # peers whose direct ways led nowhere of late
        self._found: dict[str, tuple[str, ...]] = {}  # told by others than the peer itself

    def is_linked(self, peer_id: str) -> bool:
        return self._mesh.link_to(peer_id) is not None

    def may_try(self, peer_id: str, now: float) -> bool:
        """Whether nothing dials this peer already, and its backoff is over."""
        if peer_id in self._under_way or peer_id in self._waiting:
            return False
        failures = self._failures.get(peer_id)
        return failures is None or now >= failures.not_before

    @property
    def waiting(self) -> int:
        """How many dials wait for their turn."""
        return len(self._waiting)

    def addrs_of(self, peer_id: str) -> tuple[str, ...]:
        """Return where the peer can be dialled, the address most likely to work first.

        That is the one that worked last; one that worked in an earlier life and that the peer
        still tells; the others that it tells; where it was found; where it was known to be.
        """
        known = self._known.addrs_of(peer_id)
        told = sorted(self._told_by(peer_id), key=lambda addr: addr not in known)
        # Signed ones first: anybody on the local network can make up where a peer may be found.
        addrs = (*self._worked_for(peer_id), *told, *self._found.get(peer_id, ()), *known)
        return tuple(dict.fromkeys(a for a in addrs if a.endswith(f"/p2p/{peer_id}")))

    def note_addrs(self, peer_id: str) -> None:
        """Keep for later lives where a peer that is linked now can be dialled."""
        addrs = (*self._worked_for(peer_id), *self._told_by(peer_id))
        if addrs:
            self._known.note(peer_id, addrs)

    def direct_addrs_of(self, peer_id: str) -> tuple[str, ...]:
        """Return those of its addresses that need no relay."""
        return tuple(addr for addr in self.addrs_of(peer_id) if CIRCUIT not in addr)

    def learn(self, peer_id: str, addrs: tuple[str, ...]) -> None:
        """Remember where a peer was found, the best address first, and forget what was before."""
        self._found.pop(peer_id, None)
        if len(self._found) >= _MAX_FOUND:
            self._found.pop(next(iter(self._found)))
        self._found[peer_id] = addrs

    async def connect(self, peer_id: str, *, timeout: float) -> None:
        """Make a link to a peer of the ledger unless there is one.

        Raises:
            PeerUnreachable: none of its addresses led to it in time.
            TokenRefused: it has another token.
        """
        if self.is_linked(peer_id):
            return
        if (other_dial := self._under_way.get(peer_id)) is not None:
            with trio.move_on_after(timeout):
                await other_dial.wait()
            if not self.is_linked(peer_id):
                raise PeerUnreachable(f"{peer_id} can't be reached")
            return
        try:
            with trio.fail_after(timeout), self._marked_under_way(peer_id):
                await self._try_direct_first(peer_id, timeout)
        except trio.TooSlowError as exc:
            self._note_failure(peer_id)
            raise PeerUnreachable(f"{peer_id} did not answer within {timeout:g} s") from exc
        except MeshError:
            self._note_failure(peer_id)
            raise
        self._failures.pop(peer_id, None)

    async def connect_in_turn(self, peer_id: str, *, wanted: Callable[[], bool]) -> None:
        """Connect as ``connect`` does, once it is this dial's turn, if it is still wanted then.

        The wait for the turn is no part of the time that the peer has: how busy this node is says
        nothing about the peer.

        Raises: as ``connect``.
        """
        self._waiting.add(peer_id)
        try:
            async with self._limits.slots:
                self._waiting.discard(peer_id)
                if wanted():
                    await self.connect(peer_id, timeout=self._limits.timeout)
        finally:
            self._waiting.discard(peer_id)

    async def probe(self, peer_id: str) -> None:
        """Find out whether a peer can be reached, by a link to it if there is none.

        Waits for no other dial's turn, so that a failure says something about the peer: the
        caller bounds how many run at a time.

        Raises:
            PeerUnreachable: none of its addresses leads to it.
            PeerLate: of these, at one of them the connection was taken.
            TokenRefused: it has another token.
        """
        failure: MeshError = PeerUnreachable(f"{peer_id} told no address")
        for addr in self.addrs_of(peer_id)[:_PROBED_ADDRS]:
            if self.is_linked(peer_id):
                return
            try:
                await self._mesh.dial(addr, timeout=PROBE_TIMEOUT)
            except (ConfigError, PeerUnreachable) as exc:
                if isinstance(exc, ConfigError):
                    exc = PeerUnreachable(f"{peer_id} told a bad address: {exc}")
                if not isinstance(failure, PeerLate):  # which says more than a dead address does
                    failure = exc
            else:
                self._remember(peer_id, addr)
                return
        self._note_failure(peer_id)
        raise failure

    async def dial(self, addr: str) -> str:
        """Connect to one address, a bootstrap's; return the peer ID found there.

        Raises: as ``Mesh.dial``.
        """
        expected = addr.rpartition("/p2p/")[2]
        with self._marked_under_way(expected):
            peer_id = await self._mesh.dial(
                addr, timeout=self._limits.timeout, patience=_BOOTSTRAP_PATIENCE
            )
        self._remember(peer_id, addr)
        return peer_id

    async def connect_directly(self, peer_id: str, *, timeout: float) -> None:
        """Make a link that needs no relay, though a relayed one stands.

        Raises: as ``connect``.
        """
        try:
            with trio.fail_after(timeout):
                await self._try_addrs(peer_id, self.direct_addrs_of(peer_id))
        except trio.TooSlowError as exc:
            raise PeerUnreachable(f"{peer_id} did not answer within {timeout:g} s") from exc
        self._relayed_until.pop(peer_id, None)

    async def _try_direct_first(self, peer_id: str, timeout: float) -> None:
        """Try every address; those that lead through a relay last, but in time."""
        direct = self.direct_addrs_of(peer_id)
        relayed = tuple(addr for addr in self.addrs_of(peer_id) if CIRCUIT in addr)
        if not relayed:
            await self._try_addrs(peer_id, direct)
            return
        if direct and self._relayed_until.get(peer_id, 0.0) <= trio.current_time():
            with suppress(PeerUnreachable), trio.move_on_after(timeout * _DIRECT_SHARE):
                await self._try_addrs(peer_id, direct)
            if self.is_linked(peer_id):
                return
            if len(self._relayed_until) >= _MAX_REMEMBERED:
                self._relayed_until.pop(next(iter(self._relayed_until)))
            self._relayed_until[peer_id] = trio.current_time() + _DIRECT_REST
        await self._try_addrs(peer_id, relayed)

    async def _try_addrs(self, peer_id: str, addrs: tuple[str, ...]) -> None:
        failure: MeshError = PeerUnreachable(f"{peer_id} told no address")
        for number, addr in enumerate(addrs, start=1):
            timeout = self._limits.timeout if number == len(addrs) else _ADDR_TIMEOUT
            try:
                await self._mesh.dial(addr, timeout=timeout)
            except TokenRefused:
                raise  # its other addresses lead to the same token
            except PeerUnreachable as exc:
                failure = exc
            except ConfigError as exc:
                failure = PeerUnreachable(f"{peer_id} told a bad address: {exc}")
            else:
                self._remember(peer_id, addr)
                return
        raise failure

    @contextmanager
    def _marked_under_way(self, peer_id: str) -> Iterator[None]:
        done = self._under_way.setdefault(peer_id, trio.Event())
        try:
            yield
        finally:
            self._under_way.pop(peer_id, None)
            done.set()

    def _note_failure(self, peer_id: str) -> None:
        failures = self._failures.get(peer_id)
        if failures is None:
            if len(self._failures) >= _MAX_REMEMBERED:
                self._failures.pop(next(iter(self._failures)))
            failures = self._failures[peer_id] = _Failures(Backoff(self._rng), 0.0)
        failures.not_before = trio.current_time() + failures.backoff.after_failure()

    def _remember(self, peer_id: str, addr: str) -> None:
        if len(self._worked) >= _MAX_REMEMBERED and peer_id not in self._worked:
            self._worked.pop(next(iter(self._worked)))
        self._worked[peer_id] = addr
        self.note_addrs(peer_id)

    def _worked_for(self, peer_id: str) -> tuple[str, ...]:
        return (self._worked[peer_id],) if peer_id in self._worked else ()

    def _told_by(self, peer_id: str) -> tuple[str, ...]:
        entry = self._ledger.get(peer_id)
        told = entry.node.addrs if entry is not None else ()
        return tuple(addr if "/p2p/" in addr else f"{addr}/p2p/{peer_id}" for addr in told)
