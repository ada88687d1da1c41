"""The mesh over libp2p: TCP, noise, yamux and GossipSub among members of one token.

``Libp2pMesh`` is the composition: it owns the sockets, decides who is let in, and hands the
library only what it can't harm. How a connection becomes a link is in ``gate.py``.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
import trio

from meshnode.core.belonging import Membership
from meshnode.core.node_data import MAX_ADDRS
from meshnode.errors import ConfigError, PeerUnreachable, StreamReset, WireError
from meshnode.metrics import Metrics
from meshnode.net.libp2p import addrs as own_addrs
from meshnode.net.libp2p import envelope
from meshnode.net.libp2p.autonat import AUTONAT, AutoNat, ask_dial_back
from meshnode.net.libp2p.gate import Gate, OpenRaw
from meshnode.net.libp2p.identity import Identity
from meshnode.net.libp2p.limits import DEFAULT_LIMITS, Limits
from meshnode.net.libp2p.links import Links
from meshnode.net.libp2p.pubsub import MeshPubsub
from meshnode.net.libp2p.pubsub_wire import OriginOf, verify_origin
from meshnode.net.libp2p.relay.addrs import CircuitAddr, parse_addr
from meshnode.net.libp2p.relay.client import Circuits
from meshnode.net.libp2p.relay.hop import Hop
from meshnode.net.libp2p.relay.limits import DEFAULT_RELAY_LIMITS, RelayLimits
from meshnode.net.libp2p.relay.messages import HOP, STOP
from meshnode.net.libp2p.remedies import quiet_libp2p_loggers
from meshnode.net.libp2p.serving import Serving
from meshnode.net.libp2p.stream import BegunStream, Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn, MeshHost, MeshSwarm, open_negotiated
from meshnode.net.libp2p.tcp import TcpAddr, TcpStream, bind_listeners, connect_tcp, parse_tcp_addr
from meshnode.net.mesh import Link, LinkWatcher, MeshStream, MessageListener, StreamHandler

log = structlog.get_logger(__name__)


class Libp2pMesh:
    """See ``net/mesh.Mesh``, which this implements on real sockets."""

    def __init__(
        self,
        *,
        identity: Identity,
        listen: tuple[str, ...],
        membership: Membership,
        metrics: Metrics,
        announce_addrs: tuple[str, ...] = (),
        limits: Limits = DEFAULT_LIMITS,
        is_relay: bool = False,
        relay_limits: RelayLimits = DEFAULT_RELAY_LIMITS,
        origin_of: OriginOf = verify_origin,
    ) -> None:
        """Build a node that ``run_forever`` starts.

        Args:
            identity: who this node is.
            listen: multiaddrs such as ``/ip4/0.0.0.0/tcp/4001``; port 0 is any free one.
            membership: who belongs; a change takes effect on live connections at once.
            metrics: where faults and memberships are counted.
            announce_addrs: what to give out instead of the addresses listened on.
            limits: every bound and wait.
            is_relay: whether to carry connections for members that can only dial out.
            relay_limits: what that may cost, and the waits of both sides.
            origin_of: verifies who signed a gossiped message; hosts of one process may share it.

        Raises:
            ConfigError: an address to announce is no TCP multiaddr.
        """
        quiet_libp2p_loggers()
        for addr in announce_addrs:
            parse_tcp_addr(addr)
        self._identity = identity
        self._listen = listen
        self._announce_addrs = announce_addrs
        self._limits = limits
        self._metrics = metrics
        self._addrs: tuple[str, ...] = ()  # those without a relay
        self._is_running = False
        self._links = Links()
        self._serving = Serving(limits, metrics)
        self._swarm = MeshSwarm(
            identity, metrics=metrics, serve=self._serving.serve, on_gone=self._forget
        )
        self._host = MeshHost(self._swarm, lambda: self.addrs)
        self._pubsub = MeshPubsub(self._host, metrics=metrics, origin_of=origin_of)
        self._gate = Gate(
            self._swarm,
            self._links,
            own_id=identity.peer_id,
            membership=membership,
            limits=limits,
            metrics=metrics,
            admit=self._admit,
        )
        self._serving.use(self._host, self._gate.answer_membership)
        self._circuits = Circuits(
            self._links,
            own_id=identity.peer_id,
            bring_in=self._gate.bring_in,
            dial_relay=self._dial_relay,
            wall_time=time.time,
            limits=relay_limits,
            metrics=metrics,
        )
        self._serving.add_for_conns(STOP, self._circuits.answer_stop)
        self._serving.add_for_conns(AUTONAT, AutoNat(self._answers_at, metrics).answer)
        self._hop: Hop | None = None
        if is_relay:
            self._hop = Hop(
                self._links,
                own_addrs=lambda: self._addrs,
                wall_time=time.time,
                limits=relay_limits,
                metrics=metrics,
            )
            self._serving.add_for_conns(HOP, self._hop.answer)

    @property
    def peer_id(self) -> str:
        return self._identity.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        relayed = self._circuits.addrs if self._addrs else ()
        return (*self._addrs[: MAX_ADDRS - len(relayed)], *relayed)

    # Running

    async def run_forever(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        listeners = await bind_listeners(self._listen)
        self._addrs = own_addrs.dialable(listeners, self._announce_addrs, self.peer_id)
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set_when_cancelled, stop)
            # A cancel that reached the stack would leave the port open and peers unaware: it
            # would hit the very tasks that say goodbye. They are stopped in order instead.
            with trio.CancelScope(shield=True):
                await self._run_stack(listeners, stop, task_status)
            nursery.cancel_scope.cancel()

    async def _run_stack(
        self,
        listeners: list[trio.SocketListener],
        stop: trio.Event,
        task_status: trio.TaskStatus[None],
    ) -> None:
        pubsub, doors = _Service(), _Service()
        async with trio.open_nursery() as stack:
            await stack.start(self._swarm.carry_forever)
            await stack.start(pubsub.run, self._pubsub.run_forever)
            await stack.start(doors.run, self._gate.accept_forever, listeners)
            self._is_running = True
            task_status.started()
            try:
                await stop.wait()
            finally:
                self._is_running = False
                with trio.move_on_after(self._limits.shutdown_timeout, shield=True):
                    await doors.stop()
                    await pubsub.stop()
                    await self._swarm.close_all("this node is stopping")
                stack.cancel_scope.cancel()
                self._addrs = ()

    def _admit(self, conn: MeshConn) -> None:
        """Make a proven member's connection a link."""
        self._swarm.admit(conn)
        replaced = self._links.add(conn)
        self._pubsub.admit(conn.peer_id)
        if conn.was_denied_identify:
            self._swarm.start_soon(self._serving.push_identify, conn)
        for older in replaced:
            if older.via is not None and conn.via is None:
                log.info("link_became_direct", peer_id=conn.peer_id, addr=conn.addr)
                self._swarm.retire_soon(
                    older,
                    "replaced by a direct connection",
                    is_current=partial(self._is_current, older),
                )
            else:
                self._swarm.close_soon(older, "replaced by a newer connection")

    def _is_current(self, conn: MeshConn) -> bool:
        return self._links.get(conn.peer_id) is conn

    def _forget(self, conn: MeshConn) -> None:
        if self._links.remove(conn):
            self._pubsub.dismiss(conn.peer_id)
            self._circuits.forget(conn.peer_id)
            if self._hop is not None:
                self._hop.forget(conn.peer_id)

    # What the node does with it

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        self._serving.add(protocol_id, handler)

    def subscribe(self, topic: str, listener: MessageListener) -> None:
        self._pubsub.subscribe(topic, listener)

    def watch_links(self, watcher: LinkWatcher) -> None:
        self._links.watch(watcher)

    def links(self) -> tuple[Link, ...]:
        return self._links.snapshot()

    def link_to(self, peer_id: str) -> Link | None:
        return self._links.link_to(peer_id)

    async def publish(self, topic: str, data: bytes) -> None:
        await self._pubsub.publish(topic, data)

    async def dial(self, addr: str, *, timeout: float, patience: float = 0.0) -> str:
        endpoint = parse_addr(addr)
        peer_id = endpoint.peer_id
        if peer_id is None:
            raise ConfigError(f"{addr!r} names no peer; it must end in /p2p/PEER_ID")
        if peer_id == self.peer_id:
            raise PeerUnreachable("that address is this node's own")
        if not self._is_running:
            raise PeerUnreachable("this node is not running")
        if isinstance(endpoint, TcpAddr):
            open_raw: OpenRaw = partial(self._open_tcp, endpoint)
        else:
            open_raw = partial(self._circuits.open, endpoint)
        direct = isinstance(endpoint, TcpAddr)
        await self._gate.dial(
            peer_id,
            endpoint.multiaddr,
            open_raw,
            direct=direct,
            timeout=timeout,
            patience=patience,
        )
        return peer_id

    async def _open_tcp(self, endpoint: TcpAddr) -> TcpStream:
        return await connect_tcp(endpoint, user_timeout=self._limits.tcp_user_timeout)

    async def _dial_relay(self, addr: CircuitAddr) -> None:
        await self._gate.dial(
            addr.relay_id,
            addr.relay.multiaddr,
            partial(self._open_tcp, addr.relay),
            direct=True,
            timeout=self._limits.relay_timeout,
        )

    async def open_stream(self, peer_id: str, protocol_id: str, *, timeout: float) -> MeshStream:
        conn = self._link_to(peer_id)
        try:
            with trio.fail_after(timeout):
                muxed, _ = await open_negotiated(conn, (protocol_id,))
        except trio.TooSlowError as exc:
            raise PeerUnreachable(f"{peer_id} did not answer within {timeout:g} s") from exc
        except (StreamReset, WireError) as exc:
            raise PeerUnreachable(f"the stream to {peer_id} failed: {exc}") from exc
        return Libp2pStream(muxed, peer_id, protocol_id)

    async def begin_stream(self, peer_id: str, protocol_id: str) -> MeshStream:
        conn = self._link_to(peer_id)
        return BegunStream(await conn.muxed_conn.open_stream(), peer_id, protocol_id)

    async def ping(self, peer_id: str, *, timeout: float) -> float:
        return await self._link_to(peer_id).ping(timeout)

    async def disconnect(self, peer_id: str, reason: str) -> None:
        for conn in self._links.all_of(peer_id):
            await conn.close(reason)

    # Being reached through relays (net/reachability.Relays)

    @property
    def reserved(self) -> tuple[str, ...]:
        """Peer IDs of the relays through which this node can be reached now."""
        return self._circuits.reserved

    async def reserve(self, relay_id: str, *, timeout: float) -> float:
        """See ``relay.client.Circuits.reserve``."""
        return await self._circuits.reserve(relay_id, timeout=timeout)

    def release(self, relay_id: str) -> None:
        """See ``relay.client.Circuits.release``."""
        self._circuits.release(relay_id)

    async def is_dialable_from(self, peer_id: str, *, timeout: float) -> bool:
        """Ask a linked peer whether it can dial this node without a relay.

        Raises:
            PeerUnreachable: no live link, or no answer in time.
            PeerRefused: it does not try, for this node or for anybody.
        """
        if not self._addrs:
            return False
        stream = await self.open_stream(peer_id, AUTONAT, timeout=timeout)
        assert isinstance(stream, Libp2pStream)
        try:
            with trio.fail_after(timeout):
                return await ask_dial_back(stream, self.peer_id, self._addrs)
        except trio.TooSlowError as exc:
            raise PeerUnreachable(f"{peer_id} did not answer within {timeout:g} s") from exc
        except (StreamReset, WireError) as exc:
            raise PeerUnreachable(f"the stream to {peer_id} failed: {exc}") from exc

    async def _answers_at(self, peer_id: str, addr: str) -> bool:
        open_raw = partial(self._open_tcp, parse_tcp_addr(addr))
        try:
            conn = await self._gate.connect(peer_id, addr, open_raw)
        except PeerUnreachable:
            return False
        with trio.CancelScope(shield=True):
            await conn.close("it was only to be seen whether it answers")
        return True

    def seal(self, payload: bytes) -> bytes:
        return envelope.seal(self._identity, payload)

    def open_sealed(self, sealed: bytes) -> tuple[str, bytes]:
        return envelope.open_sealed(sealed)

    def _link_to(self, peer_id: str) -> MeshConn:
        conn = self._links.get(peer_id)
        if conn is None:
            raise PeerUnreachable(f"no live link to {peer_id}")
        return conn


async def _set_when_cancelled(event: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()


class _Service:
    """A task that can be told to end, and waited for."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def run(
        self,
        forever: Callable[..., Awaitable[object]],
        *args: object,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(forever, *args)
                    task_status.started()
        finally:
            self.ended.set()

    async def stop(self) -> None:
        self.scope.cancel()
        await self.ended.wait()
