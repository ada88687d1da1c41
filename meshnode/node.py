"""The composition root: builds every part of one node and hands each what it needs.

A part never looks for another by itself. Clock, dice, mesh and GPU readers are made here, and the
order of starting and stopping stands here in one place: nothing is served before the mesh runs,
and on the way out the others hear a goodbye before any connection closes.
"""

from __future__ import annotations

import platform
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import structlog
import trio
from starlette.routing import Route

from meshnode import __version__
from meshnode.config import Config
from meshnode.core import token as tokens
from meshnode.core.api_keys import ClientKeys
from meshnode.core.belonging import Belonging, Membership
from meshnode.core.prefix_chain import network_seed
from meshnode.errors import ConfigError, ListenFailed, MeshnodeError
from meshnode.gpu.monitor import GpuMonitor
from meshnode.gpu.probe import find_readers
from meshnode.http import control_api, localai, server
from meshnode.http.forward_api import ForwardApi
from meshnode.http.guard import LOCAL_KEY_FILE, Access, forget_local_key, make_local_key
from meshnode.metrics import Metrics
from meshnode.net.discovery import discover_forever
from meshnode.net.drain import Drain
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import Identity, load_or_create_identity
from meshnode.net.local_services import LocalService
from meshnode.net.mdns import Mdns
from meshnode.net.member import Member, MemberSettings
from meshnode.net.own_network import own_fault
from meshnode.net.peer_file import FILE_NAME, PeerFile
from meshnode.net.reachability import Reachability
from meshnode.node_entry import build_entry, client_keys_of, make_tracer
from meshnode.node_view import LiveView
from meshnode.values import AUTO, HostPort, UnixSocket

# A first announcement should carry the free memory; a driver slower than this is not waited for.
_FIRST_READING = 1.0  # seconds
_LAG_INTERVAL = 0.5  # seconds

log = structlog.get_logger(__name__)

# Hands over the settings each time that they change, until cancelled.
WatchSettings = Callable[[Callable[[Config], None]], Awaitable[None]]
OnReady = Callable[[dict[str, object]], None]


class Node:
    """One node of a mesh, from its settings.

    Raises:
        ConfigError: the settings, the token or the identity file don't hold; nothing was started.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.network, belonging, bootstraps = _belonging(config)
        self.fingerprint = tokens.network_fingerprint(belonging.keys[0])
        self._membership = membership = Membership(belonging)
        self.identity = _identity(Path(config.state_dir))
        self._metrics = metrics = Metrics()
        metrics.build_info.labels(version=__version__, python=platform.python_version()).set(1)
        self._gpu = GpuMonitor(find_readers(config.vram), metrics)
        self._mesh = Libp2pMesh(
            identity=self.identity,
            listen=config.listen,
            announce_addrs=config.announce_addr,
            membership=membership,
            metrics=metrics,
            is_relay=config.relay,
        )
        self._peer_file = PeerFile(Path(config.state_dir) / FILE_NAME, self.network)
        self._peer_file.load()
        rng = random.Random()
        self._member = member = Member(
            self._mesh,
            MemberSettings(
                network=self.network,
                name=config.name,
                version=__version__,
                bootstraps=bootstraps,
                services=_services(config),
                policy=config.policy,
                affinity=config.affinity,
                is_gateway=config.proxy is not None and config.proxy_mode == "http",
                prompt_seed=network_seed(belonging.keys[0]),
                relay=config.relay,
                announce_interval=config.announce_interval,
                online_window=config.online_window,
                queue_length=config.queue_length,
                queue_timeout=config.queue_timeout,
            ),
            gpu=lambda: self._gpu.latest,
            rng=rng,
            metrics=metrics,
            wall_time=time.time,
            known=self._peer_file.known,
        )
        member.belong(membership)
        member.peering.liveness.own_fault = lambda: own_fault(self._mesh.addrs)
        self._make_mdns = lambda fingerprint: Mdns(
            peer_id=self.identity.peer_id,
            fingerprint=fingerprint,
            addrs=lambda: self._mesh.addrs,
            on_found=lambda _, addrs: member.peering.found(addrs),
            rng=rng,
        )
        self._reachability = Reachability(
            self._mesh,
            self._mesh,
            member.ledger,
            member.peering,
            rng=rng,
            on_change=member.announcer.changed,
            seeks_relays=not config.relay,
        )
        self._view = LiveView(
            config,
            network=self.network,
            fingerprint=self.fingerprint,
            member=member,
            mesh=self._mesh,
            gpu=self._gpu,
            metrics=metrics,
        )
        self._access = Access(
            api_key=config.api_key,
            local_key=_local_key(Path(config.state_dir)),
            allowed_hosts=(
                *config.api_host_allow,
                *([config.api.host] if isinstance(config.api, HostPort) else []),
            ),
            is_unix=isinstance(config.api, UnixSocket),
        )
        keys_of_clients = client_keys_of(config)
        self._client_keys = None if keys_of_clients is None else ClientKeys(keys_of_clients)
        self._tracer, self._close_tracer = make_tracer(config, self.identity.peer_id, self.network)
        self._entry = build_entry(
            config,
            member,
            choose_service=self._view.choose_service,
            client_keys=self._client_keys,
            metrics=metrics,
            wall_time=time.time,
            tracer=self._tracer,
        )
        self._drain = Drain(
            member.services,
            member.router,
            member.announcer,
            member.queue,
            close_entry=self._entry.close,
            grace=config.drain_grace,
        )
        self._view.drain_state = self._drain
        self.on_draining: Callable[[], None] = lambda: None

    # Running

    async def run(self, on_ready: OnReady) -> None:
        """Run until cancelled or drained; then say goodbye and close all, within some 5 s.

        Raises:
            ListenFailed: an address can't be bound.
            TokenRefused: no link ever stood, and every bootstrap refused the token.
        """
        stop = trio.Event()
        async with trio.open_nursery() as guard:
            guard.start_soon(_set_when_cancelled, stop)
            # A cancel must not reach the parts all at once: the goodbye needs the mesh.
            with trio.CancelScope(shield=True):
                await self._run_parts(stop, on_ready)
            guard.cancel_scope.cancel()

    async def _run_parts(self, stop: trio.Event, on_ready: OnReady) -> None:
        async with AsyncExitStack() as sockets, trio.open_nursery() as mesh:
            sockets.callback(forget_local_key, Path(self.config.state_dir))
            api = self._bind_api(sockets)
            proxy = await self._bind_proxy(sockets)
            self._view.started_at = trio.current_time()
            await mesh.start(self._mesh.run_forever)
            async with trio.open_nursery() as parts:
                await self._start(parts)
                parts.start_soon(self._view.watch_forever)
                app = control_api.build_app(
                    self._view,
                    access=self._access,
                    events=self._view.feed,
                    more=[
                        *localai.routes(self._view),
                        Route("/api/forward", ForwardApi(self._view.forwards), methods=["POST"]),
                    ],
                    metrics=self._metrics,
                )
                await parts.start(partial(server.serve_forever, app, api, metrics=self._metrics))
                if proxy:
                    parts.start_soon(self._entry.serve_forever, proxy)
                self._announce_ready(on_ready)
                parts.start_soon(self._leave_when_drained, stop)
                await stop.wait()
                log.info("node_leaving", peer_id=self.identity.peer_id)
                await self._member.announcer.say_leaving()
                parts.cancel_scope.cancel()
            mesh.cancel_scope.cancel()
        if self._close_tracer is not None:
            await trio.to_thread.run_sync(self._close_tracer)

    async def _start(self, parts: trio.Nursery) -> None:
        first_reading = trio.Event()
        parts.start_soon(self._watch_gpu_forever, first_reading)
        with trio.move_on_after(_FIRST_READING):
            await first_reading.wait()
        parts.start_soon(self._member.run_forever)
        parts.start_soon(self._peer_file.save_forever)
        if self.config.mdns:
            parts.start_soon(discover_forever, self._membership, self._make_mdns)
        parts.start_soon(self._reachability.keep_forever)
        parts.start_soon(self._measure_lag_forever)

    def take(self, config: Config) -> None:
        """Let in and keep out by newer settings; the rest of them waits for a restart.

        Raises:
            ConfigError: they are of another network.
        """
        network, belonging, _ = _belonging(config)
        if network != self.network:
            raise ConfigError(
                f"the token is of network {network}, and this node is in {self.network}; "
                "restart it to change networks"
            )
        self._view.token_text = config.token_text
        keys_of_clients = client_keys_of(config)
        # Whether keys are wanted at all is not changed while clients are being served.
        if self._client_keys is not None and keys_of_clients is not None:
            self._client_keys.replace(keys_of_clients)
        if self._membership.change(belonging):
            log.info(
                "belonging_changed",
                keys=len(belonging.keys),
                allowed=None if belonging.allowed is None else len(belonging.allowed),
                blocked=len(belonging.blocked),
            )

    async def drain_when(self, wished: trio.Event) -> None:
        """Begin to drain once ``wished`` is set; the node then ends by itself."""
        await wished.wait()
        self._drain.wished.set()

    async def _leave_when_drained(self, stop: trio.Event) -> None:
        await self._drain.wished.wait()
        self.on_draining()
        await self._drain.run()
        stop.set()

    async def _watch_gpu_forever(self, first_reading: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._gpu.watch_forever, lambda _: self._member.announcer.changed())
            first_reading.set()

    async def _measure_lag_forever(self) -> None:
        while True:
            due = trio.current_time() + _LAG_INTERVAL
            await trio.sleep_until(due)
            self._metrics.loop_lag_seconds.observe(trio.current_time() - due)

    def _bind_api(self, sockets: AsyncExitStack) -> socket.socket:
        address = self.config.api
        if isinstance(address, UnixSocket):
            api = server.bind_unix(address.path, setting="api")
            sockets.callback(Path(address.path).unlink, missing_ok=True)
            self._view.api = str(address)
        else:
            api = server.bind(address.host, address.port, setting="api")
            self._view.api = _host_port(api.getsockname())
        sockets.callback(api.close)
        return api

    async def _bind_proxy(self, sockets: AsyncExitStack) -> list[trio.SocketListener]:
        proxy = self.config.proxy
        if proxy is None:
            return []
        try:
            listeners = await trio.open_tcp_listeners(proxy.port, host=proxy.host)
        except OSError as exc:
            raise ListenFailed(
                f"proxy={proxy} from {self.config.sources.get('proxy', 'default')} can't be "
                f"listened on: {exc.strerror or exc}; choose another port, or 0 for any free one"
            ) from exc
        for listener in listeners:
            sockets.push_async_callback(listener.aclose)
        self._view.proxy = _host_port(listeners[0].socket.getsockname())
        return listeners

    def _announce_ready(self, on_ready: OnReady) -> None:
        log.info("node_ready", peer_id=self.identity.peer_id, network=self.network)
        on_ready(
            {
                "event": "ready",
                "schema_version": control_api.SCHEMA_VERSION,
                "peer_id": self.identity.peer_id,
                "addrs": list(self._mesh.addrs),
                "proxy": self._view.proxy,
                "api": self._view.api,
            }
        )


async def run_node(
    config: Config,
    *,
    on_ready: OnReady,
    watch_settings: WatchSettings | None = None,
    drain: trio.Event | None = None,
    on_draining: Callable[[], None] = lambda: None,
) -> None:
    """Run one node until cancelled or drained; see ``Node.run``.

    ``watch_settings`` is run beside it, and hands over the settings that changed. Setting
    ``drain`` lets it finish what it serves, and then end by itself; ``on_draining`` is called
    when that begins, whoever asked for it.

    Raises:
        MeshnodeError: the one that ended it.
    """
    node = Node(config)
    node.on_draining = on_draining
    try:
        async with trio.open_nursery() as nursery:
            if watch_settings is not None:
                nursery.start_soon(watch_settings, node.take)
            if drain is not None:
                nursery.start_soon(node.drain_when, drain)
            await node.run(on_ready)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _first_of(group) from group


def _first_of(error: BaseException) -> BaseException:
    """Return what ended the node: its own error where there is one, else what came first."""
    while isinstance(error, BaseExceptionGroup):
        known = error.subgroup(MeshnodeError)
        error = (known or error).exceptions[0]
    return error


def _belonging(config: Config) -> tuple[str, Belonging, tuple[str, ...]]:
    """Return the network's name, who belongs to it, and where to join."""
    lists = (config.allowed_peers, config.blocked_peers)
    if config.open:
        network = config.network or "open"
        return network, Belonging((tokens.open_network_key(network),), *lists), config.bootstrap
    parsed = tokens.decode_all(config.token_texts)
    told = (addr for token in parsed for addr in token.bootstraps)
    bootstraps = tuple(dict.fromkeys((*config.bootstrap, *told)))
    keys = tuple(token.key for token in parsed)
    return parsed[0].network, Belonging(keys, *lists), bootstraps


def _services(config: Config) -> tuple[LocalService, ...]:
    checks, limits = dict(config.health), dict(config.max_in_flight)
    return tuple(
        LocalService(
            s.name,
            s.host,
            s.port,
            max_in_flight=limits.get(s.name, 0),
            check=checks.get(s.name, AUTO),
        )
        for s in config.expose
    )


def _identity(state_dir: Path) -> Identity:
    try:
        return load_or_create_identity(state_dir / "identity.key")
    except OSError as exc:
        raise ConfigError(
            f"the state folder {state_dir} can't be used: {exc.strerror or exc}; "
            "make it writable, or choose another with --state-dir"
        ) from exc


def _local_key(state_dir: Path) -> str | None:
    """Return the key of this run; without room for it, the node runs all the same."""
    try:
        return make_local_key(state_dir)
    except OSError as exc:
        log.warning(
            "api_key_not_written",
            path=str(state_dir / LOCAL_KEY_FILE),
            error=exc.strerror or str(exc),
            advice="make room; until a restart, only --api-key-file opens what changes this node",
        )
        return None


def _host_port(address: tuple[object, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


async def _set_when_cancelled(event: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()
