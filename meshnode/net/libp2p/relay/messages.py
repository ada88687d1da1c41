"""The vocabulary of circuit relay v2, from the library's protobuf definitions."""

from __future__ import annotations

from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    CONNECTION_FAILED,
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    UNEXPECTED_MESSAGE,
    HopMessage,
    Limit,
    PeerId,
    Reservation,
    Status,
    StopMessage,
)

from meshnode.errors import WireError

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"

__all__ = [
    "CONNECTION_FAILED",
    "HOP",
    "MALFORMED_MESSAGE",
    "NO_RESERVATION",
    "OK",
    "PERMISSION_DENIED",
    "RESERVATION_REFUSED",
    "RESOURCE_LIMIT_EXCEEDED",
    "STOP",
    "UNEXPECTED_MESSAGE",
    "HopMessage",
    "Limit",
    "PeerId",
    "Reservation",
    "Status",
    "StopMessage",
    "peer_id_of",
    "status_name",
]


def peer_id_of(peer: PeerId) -> str:
    """Return the peer ID in base58.

    Raises:
        WireError: ``bad_message``: it can't be one. Real ones have 34 to 42 bytes.
    """
    if not 8 <= len(peer.id) <= 64:
        raise WireError("bad_message", f"a peer ID of {len(peer.id)} bytes")
    return str(ID(peer.id))


def status_name(status: int) -> str:
    """Return a status as the specification spells it; never a peer's own words."""
    try:
        return str(Status.Name(status))  # type: ignore[arg-type]
    except ValueError:
        return "UNKNOWN_STATUS"
