"""The services that this host exposes: where they are, who uses them, whether they are well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
import trio

from meshnode.core.health import Health
from meshnode.core.node_data import ServiceData
from meshnode.core.tunnel import Status
from meshnode.errors import OutOfDescriptors, PeerUnreachable, ProbeFailed
from meshnode.metrics import Metrics
from meshnode.net.probe import EngineView, Probe
from meshnode.net.tcp_stream import TcpStream, connect_tcp
from meshnode.values import AUTO, HealthCheck, HostPort

# Below the 3 s that an entry point waits for an answer, so that it hears the reason.
BACKEND_TIMEOUT = 2.5  # seconds
# Whether it accepts is cheap to ask and no engine logs it; what it has is asked more seldom.
_CONNECT_INTERVAL = 1.0  # seconds
_LOOK_INTERVAL = 5.0  # seconds
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
    check: HealthCheck = AUTO


@dataclass(slots=True)
class _Slot:
    service: LocalService
    probe: Probe
    metrics: Metrics
    holders: Counter[str] = field(default_factory=Counter)  # requests open, by who asked for them
    health: Health = field(default_factory=Health)
    view: EngineView | None = None  # what the last good look showed
    around: int = 0  # requests that came to the engine around the mesh, when it was last asked
    told: int = 0  # the load when ``on_change`` was last called
    show_load: Callable[[float], None] = field(init=False)

    def __post_init__(self) -> None:
        self.show_load = self.metrics.in_flight.labels(service=self.name).set

    @property
    def name(self) -> str:
        return self.service.service_id

    @property
    def load(self) -> int:
        return self.holders.total() + self.around


class LocalServices:
    """Counts who uses which service, admits or says why not, and looks after their health.

    Args:
        on_change: called when what should be announced changed: load, health, models.
    """

    def __init__(
        self,
        services: Sequence[LocalService],
        *,
        metrics: Metrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.on_change = on_change
        # Told who asks, at both ends of each request.
        self.on_use: Callable[[str], None] = lambda _: None
        self.draining = False  # then nobody new is admitted
        self._slots = {
            s.service_id: _Slot(s, Probe(HostPort(s.host, s.port), s.check), metrics)
            for s in services
        }

    @property
    def services(self) -> tuple[LocalService, ...]:
        return tuple(slot.service for slot in self._slots.values())

    @property
    def total_in_flight(self) -> int:
        return sum(slot.holders.total() for slot in self._slots.values())

    def in_flight_of(self, peer_id: str) -> int:
        """Return the requests of one peer that are open on any service."""
        return sum(slot.holders[peer_id] for slot in self._slots.values())

    def announced(self) -> tuple[ServiceData, ...]:
        """Return what is to be said of each service now."""
        return tuple(_service_data(slot) for slot in self._slots.values())

    def in_flight(self, service_id: str) -> int:
        """Return the requests open on a service, everybody's."""
        slot = self._slots.get(service_id)
        return slot.load if slot is not None else 0

    def in_flight_of_others(self, service_id: str, peer_id: str) -> int:
        """Return the requests open on a service, without those of ``peer_id``."""
        slot = self._slots.get(service_id)
        return slot.load - slot.holders[peer_id] if slot is not None else 0

    def is_healthy(self, service_id: str) -> bool:
        """Whether the service was well when it was last looked at; True before the first look."""
        slot = self._slots.get(service_id)
        return slot is not None and slot.health.is_healthy

    def unhealthy(self) -> dict[str, str]:
        """Return why, for people, of each service that is not well."""
        return {
            name: f"{slot.service.host}:{slot.service.port}: {slot.health.reason}"
            for name, slot in self._slots.items()
            if not slot.health.is_healthy
        }

    def admit(self, service_id: str) -> Status:
        """Say whether one more request is welcome; claim it at once if so, without an await.

        One that did not accept is tried all the same: only trying tells whether it is back. One
        that accepts, but says that it is not well, gets nothing until it says otherwise.
        """
        slot = self._slots.get(service_id)
        if slot is None:
            return "no_such_service"
        if self.draining:
            return "draining"
        if not slot.health.is_healthy and slot.probe.speaks_http:
            return "unhealthy"
        if slot.service.max_in_flight and slot.holders.total() >= slot.service.max_in_flight:
            return "busy"
        return "ok"

    def is_used_by(self, peer_id: str) -> bool:
        """Whether a peer has requests open here."""
        return any(slot.holders[peer_id] for slot in self._slots.values())

    @contextmanager
    def claim(self, service_id: str, peer_id: str) -> Iterator[None]:
        """Count one request of ``peer_id`` on the service, until the block is left."""
        slot = self._slots[service_id]
        slot.holders[peer_id] += 1
        self.on_use(peer_id)
        self._tell_load(slot)
        try:
            yield
        finally:
            slot.holders[peer_id] -= 1
            if not slot.holders[peer_id]:
                del slot.holders[peer_id]
            self.on_use(peer_id)
            self._tell_load(slot)

    async def connect(self, service_id: str) -> TcpStream:
        """Connect to a service, and learn from that and from its bytes whether it is well.

        Raises:
            PeerUnreachable: nothing accepts there.
        """
        slot = self._slots[service_id]
        stream = await self._connect(slot)
        stream.on_data = lambda: slot.health.saw_life(trio.current_time())
        return stream

    async def check_health_forever(self) -> None:
        """Look at each service now and then, until cancelled."""
        async with trio.open_nursery() as nursery:
            for slot in self._slots.values():
                if slot.service.check.kind != "off":
                    nursery.start_soon(self._check_forever, slot)

    async def _check_forever(self, slot: _Slot) -> None:
        look_due = trio.current_time()
        while True:
            wants_look = not slot.health.is_healthy and slot.probe.speaks_http
            if wants_look or trio.current_time() >= look_due:
                look_due = trio.current_time() + _LOOK_INTERVAL
                if not await self._look(slot):
                    look_due = trio.current_time()
            else:
                try:
                    stream = await self._connect(slot)
                except PeerUnreachable:
                    look_due = trio.current_time()
                else:
                    await stream.aclose()
            await trio.sleep(_CONNECT_INTERVAL)

    async def _look(self, slot: _Slot) -> bool:
        """Ask the service what it is and has; return whether it answered as it should."""
        held = slot.holders.total()
        try:
            if not slot.probe.speaks_http:
                await (await self._connect(slot)).aclose()
            view = await slot.probe.look()
        except PeerUnreachable:
            return False
        except ProbeFailed as exc:
            self._failed(slot, str(exc), is_certain=exc.is_certain)
            return False
        self._see(slot, view, held)
        return True

    def _see(self, slot: _Slot, view: EngineView, held: int) -> None:
        before, slot.view = slot.view, view
        if before is None or before.check != view.check:
            log.info("service_recognised", service=slot.name, kind=str(view.check))
        is_new = before is None or before.catalogue != view.catalogue
        if is_new and view.catalogue.unnameable:
            log.warning(
                "models_not_announced",
                service=slot.name,
                models=view.catalogue.unnameable,
                error="an announcement names 256 models of a service, each of 128 printable "
                "characters at most",
            )
        # Requests of ours may have begun or ended while it was asked.
        held = max(held, slot.holders.total())
        slot.around = max(0, (view.load or 0) - held)
        self._tell_load(slot)
        self._answered(slot)
        if is_new:
            self.on_change()

    async def _connect(self, slot: _Slot) -> TcpStream:
        service = slot.service
        try:
            stream = await connect_tcp(service.host, service.port, timeout=BACKEND_TIMEOUT)
        except OutOfDescriptors:
            raise  # that is no fault of the service
        except PeerUnreachable as exc:
            is_late = isinstance(exc.__cause__, trio.TooSlowError)
            if not is_late:
                slot.probe.forget()  # its process is gone; the next one may be another engine
            self._failed(slot, str(exc), is_certain=not is_late)
            raise
        if not slot.probe.speaks_http:  # of the others, only an answer tells
            self._answered(slot)
        return stream

    def _answered(self, slot: _Slot) -> None:
        if slot.health.answered(trio.current_time()):
            log.info("service_healthy", service=slot.name)
            self.on_change()
        self._metric(slot)

    def _failed(self, slot: _Slot, reason: str, *, is_certain: bool) -> None:
        if slot.service.check.kind == "off":
            return  # nobody would look whether it is back
        if slot.health.failed(
            reason,
            is_certain=is_certain,
            is_busy=bool(slot.holders),
            now=trio.current_time(),
        ):
            slot.around = 0
            log.warning("service_unhealthy", service=slot.name, error=reason)
            self.on_change()
        self._metric(slot)

    def _metric(self, slot: _Slot) -> None:
        slot.metrics.service_healthy.labels(service=slot.name).set(slot.health.is_healthy)

    def _tell_load(self, slot: _Slot) -> None:
        load = slot.load
        slot.show_load(load)
        if abs(load - slot.told) > slot.told * _TELL_STEP:
            slot.told = load
            self.on_change()


def _service_data(slot: _Slot) -> ServiceData:
    catalogue = slot.view.catalogue if slot.view is not None else None
    return ServiceData(
        service_id=slot.name,
        models=catalogue.models if catalogue else (),
        in_flight=slot.load,
        max_in_flight=slot.service.max_in_flight,
        healthy=slot.health.is_healthy,
        loaded=catalogue.loaded if catalogue else (),
    )
