"""What carrying others' connections may cost a relay, and how long each step may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Times are seconds on ``trio.current_time()``, except where said."""

    # Members behind NAT that one relay stands for.
    max_reservations: int = 128
    # Told to peers in their own terms; they renew it far sooner.
    reservation_ttl: float = 3600.0
    # Two members share one circuit, whatever runs between them. With all windows at their largest
    # a circuit holds 4 MB here; what is usual is less than a tenth of it.
    max_circuits: int = 1024
    # At either end: everybody, in a mesh of the size in which all nodes link to all, and more.
    max_circuits_per_peer: int = 128
    # None is no limit, and what is announced: answers run for hours, and whoever uses a relay has
    # the token. What bounds a circuit is that it must move: members ping an idle link each second.
    circuit_duration: float | None = None
    circuit_bytes: int | None = None  # each way
    circuit_idle: float = 120.0
    # Requests of one peer, reservations and circuits together: a restart of a mesh in a burst.
    requests_per_s: float = 4.0
    requests_burst: float = 64.0
    # One message of a peer's.
    message_timeout: float = 5.0
    # A stop answered by the peer behind NAT, on a link that stands.
    stop_timeout: float = 5.0
    # Circuits that others opened to this node and that have not proven membership yet.
    max_pending_circuits: int = 64


DEFAULT_RELAY_LIMITS = RelayLimits()
