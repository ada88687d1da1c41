"""The monitor's rules, on a clock that stands still unless the test moves it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import structlog
import trio
from trio.testing import MockClock

from meshnode.gpu import GpuDevice, GpuMemory, sum_devices
from meshnode.gpu.faults import FAULTS, gpu_error
from meshnode.gpu.fixed import FixedReader
from meshnode.gpu.monitor import GpuMonitor
from meshnode.gpu.probe import describe, find_readers
from meshnode.metrics import Metrics

GIB = 1024**3
INTERVAL = 5.0


class ScriptedReader:
    """Says what it is told to; a code is raised, "hang" waits for ``let_go``."""

    def __init__(self, says: GpuMemory | str | Exception, source: str = "scripted") -> None:
        self.source = source
        self.says = says
        self.reads = 0
        self.let_go = threading.Event()

    def read(self) -> GpuMemory:
        self.reads += 1
        if self.says == "hang":
            assert self.let_go.wait(10)
            return memory(1)
        if isinstance(self.says, str):
            raise gpu_error(self.says)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


def memory(gib: float, *, total_gib: int = 24) -> GpuMemory:
    return GpuMemory(int(gib * GIB), total_gib * GIB, 1)


class Watch:
    """A monitor whose rounds the test steps through one by one."""

    def __init__(self, monitor: GpuMonitor, metrics: Metrics) -> None:
        self.monitor = monitor
        self.metrics = metrics
        self.heard: list[GpuMemory | None] = []

    async def round(self) -> None:
        await self.monitor._refresh(self.heard.append)

    def count(self, code: str) -> float:
        value = self.metrics.registry.get_sample_value(
            "meshnode_gpu_read_errors_total", {"code": code}
        )
        return value or 0.0

    def gauge(self) -> float:
        value = self.metrics.registry.get_sample_value("meshnode_available_vram_bytes")
        assert value is not None
        return value


def watch(*readers: ScriptedReader | FixedReader) -> Watch:
    metrics = Metrics()
    return Watch(GpuMonitor(readers, metrics, interval=INTERVAL, time_limit=3.0), metrics)


async def until(condition: Callable[[], bool]) -> None:
    """Let worker threads finish; the mock clock does not move by itself."""
    with trio.fail_after(1):
        while not condition():
            await trio.to_thread.run_sync(threading.Event().wait, 0.001)


async def test_before_the_first_reading_memory_is_unknown() -> None:
    w = watch(FixedReader(8 * GIB))
    assert w.monitor.latest is None
    assert math.isnan(w.gauge())


async def test_a_reading_is_kept_shown_and_told() -> None:
    w = watch(FixedReader(8 * GIB))
    await w.round()
    assert w.monitor.latest == GpuMemory(8 * GIB, 8 * GIB, 1)
    assert w.monitor.source == "fixed"
    assert w.gauge() == 8 * GIB
    assert w.heard == [w.monitor.latest]


async def test_the_first_reader_that_finds_hardware_wins() -> None:
    w = watch(ScriptedReader("library_not_found"), ScriptedReader(memory(16), "amd"))
    await w.round()
    assert w.monitor.latest == memory(16)
    assert w.monitor.source == "amd"
    assert w.count("library_not_found") == 0  # absent hardware is no error beside a GPU


async def test_an_office_card_does_not_speak_for_a_lost_accelerator() -> None:
    accelerator = ScriptedReader(memory(20))
    w = watch(accelerator, ScriptedReader(memory(1), "amd"))
    await w.round()
    for code in ("gpu_is_lost", "library_not_found"):
        accelerator.says = code
        await w.round()
        assert w.monitor.latest is None
        assert w.monitor.error is not None and w.monitor.error.code == code
    accelerator.says = memory(20)
    await w.round()
    assert w.monitor.latest == memory(20)


async def test_an_accelerator_that_fails_from_the_start_is_not_passed_over() -> None:
    w = watch(ScriptedReader("no_permission"), ScriptedReader(memory(1), "amd"))
    await w.round()
    assert w.monitor.latest is None


async def test_a_better_reader_that_appears_later_takes_over() -> None:
    accelerator = ScriptedReader("driver_not_loaded")
    w = watch(accelerator, ScriptedReader(memory(1), "amd"))
    await w.round()
    assert w.monitor.source == "amd"
    accelerator.says = memory(20)
    await w.round()
    assert w.monitor.latest == memory(20)


async def test_an_error_is_counted_each_time_and_logged_once_per_change() -> None:
    reader = ScriptedReader(memory(20), "nvml")
    w = watch(reader)
    with structlog.testing.capture_logs() as logs:
        for says in (memory(20), "gpu_is_lost", "gpu_is_lost", "timeout", memory(20), memory(19)):
            reader.says = says
            await w.round()
    assert [(line["event"], line.get("code")) for line in logs] == [
        ("gpu_memory_read", None),
        ("gpu_memory_not_read", "gpu_is_lost"),
        ("gpu_memory_not_read", "timeout"),
        ("gpu_memory_read", None),
    ]
    assert (w.count("gpu_is_lost"), w.count("timeout")) == (2, 1)


async def test_a_reader_that_raises_what_nobody_foresaw_is_counted_and_the_node_lives() -> None:
    reader = ScriptedReader(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a card's name"))
    w = watch(reader)
    await w.round()
    assert w.monitor.latest is None
    assert w.count("reader_failed") == 1
    reader.says = memory(20)
    await w.round()
    assert w.monitor.latest == memory(20)


async def test_a_host_without_any_gpu_is_unknown_and_says_so_once() -> None:
    w = watch(ScriptedReader("library_not_found"), ScriptedReader("no_device"))
    with structlog.testing.capture_logs() as logs:
        await w.round()
        await w.round()
    assert w.monitor.latest is None
    assert w.heard == []  # unknown before, unknown after
    assert [(line["code"], line["log_level"]) for line in logs] == [("library_not_found", "info")]
    assert w.count("library_not_found") == 2


async def test_one_failing_device_is_logged_and_counted_while_the_others_serve() -> None:
    lost = GpuDevice("1", "B", "nvml", error=gpu_error("gpu_is_lost"))
    both = sum_devices([GpuDevice("0", "A", "nvml", 7, 8), lost])
    w = watch(ScriptedReader(both))
    with structlog.testing.capture_logs() as logs:
        await w.round()
        await w.round()
    assert w.monitor.latest == GpuMemory(7, 8, 1)
    assert [line["event"] for line in logs] == ["gpu_memory_not_read", "gpu_memory_read"]
    assert w.count("gpu_is_lost") == 2


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (memory(20), memory(18.5), False),  # less than a tenth
        (memory(20), memory(17), True),
        (memory(17), memory(20), True),
        (memory(0), memory(0.05), False),  # below the floor, whatever its share
        (memory(0), memory(1), True),
        (memory(20), memory(20, total_gib=48), True),  # a GPU appeared
        (memory(20), "gpu_is_lost", True),
    ],
)
async def test_others_hear_of_changes_worth_a_message(
    before: GpuMemory, after: GpuMemory | str, told: bool
) -> None:
    reader = ScriptedReader(before)
    w = watch(reader)
    await w.round()
    reader.says = after
    await w.round()
    assert len(w.heard) == (2 if told else 1)


async def test_many_small_steps_add_up_to_news() -> None:
    reader = ScriptedReader(memory(20))
    w = watch(reader)
    for gib in (20, 19.5, 19, 18.5, 18, 17.5):
        reader.says = memory(gib)
        await w.round()
    assert w.heard == [memory(20), memory(17.5)]


async def test_it_reads_every_five_seconds(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    reader = ScriptedReader(memory(20))
    w = watch(reader)
    await nursery.start(w.monitor.watch_forever)
    assert reader.reads == 1
    for reads in (2, 3, 4):
        mock_clock.jump(INTERVAL - 0.1)
        await trio.testing.wait_all_tasks_blocked()
        assert reader.reads == reads - 1
        mock_clock.jump(0.1)
        await trio.testing.wait_all_tasks_blocked()
        await until(lambda reads=reads: reader.reads == reads)
        await trio.testing.wait_all_tasks_blocked(0.02)


async def test_a_hung_read_is_given_up_never_doubled_and_welcome_back(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    reader = ScriptedReader("hang", "nvml")
    w = watch(reader)
    nursery.start_soon(w.round)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert w.monitor.error is None  # still waiting
    mock_clock.jump(3.0)
    await trio.testing.wait_all_tasks_blocked()
    assert w.monitor.error is not None and w.monitor.error.code == "timeout"

    for _ in range(5):
        await w.round()
    assert reader.reads == 1
    assert w.count("timeout") == 6

    reader.says = memory(20)
    reader.let_go.set()
    await until(lambda: w.monitor._slots[0].limiter.available_tokens == 1)
    await w.round()
    assert w.monitor.latest == memory(20)


def test_a_pretended_size_overrules_every_reader() -> None:
    (reader,) = find_readers(vram=24 * GIB)
    assert reader.read() == GpuMemory(24 * GIB, 24 * GIB, 1)
    assert [reader.source for reader in find_readers()] == ["nvml", "amd", "unified"]


def test_the_table_marks_what_is_announced() -> None:
    rows = describe(
        [ScriptedReader("library_not_found", "nvml"), FixedReader(GIB), FixedReader(2 * GIB)]
    )
    assert [(row.source, row.announced, row.error) for row in rows] == [
        ("nvml", False, "library_not_found"),
        ("fixed", True, None),
        ("fixed", False, None),
    ]


def test_every_fault_says_what_to_do() -> None:
    for code, fault in FAULTS.items():
        assert fault.advice in str(gpu_error(code))
    assert "nvidia-smi" in str(gpu_error("nvml_4242"))
