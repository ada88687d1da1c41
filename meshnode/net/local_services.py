"""The services that this host exposes: where they are, who uses them, whether they answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import trio

from meshnode.core.tunnel import Status
from meshnode.errors import PeerUnreachable
from meshnode.metrics import Metrics
from meshnode.net.tcp_stream import TcpStream, connect_tcp

# Below the 3 s that an entry point waits for an answer, so that it hears the reason.
BACKEND_TIMEOUT = 2.5  # seconds
_CHECK_INTERVAL = 5.0  # seconds between looks at a service that answers
_RECHECK_INTERVAL = 1.0  # and at one that does not: its return should be noticed at once
# A load is told anew once it differs by more than this part from what was told last.
_TELL_STEP = 0.1

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LocalService:
    """One TCP service of this host, or one that this host reaches."""

    service_id: str
    host: str
    port: int
    max_in_flight: int = 0  # 0 = no limit


@dataclass(slots=True)
class _Slot:
    service: LocalService
    holders: Counter[str]  # requests open, by the peer ID that asked for them
    healthy: bool = True
    told: int = 0  # the load when ``on_change`` was last called


class LocalServices:
    """Counts who uses which service, admits or says why not, and looks after their health.

    Args:
        on_change: called when what should be announced changed: load, health.
    """

    def __init__(
        self,
        services: Sequence[LocalService],
        *,
        metrics: Metrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_change = on_change
        self.draining = False  # then nobody new is admitted
        self._metrics = metrics
        self._slots = {s.service_id: _Slot(s, Counter()) for s in services}

    @property
    def services(self) -> tuple[LocalService, ...]:
        return tuple(slot.service for slot in self._slots.values())

    @property
    def total_in_flight(self) -> int:
        return sum(slot.holders.total() for slot in self._slots.values())

    def in_flight(self, service_id: str) -> int:
        """Return the requests open on a service, everybody's."""
        slot = self._slots.get(service_id)
        return slot.holders.total() if slot is not None else 0

    def in_flight_of_others(self, service_id: str, peer_id: str) -> int:
        """Return the requests open on a service, without those of ``peer_id``."""
        slot = self._slots.get(service_id)
        return slot.holders.total() - slot.holders[peer_id] if slot is not None else 0

    def is_healthy(self, service_id: str) -> bool:
        """Whether the service accepted when it was last tried; True before the first try."""
        slot = self._slots.get(service_id)
        return slot is not None and slot.healthy

    def admit(self, service_id: str) -> Status:
        """Say whether one more request is welcome; claim it at once if so, without an await.

        One that was not healthy is admitted all the same: only trying tells whether it is back.
        """
        slot = self._slots.get(service_id)
        if slot is None:
            return "no_such_service"
        if self.draining:
            return "draining"
        if slot.service.max_in_flight and slot.holders.total() >= slot.service.max_in_flight:
            return "busy"
        return "ok"

    @contextmanager
    def claim(self, service_id: str, peer_id: str) -> Iterator[None]:
        """Count one request of ``peer_id`` on the service, until the block is left."""
        slot = self._slots[service_id]
        slot.holders[peer_id] += 1
        self._tell_load(slot)
        try:
            yield
        finally:
            slot.holders[peer_id] -= 1
            if not slot.holders[peer_id]:
                del slot.holders[peer_id]
            self._tell_load(slot)

    async def connect(self, service_id: str) -> TcpStream:
        """Connect to a service, and learn whether it is healthy.

        Raises:
            PeerUnreachable: nothing accepts there.
        """
        slot = self._slots[service_id]
        service = slot.service
        try:
            stream = await connect_tcp(service.host, service.port, timeout=BACKEND_TIMEOUT)
        except PeerUnreachable as exc:
            self._set_health(slot, healthy=False, error=str(exc))
            raise
        self._set_health(slot, healthy=True)
        return stream

    async def check_health_forever(self) -> None:
        """Connect to each service now and then, until cancelled."""
        async with trio.open_nursery() as nursery:
            for slot in self._slots.values():
                nursery.start_soon(self._check_forever, slot)

    async def _check_forever(self, slot: _Slot) -> None:
        while True:
            try:
                stream = await self.connect(slot.service.service_id)
            except PeerUnreachable:
                await trio.sleep(_RECHECK_INTERVAL)
            else:
                await stream.aclose()
                await trio.sleep(_CHECK_INTERVAL)

    def _set_health(self, slot: _Slot, *, healthy: bool, error: str | None = None) -> None:
        if slot.healthy is not healthy:
            slot.healthy = healthy
            event = "service_healthy" if healthy else "service_unhealthy"
            log.info(event, service=slot.service.service_id, error=error)
            self.on_change()

    def _tell_load(self, slot: _Slot) -> None:
        load = slot.holders.total()
        self._metrics.in_flight.labels(service=slot.service.service_id).set(load)
        if abs(load - slot.told) > slot.told * _TELL_STEP:
            slot.told = load
            self.on_change()
