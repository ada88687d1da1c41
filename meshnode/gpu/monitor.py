"""Keeps the newest reading of this host's GPU memory, and never waits for a driver.

Each read runs in a worker thread with a time limit. A read that overruns is abandoned, and its
reader left alone until that thread comes back: a hung driver costs one thread, not one per round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import structlog
import trio

from meshnode.errors import GpuReadError
from meshnode.gpu import GpuMemory, VramReader
from meshnode.gpu.faults import ABSENT, PASSED_ON, gpu_error
from meshnode.metrics import Metrics

# Free memory that moves less than this is not news for other nodes: a tenth, so that a mesh
# of busy GPUs doesn't flood itself, and a floor, so that a nearly full GPU doesn't either.
CHANGE_SHARE = 0.1
SMALLEST_CHANGE = 64 * 1024 * 1024  # bytes

OnChange = Callable[[GpuMemory | None], object]

_log = structlog.get_logger("meshnode.gpu")


class _Slot:
    """One reader, and whether a read of it is still out."""

    def __init__(self, reader: VramReader) -> None:
        self.reader = reader
        # Its only token comes back when the thread does, however long ago we gave up on it.
        self.limiter = trio.CapacityLimiter(1)
        self.asked_at = 0.0
        self.logged: frozenset[str] | None = None  # the state that the log last told


class GpuMonitor:
    """Reads the first reader that finds hardware, and remembers which it was."""

    def __init__(
        self,
        readers: Sequence[VramReader],
        metrics: Metrics,
        *,
        interval: float = 5.0,
        time_limit: float = 3.0,
    ) -> None:
        """Durations are seconds of trio's clock; earlier readers take precedence."""
        self._slots = [_Slot(reader) for reader in readers]
        self._metrics = metrics
        self._interval = interval
        self._time_limit = time_limit
        self._chosen: _Slot | None = None
        self._announced: GpuMemory | None = None  # what on_change was last told
        self.latest: GpuMemory | None = None  # None = unknown
        self.error: GpuReadError | None = None  # why it is unknown
        metrics.available_vram_bytes.set(math.nan)

    @property
    def source(self) -> str | None:
        """The source of ``latest``, or of the reading that was lost; None = never found any."""
        return self._chosen.reader.source if self._chosen else None

    async def watch_forever(
        self,
        on_change: OnChange | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Read every ``interval``; call ``on_change`` when others should hear of it.

        ``task_status`` reports ready after the first round, which a hung driver prolongs by no
        more than the time limit.
        """
        await self._refresh(on_change)
        task_status.started()
        while True:
            await trio.sleep(self._interval)
            await self._refresh(on_change)

    async def _refresh(self, on_change: OnChange | None) -> None:
        memory = await self._read_round()
        self.latest = memory
        self._metrics.available_vram_bytes.set(math.nan if memory is None else memory.available)
        if _is_news(self._announced, memory):
            self._announced = memory
            if on_change is not None:
                on_change(memory)

    async def _read_round(self) -> GpuMemory | None:
        """Ask the readers in order, until one answers or may not be passed over."""
        errors: list[tuple[_Slot, GpuReadError]] = []
        memory = None
        for slot in self._slots:
            try:
                memory = await self._read(slot)
            except GpuReadError as error:
                errors.append((slot, error))
                if slot is self._chosen or error.code not in PASSED_ON:
                    break
                continue
            self._chosen = slot
            break
        self.error = None if memory is not None else _worst(errors)
        for slot, failure in errors:
            if failure.code not in ABSENT or failure is self.error:
                self._note(slot, (failure,), memory=None)
        if memory is not None and self._chosen is not None:
            partial = tuple(device.error for device in memory.devices if device.error is not None)
            self._note(self._chosen, partial, memory=memory)
        return memory

    async def _read(self, slot: _Slot) -> GpuMemory:
        now = trio.current_time()
        if slot.limiter.available_tokens == 0:
            waited = now - slot.asked_at
            raise gpu_error("timeout", f"{slot.reader.source}, asked {waited:.0f} s ago")
        slot.asked_at = now
        with trio.move_on_after(self._time_limit):
            return await trio.to_thread.run_sync(
                _read_guarded,
                slot.reader,
                abandon_on_cancel=True,
                limiter=slot.limiter,
                thread_name=f"gpu-{slot.reader.source}",
            )
        raise gpu_error("timeout", f"{slot.reader.source}, limit {self._time_limit:g} s")

    def _note(
        self, slot: _Slot, errors: tuple[GpuReadError, ...], *, memory: GpuMemory | None
    ) -> None:
        """Count every error; log only when the set of codes differs from last time."""
        for error in errors:
            self._metrics.gpu_read_errors.labels(code=error.code).inc()
        state = frozenset(error.code for error in errors)
        if slot.logged == state:
            return
        slot.logged = state
        for error in {error.code: error for error in errors}.values():
            source, code = slot.reader.source, error.code
            if code in ABSENT:
                _log.info("gpu_memory_not_read", source=source, code=code, error=str(error))
            else:
                _log.warning("gpu_memory_not_read", source=source, code=code, error=str(error))
        if memory is not None:
            _log.info(
                "gpu_memory_read",
                source=slot.reader.source,
                available_vram=memory.available,
                total_vram=memory.total,
                gpu_count=memory.count,
            )


def _read_guarded(reader: VramReader) -> GpuMemory:
    """Read; whatever a driver's binding raises besides its own errors must not end the node."""
    try:
        return reader.read()
    except GpuReadError:
        raise
    except Exception as exc:
        raise gpu_error("reader_failed", f"{reader.source}: {exc!r}") from exc


def _worst(errors: Sequence[tuple[_Slot, GpuReadError]]) -> GpuReadError | None:
    """A fault tells more than hardware that isn't there; among equals the first reader's."""
    faults = [error for _, error in errors if error.code not in ABSENT]
    return next(iter(faults or [error for _, error in errors]), None)


def _is_news(told: GpuMemory | None, memory: GpuMemory | None) -> bool:
    if told is None or memory is None:
        return told is not memory
    if (told.total, told.count) != (memory.total, memory.count):
        return True
    moved = abs(memory.available - told.available)
    return moved >= SMALLEST_CHANGE and moved > CHANGE_SHARE * told.available
