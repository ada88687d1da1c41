"""Finding the members of one network on the local network, without an address to begin with.

Whoever answers is only a hint where to dial: membership is proven on the connection, so a forged
answer costs one refused dial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import structlog
import trio

from meshnode.net import mdns_packets as packets
from meshnode.net.mdns_sockets import (
    Interface,
    MulticastSocket,
    interfaces,
    open_multicast_socket,
)
from meshnode.net.rng import Rng

FIRST_INTERVAL = 1.0  # seconds between the first question and the second
LAST_INTERVAL = 60.0
_SLOWER = 3.0  # each interval to the one before
# Questions by others postpone ours, as everybody hears the answers, but not for ever: they may
# have been asked on one of our networks only.
_MAX_POSTPONED = 4  # intervals
# So that not all of a network answer in the same instant.
_ANSWER_DELAY = (0.02, 0.12)  # seconds
_MAX_ANSWERS = 5  # in as many seconds; RFC 6762 wants no more than one a second
# Seconds of rest for each second of reading, so that a flood of packets made to be costly takes no
# more than a tenth of the processor; the kernel drops the rest of it.
_REST = 9.0
_INTERFACES_INTERVAL = 10.0  # seconds
_REOPEN_INTERVAL = 10.0
_MAX_REMEMBERED = 1_000  # peers; more than a local network has
_TOLD_AGAIN_AFTER = 1.0  # seconds; the same find within it is an echo by another interface

log = structlog.get_logger(__name__)


class Mdns:
    """Asks who of the network is there, tells that this node is, and reports who answered.

    Args:
        fingerprint: of the network, in hexadecimal; it is shown to everybody on the LAN.
        addrs: returns this node's multiaddrs, each ending in ``/p2p/<peer_id>``, best first.
        on_found: told (peer ID, its multiaddrs, best first) at each answer; must not wait.

    Raises:
        ConfigError: the fingerprint does not fit a DNS label.
    """

    def __init__(
        self,
        *,
        peer_id: str,
        fingerprint: str,
        addrs: Callable[[], tuple[str, ...]],
        on_found: Callable[[str, tuple[str, ...]], None],
        rng: Rng,
    ) -> None:
        self._peer_id = peer_id
        self._service = packets.Service(fingerprint, packets.new_peer_name(rng))
        self._addrs = addrs
        self._on_found = on_found
        self._rng = rng
        self._asked = trio.Event()
        self._asked_by_others = trio.Event()
        self._network_changed = trio.Event()
        self._warned = False
        self._own_ips: frozenset[str] = frozenset()
        # peer ID -> (its addresses, trio.current_time() of the last report)
        self._told: dict[str, tuple[tuple[str, ...], float]] = {}

    async def run_forever(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Find and be found until cancelled; then take back what was told.

        A host where multicast is impossible is told once, and tried again now and then.
        """
        task_status.started()
        while True:
            try:
                with open_multicast_socket() as sock:
                    await self._run_on(sock)
            except OSError as exc:
                self._warn(f"port 5353 can't be used: {exc.strerror or exc}")
            await trio.sleep(_REOPEN_INTERVAL)

    async def _run_on(self, sock: MulticastSocket) -> None:
        self._follow_interfaces(sock)
        self._asked.set()  # tell without being asked, too
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen_forever, sock)
                nursery.start_soon(self._ask_forever, sock)
                nursery.start_soon(self._answer_forever, sock)
                nursery.start_soon(self._follow_interfaces_forever, sock)
        finally:
            self._tell(sock, ttl=0)

    def _warn(self, error: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "mdns_unavailable",
                error=error,
                advice="this node can't be found on the LAN; join others with --bootstrap "
                "and say --no-mdns",
            )

    # Interfaces

    async def _follow_interfaces_forever(self, sock: MulticastSocket) -> None:
        while True:
            await trio.sleep(_INTERFACES_INTERVAL)
            if self._follow_interfaces(sock):
                self._network_changed.set()
                self._asked.set()

    def _follow_interfaces(self, sock: MulticastSocket) -> tuple[Interface, ...]:
        now_there = interfaces()
        self._own_ips = frozenset(each.ip for each in now_there)
        joined = sock.follow(now_there)
        if not sock.joined:
            self._warn("no interface can do multicast")
        return joined

    # Asking

    async def _ask_forever(self, sock: MulticastSocket) -> None:
        question = packets.query(self._service)
        interval = FIRST_INTERVAL
        while True:
            for interface in sock.joined:
                sock.send(interface, question)
            if await self._wait_to_ask(interval):
                interval = FIRST_INTERVAL
            else:
                interval = min(interval * _SLOWER, LAST_INTERVAL)

    async def _wait_to_ask(self, interval: float) -> bool:
        """Wait for about ``interval`` seconds; return at once, with True, on a new network."""
        self._network_changed = trio.Event()
        latest = trio.current_time() + interval * _MAX_POSTPONED
        while True:
            self._asked_by_others = trio.Event()
            due = trio.current_time() + interval * self._rng.uniform(0.8, 1.2)
            with trio.move_on_at(min(due, latest)) as waiting:
                await self._wait_for_news()
            if self._network_changed.is_set():
                return True
            # While young, answers are what this node needs; later, any question brings them.
            if waiting.cancelled_caught or interval < LAST_INTERVAL:
                await trio.sleep_until(min(due, latest))
                return False

    async def _wait_for_news(self) -> None:
        async with trio.open_nursery() as nursery:
            for event in (self._asked_by_others, self._network_changed):
                nursery.start_soon(_cancel_after, event, nursery.cancel_scope)

    # Answering

    async def _answer_forever(self, sock: MulticastSocket) -> None:
        sent: deque[float] = deque(maxlen=_MAX_ANSWERS)
        while True:
            await self._asked.wait()
            await trio.sleep(self._rng.uniform(*_ANSWER_DELAY))
            if len(sent) == _MAX_ANSWERS:
                await trio.sleep_until(sent[0] + _MAX_ANSWERS)
            self._asked = trio.Event()
            sent.append(trio.current_time())
            self._tell(sock, ttl=packets.TTL)

    def _tell(self, sock: MulticastSocket, *, ttl: int) -> None:
        addrs = self._addrs()
        for interface in sock.joined:
            told = packets.addrs_for(addrs, interface.ip)
            packet = packets.answer(self._service, told, host_ip=interface.ip, ttl=ttl)
            if packet is not None:
                sock.send(interface, packet)

    # Hearing

    async def _listen_forever(self, sock: MulticastSocket) -> None:
        while True:
            try:
                data, source = await sock.receive()
            except OSError as exc:
                log.debug("mdns_not_received", error=str(exc))
                await trio.sleep(1)
                continue
            began = trio.current_time()
            self._hear(packets.parse(data, self._service), source)
            await trio.sleep(_REST * (trio.current_time() - began))

    def _hear(self, packet: packets.Packet, source: str) -> None:
        if packet.asks:
            self._asked.set()
            if source not in self._own_ips:
                self._asked_by_others.set()
        for found in packet.found:
            if found.peer_id == self._peer_id:
                continue
            if found.is_leaving:
                self._told.pop(found.peer_id, None)
                continue
            same_host = source in self._own_ips
            addrs = packets.addrs_from(found.addrs, source, is_same_host=same_host)
            if addrs and self._is_news(found.peer_id, addrs):
                self._on_found(found.peer_id, addrs)

    def _is_news(self, peer_id: str, addrs: tuple[str, ...]) -> bool:
        now = trio.current_time()
        before = self._told.pop(peer_id, None)
        if before is None:
            log.debug("mdns_found", peer_id=peer_id, addrs=addrs)
        elif before[0] == addrs and now - before[1] < _TOLD_AGAIN_AFTER:
            self._told[peer_id] = before
            return False
        if len(self._told) >= _MAX_REMEMBERED:
            self._told.pop(next(iter(self._told)))
        self._told[peer_id] = (addrs, now)
        return True


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
