"""Runs a node in this process: logs, signals, the ready line, the exit code."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import structlog
import trio

from meshnode import __version__
from meshnode.cli import service_manager
from meshnode.cli.logs import set_up_logs
from meshnode.cli.output import say
from meshnode.config import DEFAULT_OPEN_NETWORK, Config
from meshnode.errors import MeshnodeError

_log = structlog.get_logger(__name__)

# Between two looks at the files that say who belongs.
_LOOK_INTERVAL = 0.5  # seconds

# Containers made and not freed before the young ones are looked through (Python's own: 700), which
# takes about 1 ms; some MB of cycles wait at most. Then how many such rounds before a wider one.
_GC_THRESHOLDS = (10_000, 10, 10)

# A proxy needs two descriptors for each client; the usual soft limit of 1,024 is soon reached.
_FILE_LIMIT = 65_536


def run_node_here(config: Config, read_again: Callable[[], Config]) -> int:
    """Run a node until a signal or its own end; return the exit code.

    ``read_again`` is asked for the settings when a file that says who belongs has changed.

    Raises:
        MeshnodeError: the node can't run; unless the log is JSON, where it is a log line.
    """
    set_up_logs(config.log_level, config.log_format)
    raise_file_limit()
    for warning in config.warnings:
        _log.warning("setting_doubtful", warning=warning)

    from meshnode.node import run_node

    drain, reload = trio.Event(), Reload()
    run = partial(
        run_node,
        config,
        on_ready=partial(_on_ready, config),
        watch_settings=partial(follow_belonging_forever, config, read_again, reload),
        on_draining=_tell_draining,
        drain=drain,
    )
    try:
        return trio.run(run_until_signalled, run, drain, reload)
    except BaseExceptionGroup as group:
        error = first_mesh_error(group)
        if error is None:
            raise
        return _end_with(error, config)
    except MeshnodeError as error:
        return _end_with(error, config)


class Reload:
    """A wish to read the settings again, though no file seems to have changed."""

    def __init__(self) -> None:
        self._wished = trio.Event()

    def wish(self) -> None:
        self._wished.set()

    async def wished(self, within: float) -> bool:
        """Wait for a wish; return whether one came within so many seconds."""
        with trio.move_on_after(within):
            await self._wished.wait()
        came = self._wished.is_set()
        self._wished = trio.Event() if came else self._wished
        return came


async def follow_belonging_forever(
    config: Config,
    read_again: Callable[[], Config],
    reload: Reload,
    take: Callable[[Config], None],
) -> None:
    """Hand over the settings whenever a token or a list of peers was written anew, or on a wish."""
    paths = (config.token_file, config.allow_peers_file, config.block_peers_file)
    watched = [path for path in paths if path is not None and path != "-"]
    seen = [_stamp(path) for path in watched]
    while True:
        wished = await reload.wished(within=_LOOK_INTERVAL if watched else math.inf)
        now = [_stamp(path) for path in watched]
        if now == seen and not wished:
            continue
        seen = now
        if wished:
            service_manager.notify(*service_manager.reloading())
        try:
            take(read_again())
        except MeshnodeError as exc:
            _log.warning(
                "settings_not_taken", error=str(exc), advice="what held before goes on holding"
            )
        if wished:
            _log.info("settings_read_again")
            service_manager.notify(service_manager.READY)


def _tell_draining() -> None:
    service_manager.notify(
        service_manager.STOPPING, service_manager.status("draining: running requests may end")
    )


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


async def run_until_signalled(
    run: Callable[[], Awaitable[None]],
    drain: trio.Event | None = None,
    reload: Reload | None = None,
) -> int:
    """Run ``run`` until it ends or signals end it; return the exit code.

    SIGINT, SIGTERM and SIGHUP cancel it. With ``drain``, SIGTERM sets that instead, and leaves the
    ending to ``run``; the next signal cancels. With ``reload``, and under a service manager, SIGHUP
    reads the settings again. A signal after the cancelling one ends the process at once.
    """
    ending = _Ending(drain, reload if service_manager.is_listening() else None)
    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to be left running
        heeded.append(signal.SIGHUP)

    async def watch_signals(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*heeded) as signals:
            task_status.started()
            async for number in signals:
                ending.heed(signal.Signals(number))

    async with trio.open_nursery() as nursery:
        await nursery.start(watch_signals)
        with ending.scope:
            await run()
        nursery.cancel_scope.cancel()
    return ending.exit_code


class _Ending:
    """What each signal does, by those that came before it."""

    def __init__(self, drain: trio.Event | None, reload: Reload | None) -> None:
        self.exit_code = 0
        self.scope = trio.CancelScope()
        self._drain = drain
        self._reload = reload

    def heed(self, number: signal.Signals) -> None:
        if self.scope.cancel_called:
            os._exit(128 + number)
        if number == signal.SIGHUP and self._reload is not None:
            self._reload.wish()
            return
        _log.info("stopping", signal=number.name)
        if number == signal.SIGTERM and self._drain is not None:
            if not self._drain.is_set():
                self._drain.set()
                return
            self.exit_code = 128 + number  # what ran was cut
        if number == signal.SIGINT:
            self.exit_code = 130
        service_manager.notify(service_manager.STOPPING)
        self.scope.cancel()


def _on_ready(config: Config, facts: Mapping[str, object]) -> None:
    rest_collector()
    announce_ready(config, facts)


def rest_collector() -> None:
    """Take what was loaded so far out of the garbage collector's rounds, and make those fewer.

    Nearly all garbage here goes by counting references. Left alone, the collector looks through
    hundreds of thousands of objects that stay, and takes a tenth of a busy node's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def announce_ready(config: Config, facts: Mapping[str, object]) -> None:
    """Say that the node can serve: one JSON line on stdout, or some lines for people on stderr.

    ``facts`` holds peer_id, addrs, proxy and api, as the node bound them. A service manager that
    waits for it is told, too.
    """
    service_manager.notify(
        service_manager.READY,
        service_manager.status(f"up as {facts.get('peer_id')}, api on {facts.get('api')}"),
    )
    if config.log_format == "pretty":
        for readable in ready_lines(config, facts):
            say(readable)
        return
    line: dict[str, object] = {"event": "ready", "schema_version": 1}
    line |= {key: facts.get(key) for key in ("peer_id", "addrs", "proxy", "api")}
    print(json.dumps(line, separators=(",", ":")), file=sys.stdout, flush=True)


def ready_lines(config: Config, facts: Mapping[str, object]) -> list[str]:
    """Return what a person who started a node wants to know, without any secret."""
    listed = facts.get("addrs")
    addrs = [str(addr) for addr in listed] if isinstance(listed, (list, tuple)) else []
    lines = [f"meshnode {__version__}: {config.name} is up as {facts.get('peer_id')}"]
    lines += [f"  listens  {addr}" for addr in addrs]
    lines += [f"  exposes  {service}" for service in config.expose]
    if facts.get("proxy"):
        lines.append(f"  proxy    http://{facts['proxy']}/v1")
    lines.append(f"  api      http://{facts.get('api')}")
    far = [addr for addr in addrs if not addr.startswith(("/ip4/127.", "/ip6/::1/"))] or addrs
    if far:
        lines.append("To join from another host:")
        lines.append(f"  meshnode up {_belonging(config)} --bootstrap {far[0]}")
    return lines


def first_mesh_error(group: BaseExceptionGroup[BaseException]) -> MeshnodeError | None:
    """Return the error that the exit code comes from: the first of ours in the group."""
    for error in group.exceptions:
        if isinstance(error, MeshnodeError):
            return error
        if isinstance(error, BaseExceptionGroup):
            found = first_mesh_error(error)
            if found is not None:
                return found
    return None


def _belonging(config: Config) -> str:
    if not config.open:
        return f"--token-file {config.token_file or 'FILE'}"
    return f"--open --network {config.network or DEFAULT_OPEN_NETWORK}"


def _end_with(error: MeshnodeError, config: Config) -> int:
    if config.log_format == "pretty":
        raise error
    _log.error("stopped", error=str(error), exit_code=error.exit_code)
    return error.exit_code


def raise_file_limit() -> None:
    """Take as many descriptors as the system lets this process have, up to what a node needs."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILE_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _FILE_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
