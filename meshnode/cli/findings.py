"""What ``meshnode doctor`` finds: one look at each thing that a node needs of its machine.

The law here: a look changes nothing that outlives it, waits a few seconds at most, and a failed
one ends with the command that mends it.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio

from meshnode.cli.api_client import Api, ask
from meshnode.config import Config, check_together
from meshnode.core import token as tokens
from meshnode.errors import (
    ListenFailed,
    MeshnodeError,
    NodeNotRunning,
    PeerUnreachable,
    TokenRefused,
)
from meshnode.values import HostPort, format_size

Verdict = Literal["ok", "warning", "failed", "skipped"]

# The time this was written: a clock that is further back would be outrun by every announcement
# that this host made before.
_LONG_AGO = 1_760_000_000.0  # Unix seconds, October 2025
_DIAL_LIMIT = 4.0  # seconds for each bootstrap
_SERVICE_LIMIT = 2.5  # seconds
# Each client takes two descriptors; below this a busy afternoon runs out of them.
_FEW_FILES = 4096
_LITTLE_SPACE = 16 * 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found; ``mend`` is the command that mends it."""

    check: str
    verdict: Verdict
    message: str
    mend: str | None = None


def examine(settings: Config) -> Iterator[Finding]:
    """Look at everything, one thing after another, with what ``meshnode up`` would run with.

    Where no token is named and a node runs here, that node's own word counts instead.
    """
    status = _ask_running(settings)
    if status and not settings.token_texts and not settings.open:
        yield from look_at_running(settings, status)
        return
    yield _settings(settings)
    yield _token(settings)
    yield look_at_clock(time.time())
    yield from _ports(settings, None if status is None else _addrs_of(settings, status))
    yield _mdns(settings)
    yield from _bootstraps(settings)
    yield from _gpus(settings)
    yield from _services(settings)
    yield _file_limit()
    yield from _state_folder(Path(settings.state_dir))


def _settings(settings: Config) -> Finding:
    try:
        check_together(settings)
    except MeshnodeError as exc:
        return Finding("settings", "failed", str(exc), "meshnode config show")
    if settings.warnings:
        return Finding("settings", "warning", settings.warnings[0], "meshnode config show")
    return Finding("settings", "ok", "they hold together")


def _token(settings: Config) -> Finding:
    if settings.open:
        return Finding("token", "skipped", "an open mesh needs none")
    if not settings.token_texts:
        return Finding(
            "token", "failed", "there is none", "(umask 077; meshnode token new > mesh.token)"
        )
    try:
        found = tokens.decode_all(settings.token_texts)
    except MeshnodeError as exc:
        return Finding("token", "failed", str(exc), "meshnode token show FILE")
    path = settings.token_file
    if path is not None and path != "-" and os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding("token", "warning", f"others can read {path}", f"chmod 600 {path}")
    newest = found[0]
    keys = "one key" if len(found) == 1 else f"{len(found)} keys"
    return Finding("token", "ok", f"network {newest.network}, {newest.fingerprint()}, {keys}")


def look_at_clock(now: float) -> Finding:
    """Say whether the wall clock (Unix seconds) can be this host's."""
    if now < _LONG_AGO:
        shown = time.strftime("%Y-%m-%d", time.gmtime(now))
        return Finding(
            "clock", "failed", f"it says {shown}, which is past", "sudo timedatectl set-ntp true"
        )
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


# A node that runs


def look_at_running(settings: Config, status: dict[str, Any]) -> Iterator[Finding]:
    """Look at the machine, and take the running node's word for the rest.

    Args:
        status: what its ``/api/status`` says.
    """
    yield Finding(
        "settings", "skipped", "the running node's; to look at others, give the flags of up"
    )
    yield Finding("token", "ok", f"network {status['network']}, {status['fingerprint']}")
    yield look_at_clock(time.time())
    yield _look_at_state(settings, status)
    for addr in status["addrs"]:
        yield Finding("port", "ok", f"{addr} is the running node's")
    yield _mdns(settings)
    yield _announced_memory(status)
    yield from _announced_services(status)
    yield _file_limit()
    yield from _state_folder(Path(settings.state_dir))


def _look_at_state(settings: Config, status: dict[str, Any]) -> Finding:
    told = f"{status['name']} answers at {settings.api}; {status['peers_online']} online"
    if status["ready"]:
        return Finding("node", "ok", told)
    lacks = "; ".join(status["missing"]) or f"it is {status['state']}"
    return Finding("node", "warning", f"{told}, but it is not ready: {lacks}", "meshnode peers")


def _announced_memory(status: dict[str, Any]) -> Finding:
    free, total = status["available_vram"], status["total_vram"]
    if free is not None:
        whole = "" if total is None else f" of {format_size(total)}"
        return Finding("gpu", "ok", f"the node announces {format_size(free)} free{whole}")
    return _no_memory(serves=bool(status["services"]))


def _announced_services(status: dict[str, Any]) -> Iterator[Finding]:
    if not status["services"]:
        yield Finding("service", "skipped", "none is exposed")
    for service in status["services"]:
        name = service["service_id"]
        if service["healthy"]:
            models = ", ".join(service["models"]) or "no model is listed"
            yield Finding("service", "ok", f"{name} is well: {models}")
        else:
            told = service["reason"] or "its engine does not answer"
            yield Finding("service", "failed", f"{name}: {told}", "meshnode peers --json")


# Ports


def _ask_running(settings: Config) -> dict[str, Any] | None:
    """Return what a node running here says of itself: None if none runs, {} if it won't say."""
    try:
        return ask(Api(settings.api, settings.api_key), "/api/status")
    except NodeNotRunning:
        return None
    except MeshnodeError:
        return {}


def _addrs_of(settings: Config, status: dict[str, Any]) -> frozenset[str]:
    """Return the HOST:PORT and multiaddrs that the running node has."""
    return frozenset({str(settings.api), str(status.get("proxy")), *status.get("addrs", ())})


def _ports(settings: Config, running: frozenset[str] | None) -> Iterator[Finding]:
    if running is not None:
        yield Finding("node", "ok", f"runs, and answers at {settings.api}")
    else:
        yield Finding("node", "skipped", f"none runs at {settings.api}; its ports are tried")
    for addr in settings.listen:
        port = addr.split("/tcp/")[-1]
        if running is not None and any(f"/tcp/{port}/" in each for each in running):
            yield Finding("port", "ok", f"{addr} is the running node's")
            continue
        try:
            trio.run(_bind_and_close, addr)
        except ListenFailed as exc:
            yield Finding("port", "failed", str(exc), f"sudo ss -ltnp 'sport = :{port}'")
        else:
            yield Finding("port", "ok", f"{addr} is free")
    for setting, address in (("api", settings.api), ("proxy", settings.proxy)):
        if isinstance(address, HostPort):
            taken = running is not None and str(address) in running
            yield _port(setting, address.host, address.port, is_ours=taken)


async def _bind_and_close(addr: str) -> None:
    from meshnode.net.libp2p.tcp import bind_listeners

    for listener in await bind_listeners((addr,)):
        listener.socket.close()


def _port(setting: str, host: str, port: int, *, is_ours: bool) -> Finding:
    if is_ours:
        return Finding("port", "ok", f"{setting} {host}:{port} is the running node's")
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as exc:
            message = f"{setting} {host}:{port} can't be listened on: {exc.strerror}"
            return Finding("port", "failed", message, f"sudo ss -ltnp 'sport = :{port}'")
    return Finding("port", "ok", f"{setting} {host}:{port} is free")


# The network


def _mdns(settings: Config) -> Finding:
    from meshnode.net.mdns_sockets import interfaces, open_multicast_socket

    if not settings.mdns:
        return Finding("mdns", "skipped", "turned off")
    there = interfaces()
    lan = [each.name for each in there if not each.is_loopback]
    try:
        with open_multicast_socket() as opened:
            opened.follow(there)
            joined = [each.name for each in opened.joined if not each.is_loopback]
    except OSError as exc:
        return Finding(
            "mdns", "failed", f"port 5353 can't be shared: {exc.strerror}", "sudo ss -lunp"
        )
    if not lan:
        return Finding("mdns", "warning", "this host has no network interface", "ip addr")
    if not joined:
        return Finding("mdns", "warning", f"no multicast on {', '.join(lan)}", "ip maddr")
    return Finding("mdns", "ok", f"multicast on {', '.join(joined)}")


def _bootstraps(settings: Config) -> Iterator[Finding]:
    found: tuple[tokens.Token, ...] = ()
    try:
        found = tokens.decode_all(settings.token_texts) if settings.token_texts else ()
    except MeshnodeError:
        yield Finding("bootstrap", "skipped", "without a whole token none can be asked")
        return
    addrs = dict.fromkeys((*settings.bootstrap, *(a for t in found for a in t.bootstraps)))
    if not addrs:
        how = "found by mDNS, or remembered" if settings.mdns else "remembered from the last run"
        yield Finding("bootstrap", "skipped", f"none is named; members are {how}")
    keys = tuple(token.key for token in found)
    if settings.open:
        keys = (tokens.open_network_key(settings.network or "open"),)
    for addr in addrs:
        yield (
            trio.run(_try_bootstrap, addr, keys)
            if keys
            else Finding("bootstrap", "skipped", f"{addr}: no token to show there")
        )


async def _try_bootstrap(addr: str, keys: tuple[bytes, ...]) -> Finding:
    """Join there as a passer-by of no name, and leave at once."""
    from meshnode.core.belonging import by_keys
    from meshnode.metrics import Metrics
    from meshnode.net.libp2p.host import Libp2pMesh
    from meshnode.net.libp2p.identity import ephemeral_identity

    mesh = Libp2pMesh(
        identity=ephemeral_identity(),
        listen=("/ip4/127.0.0.1/tcp/0",),
        membership=by_keys(keys),
        metrics=Metrics(),
    )
    began = trio.current_time()
    failure: MeshnodeError | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.run_forever)
        try:
            await mesh.dial(addr, timeout=_DIAL_LIMIT)
        except (TokenRefused, PeerUnreachable) as exc:
            failure = exc
        nursery.cancel_scope.cancel()
    if isinstance(failure, TokenRefused):
        return Finding("bootstrap", "failed", str(failure), "meshnode token show FILE")
    if failure is not None:
        endpoint = addr.split("/")
        return Finding("bootstrap", "failed", str(failure), f"nc -vz {endpoint[2]} {endpoint[4]}")
    took = (trio.current_time() - began) * 1000
    return Finding("bootstrap", "ok", f"{addr} took this token within {took:.0f} ms")


# The machine


def _gpus(settings: Config) -> Iterator[Finding]:
    from meshnode.gpu.faults import PASSED_ON
    from meshnode.gpu.probe import describe, find_readers

    rows = describe(find_readers(settings.vram))
    found = [row for row in rows if row.announced]
    broken = [row for row in rows if row.error is not None and row.error not in PASSED_ON]
    for row in found:
        free = f"{format_size(row.available)} free of {format_size(row.total)}"
        yield Finding("gpu", "ok", f"{row.source} {row.index or ''}: {free}")
    for row in broken:
        yield Finding("gpu", "failed", f"{row.source}: {row.message}", "meshnode gpus")
    if not found and not broken:
        yield _no_memory(serves=bool(settings.expose))


def _no_memory(*, serves: bool) -> Finding:
    """A laptop needs none; a host of a service is picked last without one."""
    message = "no GPU memory can be read here, so this host counts as having least"
    return Finding("gpu", "warning" if serves else "skipped", message, "meshnode gpus")


def _services(settings: Config) -> Iterator[Finding]:
    from meshnode.net.tcp_stream import connect_tcp

    async def knock(host: str, port: int) -> None:
        (await connect_tcp(host, port, timeout=_SERVICE_LIMIT)).reset()

    if not settings.expose:
        yield Finding("service", "skipped", "none is exposed")
    for service in settings.expose:
        try:
            trio.run(knock, service.host, service.port)
        except PeerUnreachable as exc:
            yield Finding(
                "service",
                "failed",
                f"{service.name}: {exc}",
                f"nc -vz {service.host} {service.port}",
            )
        else:
            yield Finding("service", "ok", f"{service} accepts connections")


def _file_limit() -> Finding:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the soft one is raised at the start
    if hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        return Finding(
            "file limit",
            "failed",
            f"{hard} open files at most, and each client takes two",
            "ulimit -Hn 65536",
        )
    return Finding("file limit", "ok", "unlimited" if hard < 0 else f"{hard} open files")


def _state_folder(folder: Path) -> Iterator[Finding]:
    from meshnode.net.libp2p.identity import load_identity_file

    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        who = os.geteuid()
        mend = f"sudo install -d -m 700 -o {who} {folder}"
        yield Finding("state", "failed", f"{folder} can't be written", mend)
        return
    free = shutil.disk_usage(nearest).free
    if free < _LITTLE_SPACE:
        yield Finding("state", "failed", f"{free} bytes are free at {nearest}", f"df -h {nearest}")
    else:
        yield Finding("state", "ok", f"{folder} can be written")
    key = folder / "identity.key"
    try:
        identity = load_identity_file(key)
    except FileNotFoundError:
        yield Finding("identity", "skipped", "made at the first start")
    except MeshnodeError as exc:
        yield Finding("identity", "failed", str(exc), f"mv {key} {key}.damaged")
    except OSError as exc:
        yield Finding("identity", "failed", f"{key}: {exc.strerror}", f"ls -l {key}")
    else:
        if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            yield Finding("identity", "warning", f"others can read {key}", f"chmod 600 {key}")
        else:
            yield Finding("identity", "ok", identity.peer_id)
