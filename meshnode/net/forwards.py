"""Local ports that each lead to one peer: for programs that must know all workers by address.

The law here: a port belongs to one peer for as long as somebody follows the service, so that a
worker that comes back is found where it was. It accepts only while the peer can be reached.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog
import trio

from meshnode.core.ledger import Ledger

_HOST = "127.0.0.1"
# A worker that joins or leaves is noticed this soon; a model takes longer to load.
_LOOK_INTERVAL = 0.25  # seconds
# Each takes a descriptor and a port; no model is spread over more hosts.
MAX_PORTS = 128

log = structlog.get_logger(__name__)


class Carrier(Protocol):
    """Carries one client to one peer; an ``EntryPoint`` with a target is one."""

    async def serve_client(self, socket: trio.SocketStream) -> None: ...


@dataclass(frozen=True, slots=True)
class Forward:
    """One local port."""

    peer_id: str
    name: str  # the peer's, for people
    address: str  # HOST:PORT here


@dataclass(slots=True)
class _Open:
    """A port that accepts."""

    forward: Forward
    accepting: trio.CancelScope


@dataclass(slots=True)
class _Followed:
    """One service while it is followed."""

    service_id: str
    opened: dict[str, _Open] = field(default_factory=dict)
    # By peer ID, also of those that are away; at most MAX_PORTS.
    ports: dict[str, int] = field(default_factory=dict)
    is_full: bool = False  # more peers offer it than ports are opened


# Told the ports that are open now, in the order of the peers' names.
Tell = Callable[[Sequence[Forward]], Awaitable[None]]


class Forwards:
    """Opens the ports while they are followed.

    Args:
        carrier: what takes clients to the service (first) of the peer (second).
    """

    def __init__(self, ledger: Ledger, *, carrier: Callable[[str, str], Carrier]) -> None:
        self._ledger = ledger
        self._carrier = carrier
        self._addresses: dict[tuple[str, str], list[str]] = {}

    @property
    def addresses(self) -> dict[tuple[str, str], str]:
        """The open ports by service and peer ID; of several the one opened first."""
        return {key: listed[0] for key, listed in self._addresses.items()}

    async def follow(self, service_id: str, tell: Tell, *, repeat: float) -> None:
        """Keep one port open for each peer that offers the service, until cancelled.

        Args:
            tell: told at once, at every change, and every ``repeat`` seconds.
        """
        followed = _Followed(service_id)
        told_at = float("-inf")
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    changed = await self._keep(followed, nursery)
                    if changed or trio.current_time() - told_at >= repeat:
                        told_at = trio.current_time()
                        await tell(_sorted(followed.opened))
                    await trio.sleep(_LOOK_INTERVAL)
            finally:
                for each in followed.opened.values():
                    self._forget(service_id, each)

    async def _keep(self, followed: _Followed, nursery: trio.Nursery) -> bool:
        """Open and close what changed since the last look; say whether anything did."""
        service_id, opened, ports = followed.service_id, followed.opened, followed.ports
        offering = self._offering(service_id)
        # The same ones each time, where there are more than ports.
        wanted = dict(sorted(offering.items())[:MAX_PORTS])
        gone = [peer_id for peer_id in opened if peer_id not in wanted]
        for peer_id in gone:
            closing = opened.pop(peer_id)
            closing.accepting.cancel()
            self._forget(service_id, closing)
        fresh = [peer_id for peer_id in wanted if peer_id not in opened]
        for peer_id in fresh[: MAX_PORTS - len(opened)]:
            listener = await _listen(ports.get(peer_id, 0))
            port = listener.socket.getsockname()[1]
            if len(ports) < MAX_PORTS:
                ports[peer_id] = port
            forward = Forward(peer_id, wanted[peer_id], f"{_HOST}:{port}")
            scope = trio.CancelScope()
            carrier = self._carrier(service_id, peer_id)
            nursery.start_soon(_accept, carrier, listener, scope, nursery)
            opened[peer_id] = _Open(forward, scope)
            self._addresses.setdefault((service_id, peer_id), []).append(forward.address)
            log.info("forward_opened", peer_id=peer_id, service=service_id, address=forward.address)
        is_full = len(offering) > MAX_PORTS
        if is_full and not followed.is_full:
            log.warning("forwards_full", service=service_id, peers=len(offering), limit=MAX_PORTS)
        followed.is_full = is_full
        return bool(gone or fresh)

    def _offering(self, service_id: str) -> dict[str, str]:
        """Return the names of those that offer the service, by peer ID."""
        found: dict[str, str] = {}
        for entry in self._ledger.offering(service_id, trio.current_time()):
            service = entry.node.service(service_id)
            if entry.node.state == "up" and service is not None and service.healthy:
                found[entry.peer_id] = entry.node.name
        return found

    def _forget(self, service_id: str, closed: _Open) -> None:
        key = (service_id, closed.forward.peer_id)
        listed = self._addresses.get(key, [])
        if closed.forward.address in listed:
            listed.remove(closed.forward.address)
        if not listed:
            self._addresses.pop(key, None)
        log.info("forward_closed", peer_id=closed.forward.peer_id, service=service_id)


async def _listen(port: int) -> trio.SocketListener:
    """Listen on ``port`` if it is still free, else on any."""
    if port:
        try:
            return (await trio.open_tcp_listeners(port, host=_HOST))[0]
        except OSError:
            log.info("forward_port_taken", port=port)
    return (await trio.open_tcp_listeners(0, host=_HOST))[0]


async def _accept(
    carrier: Carrier,
    listener: trio.SocketListener,
    scope: trio.CancelScope,
    connections: trio.Nursery,
) -> None:
    """Accept until ``scope`` is cancelled; what was accepted goes on to its own end."""
    with scope:
        await trio.serve_listeners(
            partial(_serve, carrier), [listener], handler_nursery=connections
        )


async def _serve(carrier: Carrier, socket: trio.SocketStream) -> None:
    await carrier.serve_client(socket)


def _sorted(opened: dict[str, _Open]) -> list[Forward]:
    return sorted(
        (each.forward for each in opened.values()), key=lambda each: (each.name, each.peer_id)
    )
