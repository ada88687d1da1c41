"""Addresses that lead through a relay: ``<relay's address>/p2p-circuit/p2p/<peer ID>``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from meshnode.errors import ConfigError
from meshnode.metrics import Metrics
from meshnode.net.libp2p.remedies import ForeignError, foreign_faults
from meshnode.net.libp2p.tcp import TcpAddr, parse_tcp_addr

CIRCUIT = "/p2p-circuit"
# As many as go-libp2p sends at most for one peer; we announce fewer.
_MAX_ADDRS_READ = 16


@dataclass(frozen=True, slots=True)
class CircuitAddr:
    """The relay to go through, at a TCP address, and the peer ID behind it."""

    relay: TcpAddr
    relay_id: str
    peer_id: str

    @property
    def multiaddr(self) -> str:
        """The address without the last ``/p2p/``."""
        return f"{self.relay.multiaddr}/p2p/{self.relay_id}{CIRCUIT}"


def parse_addr(addr: str) -> TcpAddr | CircuitAddr:
    """Read a TCP multiaddr, or one that leads through a relay at such an address.

    Raises:
        ConfigError: ``addr`` is neither.
    """
    before, marker, after = addr.partition(CIRCUIT)
    if not marker:
        return parse_tcp_addr(addr)
    relay = parse_tcp_addr(before)
    try:
        parts = [(part.name, value) for part, value in Multiaddr(after).items()]
    except (MultiaddrError, ValueError) as exc:
        raise ConfigError(f"{addr!r} is not a multiaddr: {exc}") from exc
    match parts:
        case [("p2p", str(peer_id))] if relay.peer_id is not None:
            return CircuitAddr(relay, relay.peer_id, peer_id)
    raise ConfigError(
        f"{addr!r} leads through a relay, but is not of the form "
        "/ip4/192.0.2.7/tcp/4001/p2p/RELAY_ID/p2p-circuit/p2p/PEER_ID"
    )


def to_bytes(addrs: Iterable[str]) -> list[bytes]:
    """Return multiaddrs in their binary form."""
    return [Multiaddr(addr).to_bytes() for addr in addrs]


def tcp_addrs(told: Iterable[bytes], peer_id: str, metrics: Metrics) -> tuple[str, ...]:
    """Return the TCP addresses among what a peer told of ``peer_id``, without ``/p2p/``.

    Whatever else is among them is skipped: other transports, addresses of others, and damage.
    """
    found: dict[str, None] = {}
    for _, raw in zip(range(_MAX_ADDRS_READ), told, strict=False):
        try:
            with foreign_faults(metrics, "multiaddr", passing=(ConfigError,)):
                endpoint = parse_tcp_addr(str(Multiaddr(raw)))
        except (ForeignError, ConfigError):
            continue
        if endpoint.peer_id in (None, peer_id) and endpoint.port:
            found[endpoint.multiaddr] = None
    return tuple(found)


def id_bytes(peer_id: str) -> bytes:
    """Return a peer ID in its binary form."""
    return ID.from_base58(peer_id).to_bytes()
