"""Who may knock: bounds on connections that have not proven membership yet.

Anybody can open a TCP connection and even finish a noise handshake. A connection is therefore
pending from accept until its membership is proven, and pending ones are few and short-lived.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from meshnode.net.libp2p.limits import Limits


@dataclass(frozen=True, slots=True, eq=False)
class Knock:
    """One pending connection."""

    ip: str
    since: float  # trio.current_time()
    turn_away: Callable[[], None]


class Door:
    """Counts pending connections, in all and per IP address."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pending: dict[str, dict[Knock, None]] = {}  # ip -> knocks, oldest first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def knock(self, ip: str, turn_away: Callable[[], None], *, now: float) -> Knock | None:
        """Let one more wait at the door; None if it may not.

        When there is no room, the oldest makes some if it has been idling: a real handshake takes
        milliseconds, so a crowd of silent connections can't shut out one that speaks.
        """
        here = self._pending.setdefault(ip, {})
        crowded = len(here) >= self._per_ip(ip)
        if (crowded or self._count >= self._limits.max_pending) and not self._make_room(
            ip if crowded else None, now
        ):
            if not here:
                del self._pending[ip]
            return None
        entered = Knock(ip, now, turn_away)
        self._pending.setdefault(ip, {})[entered] = None
        self._count += 1
        return entered

    def leave(self, knock: Knock) -> None:
        """Forget a connection that is a member's now, or gone. Twice is once."""
        here = self._pending.get(knock.ip, {})
        if knock in here:
            del here[knock]
            self._count -= 1
            if not here:
                del self._pending[knock.ip]

    def _per_ip(self, ip: str) -> int:
        if ipaddress.ip_address(ip.partition("%")[0]).is_loopback:
            return self._limits.max_pending_on_loopback
        return self._limits.max_pending_per_ip

    def _make_room(self, ip: str | None, now: float) -> bool:
        """Turn away the longest pending, of ``ip`` or of all; False if all are young."""
        groups = self._pending.values() if ip is None else (self._pending[ip],)
        oldest = min(
            (next(iter(group)) for group in groups if group), key=lambda knock: knock.since
        )
        if now - oldest.since < self._limits.pending_yields_after:
            return False
        self.leave(oldest)
        oldest.turn_away()
        return True
