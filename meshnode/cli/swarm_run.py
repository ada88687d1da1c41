"""What ``meshnode swarm`` does: play a script on a swarm, then tell what the mesh did."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import trio
from trio.testing import MockClock

from meshnode.cli.logs import set_up_logs
from meshnode.cli.output import console, print_json, print_table
from meshnode.cli.running import first_mesh_error, raise_file_limit, run_until_signalled
from meshnode.errors import ConfigError
from meshnode.testing.swarm import MeshKind, Swarm, open_swarm
from meshnode.testing.swarm_plot import check_plotting, draw
from meshnode.testing.swarm_report import RunTime, report_of
from meshnode.testing.swarm_script import DEFAULT_SCRIPT, Action, Step, parse_step, play
from meshnode.values import parse_log_level

# After the last step, so that what it does can be seen.
_AFTERMATH = 15.0  # seconds
_TICK = 0.5  # seconds on the swarm's clock between two looks at the progress
_MAX_NODES = 20_000


@dataclass(frozen=True, slots=True)
class SwarmOrder:
    """What the command line asked for."""

    nodes: int
    mesh: str
    seed: int
    duration: float | None  # seconds after the first convergence
    said: Mapping[str, tuple[str, ...]]  # steps as typed, by action
    loss: float
    interval: float  # seconds
    patience: float  # seconds
    as_json: bool
    plot: Path | None
    log_level: str


def run_swarm(order: SwarmOrder) -> int:
    """Run the swarm and print its report; return the exit code.

    Raises:
        ConfigError: the order can't be carried out; nothing was started.
    """
    steps = _steps(order)
    _check(order, steps)
    set_up_logs(parse_log_level(order.log_level), "pretty")
    if order.mesh == "libp2p":
        raise_file_limit()
    run = _Run(order, steps)
    clock = MockClock(autojump_threshold=0) if order.mesh == "memory" else None
    try:
        exit_code = trio.run(run_until_signalled, run.run, clock=clock)
    except BaseExceptionGroup as group:
        error = first_mesh_error(group)
        if error is None:
            raise
        raise error from group
    if run.report is None:
        return exit_code or 1
    _tell(run.report, order)
    return exit_code or (0 if _went_well(run.report) else 1)


def _steps(order: SwarmOrder) -> tuple[Step, ...]:
    steps = tuple(
        parse_step(cast(Action, action), text)
        for action, texts in order.said.items()
        for text in texts
    )
    return steps or DEFAULT_SCRIPT


def _check(order: SwarmOrder, steps: Sequence[Step]) -> None:
    if order.mesh not in get_args(MeshKind):
        raise ConfigError(f"--mesh {order.mesh}: choose memory or libp2p")
    if not 1 <= order.nodes <= _MAX_NODES:
        raise ConfigError(f"-n {order.nodes}: give a number from 1 to {_MAX_NODES}")
    if not 0.0 <= order.loss < 1.0:
        raise ConfigError(f"--loss {order.loss:g}: give a share from 0 to below 1, such as 0.05")
    if order.interval < 1.0:
        raise ConfigError(f"--interval {order.interval:g}: nodes announce once a second at most")
    for step in steps:
        if order.mesh != "memory" and step.action in ("cut", "freeze"):
            raise ConfigError(f"--{step.action} needs --mesh memory: real sockets can't be cut")
        number = int(step.who[1:]) if step.who.startswith("#") else 0
        if number >= order.nodes:
            raise ConfigError(f"--{step.action}: there is no node {number} among {order.nodes}")
    if order.loss and order.mesh != "memory":
        raise ConfigError("--loss needs --mesh memory: sockets of one machine lose nothing")
    if order.plot is not None:
        check_plotting()


class _Run:
    """One run, and its report as soon as there is a swarm to report of."""

    def __init__(self, order: SwarmOrder, steps: Sequence[Step]) -> None:
        self.report: dict[str, object] | None = None
        self._order = order
        self._steps = steps
        last = max(step.at + step.lasts for step in steps)
        self._duration = order.duration if order.duration is not None else last + _AFTERMATH

    async def run(self) -> None:
        order = self._order
        cpu, wall = time.process_time(), time.monotonic()
        swarm: Swarm | None = None
        complete = False
        try:
            async with open_swarm(
                order.nodes,
                mesh=cast(MeshKind, order.mesh),
                seed=order.seed,
                announce_interval=order.interval,
                online_window=4 * order.interval,
                loss=order.loss,
            ) as swarm:
                try:
                    with _progress(self._duration) as advance:
                        await self._play(swarm, advance)
                    complete = True
                finally:
                    # Before the nodes are closed, which would look like everybody's death.
                    virtual = order.mesh == "memory"
                    self.report = report_of(
                        swarm,
                        seed=order.seed,
                        steps=[str(step) for step in self._steps],
                        complete=complete,
                        run_time=None if virtual else RunTime.since(cpu, wall),
                    )
        finally:
            if swarm is not None:
                swarm.close()

    async def _play(self, swarm: Swarm, advance: Callable[[float, str], None]) -> None:
        doing = ""

        def on_event(event: str) -> None:
            nonlocal doing
            doing = event

        async def show_forever() -> None:
            while True:
                advance(swarm.now(), doing)
                await trio.sleep(_TICK)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_forever)
            await play(
                swarm,
                self._steps,
                duration=self._duration,
                patience=self._order.patience,
                on_event=on_event,
            )
            nursery.cancel_scope.cancel()


@contextmanager
def _progress(duration: float) -> Iterator[Callable[[float, str], None]]:
    """Show a bar on stderr where that is a terminal; yield what moves it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    screen = console(sys.stderr)
    with Progress(
        TextColumn("{task.fields[doing]}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as bar:
        task = bar.add_task("", total=duration, doing="starting")

        def advance(now: float, doing: str) -> None:
            bar.update(task, completed=min(now, duration), doing=doing)

        yield advance


def _went_well(report: Mapping[str, object]) -> bool:
    return bool(report["complete"] and report["converged"]) and report["false_evictions"] == 0


def _tell(report: dict[str, object], order: SwarmOrder) -> None:
    if order.plot is not None:
        draw(report, order.plot)
    if order.as_json:
        print_json(report)
        return
    _print(report)


def _print(report: Mapping[str, Any]) -> None:
    """Print the report for people."""
    print(
        f"{report['nodes']} nodes on {report['mesh']}, seed {report['seed']}: "
        f"{report['duration_s']:.1f} s, {report['living']} alive at the end\n"
    )
    spreads = [(f"right after {one['after']}", one) for one in report["convergence"]]
    spreads.append(("a death noticed", report["detection"]))
    rows = [
        (what, one["count"], *(_seconds(one[name]) for name in ("p50_s", "p99_s", "max_s")))
        for what, one in spreads
    ]
    print_table(("", ">of", ">p50 s", ">p99 s", ">max s"), rows)
    print()
    kinds = report["evictions"]["by_kind"]
    node = report["per_node"]
    facts = [
        ("ledgers right at the end", "yes" if report["converged"] else "NO"),
        ("deaths unnoticed, pairs", sum(len(one["unnoticed_by"]) for one in report["deaths"])),
        ("false evictions", kinds["false"]),
        ("of cut or stopped nodes, or late", kinds["cut"] + kinds["frozen"] + kinds["late"]),
        ("announcements heard per node", f"{node['announcements_heard']:.1f}"),
        ("  per second", f"{node['announcements_heard_per_s'] or 0.0:.2f}"),
        ("  per second at most", f"{node['announcement_budget_per_s']:.2f}"),
        ("  bytes", f"{node['announcement_bytes_heard']:.0f}"),
        ("copies received per node", _whole(node["copies_received"])),
        ("links per node", f"{node['links'] or 0.0:.1f}"),
        ("CPU per node, s", _seconds(node["cpu_s"])),
        ("CPU per announcement heard, ms", _seconds(node["cpu_ms_per_announcement"])),
    ]
    print_table(("", ">"), facts)
    if not report["complete"]:
        print("\nbroken off; this is how it stood then")


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _whole(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"
