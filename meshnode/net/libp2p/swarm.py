"""The library's swarm and host, reduced to what we let it do.

The stock swarm keeps a slot and a task for every inbound connection there ever was, dials whom it
finds in its address book, shares its port, retries and prunes on its own, and dies of an exception
in any stream handler. None of that is mended here: it is not used. ``MeshSwarm`` keeps the table
of connections that libp2p's protocols (pubsub, identify) look into; ``host.py`` decides what
enters it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.abc import INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.exceptions import StreamFailure
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import identify_handler_for
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream, StreamState
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.rcmgr import Direction
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedConnError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from meshnode.errors import MeshnodeError, PeerUnreachable
from meshnode.metrics import Metrics
from meshnode.net.libp2p.identity import Identity
from meshnode.net.libp2p.muxer import YamuxConn, YamuxStream, muxer_options
from meshnode.net.libp2p.negotiate import Responder, propose
from meshnode.net.libp2p.relay.circuit import CircuitStream
from meshnode.net.libp2p.remedies import ForeignError, foreign_faults
from meshnode.net.libp2p.tcp import TcpStream

# How often a replaced connection is looked at for streams that still run on it.
_RETIRE_INTERVAL = 2.0  # seconds


# What a connection is put on.
RawStream = TcpStream | CircuitStream
StreamServer = Callable[["MeshConn", YamuxStream], Awaitable[None]]


class MeshConn(SwarmConn):
    """One connection: pending until its membership is settled, then a member's, then gone."""

    muxed_conn: YamuxConn

    def __init__(
        self, muxed: YamuxConn, swarm: MeshSwarm, *, addr: str, via: str | None, dialled: bool
    ) -> None:
        direction = Direction.OUTBOUND if dialled else Direction.INBOUND
        super().__init__(muxed, swarm, direction)
        self.swarm: MeshSwarm = swarm
        self.peer_id = str(muxed.peer_id)
        self.addr = addr  # the remote multiaddr
        self.via = via  # the peer ID of the relay between, if there is one
        self.dialled = dialled
        self.since = trio.current_time()  # of membership, once it is settled
        self.is_member = False
        self.proven_by: bytes | None = None  # the ID of the key that membership was proven with
        self.was_denied_identify = False  # it asked before it was a member
        self.is_proving = False  # the other side has begun the membership exchange
        self.settled = trio.Event()  # membership is proven, or the connection is gone
        self.waiting_streams = 0
        self.rtt: float | None = None  # seconds
        self.reason: str | None = None  # why it was closed, if this side closed it

    async def run(self, serve: StreamServer) -> None:
        """Carry the connection and serve its streams until it ends; then clean up."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry)
                await self.muxed_conn.event_started.wait()
                self.event_started.set()
                while not self.event_closed.is_set():
                    try:
                        stream = await self.muxed_conn.accept_stream()
                    except MuxedConnError:
                        break
                    nursery.start_soon(serve, self, stream)
                await self.close()
        finally:
            with trio.CancelScope(shield=True):
                await self.close()

    async def _carry(self) -> None:
        try:
            with foreign_faults(self.swarm.metrics, "yamux"):
                await self.muxed_conn.start()
        except ForeignError:
            await self.close()

    @property
    def open_streams(self) -> int:
        """How many streams are open, apart from those of libp2p's own protocols (pubsub)."""
        # Those that ended at the other side may still be in the library's table.
        foreign = [s.muxed_stream for s in self.streams]
        still_open = sum(isinstance(s, YamuxStream) and not s.is_closed for s in foreign)
        return self.muxed_conn.stream_count - still_open

    async def close(self, reason: str | None = None) -> None:
        """End the connection. The table and the watchers learn it before anything is awaited."""
        if self.event_closed.is_set():
            return
        self.event_closed.set()
        self.reason = reason
        self.swarm.remove_conn(self)
        self.settled.set()
        try:
            with foreign_faults(self.swarm.metrics, "yamux"):
                await self.muxed_conn.close()
        except ForeignError:
            pass  # counted; the socket is closed either way
        for stream in tuple(self.streams):
            await stream.reset()
        if self.is_member:
            await self.swarm.notify_disconnected(self)

    @property
    def why_it_ended(self) -> str:
        return self.reason or self.muxed_conn.reason

    async def ping(self, timeout: float) -> float:
        """Measure, keep and return one round trip in seconds.

        Raises:
            PeerUnreachable: the connection ended, or no answer came in time.
        """
        try:
            self.rtt = await self.muxed_conn.ping(timeout)
        except trio.TooSlowError as exc:
            raise PeerUnreachable(f"{self.peer_id} did not answer within {timeout:g} s") from exc
        return self.rtt

    async def wrap(self, muxed: YamuxStream, protocol_id: str) -> NetStream:
        """Return the stream in the form that the library's own protocols know."""
        stream = NetStream(muxed, self, None)
        stream.set_protocol(TProtocol(protocol_id))
        await stream.set_state(StreamState.OPEN)
        self.streams.add(stream)
        return stream


class MeshSwarm(Swarm):
    """The table of members' connections, and the upgrade of raw sockets."""

    def __init__(
        self,
        identity: Identity,
        *,
        metrics: Metrics,
        serve: StreamServer,
        on_gone: Callable[[MeshConn], None],
    ) -> None:
        # By default the store holds 1,000 peers and evicts the oldest, this node itself.
        peerstore = PeerStore(max_peers=10**6)
        own_id = ID.from_pubkey(identity.key_pair.public_key)
        peerstore.add_key_pair(own_id, identity.key_pair)
        # Noise alone: the default set also offers plaintext, which proves nobody's peer ID.
        noise = NoiseTransport(identity.key_pair, noise_privkey=create_noise_key_pair().private_key)
        super().__init__(own_id, peerstore, TransportUpgrader({NOISE: noise}, muxer_options()))
        self._noise = noise
        self.notifees.clear()  # its own tag store, which only its pruner reads
        self.metrics = metrics
        self.all_conns: set[MeshConn] = set()  # pending ones too; ``connections`` has members
        self._serve = serve
        self._on_gone = on_gone
        self._nursery: trio.Nursery | None = None

    async def carry_forever(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Be the home of all connections' tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def upgrade(self, stream: RawStream, peer_id: str | None) -> MeshConn:
        """Secure and mux a stream; ``peer_id`` is the expected one where this side dialled.

        Closes the stream on every way out but success.

        Raises:
            ForeignError: the other side does not speak the protocols, or is somebody else.
        """
        dialled = peer_id is not None
        kind = ConnectionType.DIRECT if stream.via is None else ConnectionType.RELAYED
        raw: IRawConnection = RawConnection(stream, dialled, kind)
        try:
            with foreign_faults(self.metrics, "handshake"):
                muxed = await self._secure_and_mux(raw, peer_id)
                conn = MeshConn(
                    muxed, self, addr=stream.remote_multiaddr, via=stream.via, dialled=dialled
                )
                await self._start(conn)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.close()
            raise
        return conn

    async def _secure_and_mux(self, raw: IRawConnection, peer_id: str | None) -> YamuxConn:
        # Not by the library's upgrader: it believes any length that a stranger names in its first
        # message, and takes one round trip more for each of the two choices.
        if peer_id is not None:
            await propose(_Unmuxed(raw), (NOISE,))
            secured = await self._noise.secure_outbound(raw, ID.from_base58(peer_id))
        else:
            await Responder(_Unmuxed(raw)).settle_for(NOISE)
            secured = await self._noise.secure_inbound(raw)
        remote_id = secured.get_remote_peer()
        if remote_id == self.self_id:
            raise ForeignError("the address leads back to this node")
        if peer_id is not None and str(remote_id) != peer_id:
            raise ForeignError(f"{remote_id} answers there")
        if peer_id is not None:
            await propose(_Unmuxed(secured), (YAMUX,))
        else:
            await Responder(_Unmuxed(secured)).settle_for(YAMUX)
        return YamuxConn(secured, remote_id, metrics=self.metrics)

    async def _start(self, conn: MeshConn) -> None:
        if self._nursery is None:
            raise ForeignError("this node is stopping")
        self.all_conns.add(conn)
        self._nursery.start_soon(conn.run, self._serve)
        try:
            await conn.event_started.wait()
        except BaseException:
            with trio.CancelScope(shield=True):
                await conn.close("cancelled")
            raise

    def admit(self, conn: MeshConn) -> None:
        """Enter a proven member's connection into the table, and tell libp2p's protocols."""
        conn.is_member = True
        conn.since = trio.current_time()
        # Newest first: an older one to the same peer is about to be closed.
        self.connections.setdefault(conn.muxed_conn.peer_id, []).insert(0, conn)
        conn.settled.set()
        if self._nursery is not None:
            self._nursery.start_soon(self.notify_connected, conn)

    def remove_conn(self, conn: SwarmConn) -> None:
        """Take a connection out of the table, at once."""
        assert isinstance(conn, MeshConn)
        peer_id = conn.muxed_conn.peer_id
        left = [other for other in self.connections.get(peer_id, ()) if other is not conn]
        if left:
            self.connections[peer_id] = left
        else:
            self.connections.pop(peer_id, None)
        if conn in self.all_conns:
            self.all_conns.remove(conn)
            self._on_gone(conn)

    async def notify_disconnected(self, conn: INetConn) -> None:
        # Without the stock one's call of the AutoConnector, which dials anybody it has heard of.
        await self._notify("disconnected", conn)

    def close_soon(self, conn: MeshConn, reason: str) -> None:
        """Close one connection without waiting for it."""
        if self._nursery is not None:
            self._nursery.start_soon(conn.close, reason)

    def start_soon(self, task: Callable[[MeshConn], Awaitable[None]], conn: MeshConn) -> None:
        """Run a task on one connection for as long as this carries any."""
        if self._nursery is not None:
            self._nursery.start_soon(task, conn)

    def retire_soon(self, conn: MeshConn, reason: str, *, is_current: Callable[[], bool]) -> None:
        """Close a connection that another replaced once nothing runs on it any more.

        Not at all if it became the current one again: the other one died first.
        """
        if self._nursery is not None:
            self._nursery.start_soon(self._retire, conn, reason, is_current)

    async def _retire(self, conn: MeshConn, reason: str, is_current: Callable[[], bool]) -> None:
        while not conn.is_closed:
            # Slept first: the other side may open a stream before it knows of the replacement.
            await trio.sleep(_RETIRE_INTERVAL)
            if is_current():
                return
            if conn.open_streams <= 0:
                await conn.close(reason)

    async def close_all(self, reason: str) -> None:
        """Close every connection, all at the same time."""
        async with trio.open_nursery() as nursery:
            for conn in tuple(self.all_conns):
                nursery.start_soon(conn.close, reason)


class _Unmuxed:
    """A connection of the library's, under the names that protocols are chosen with."""

    def __init__(self, conn: IRawConnection | ISecureConn) -> None:
        self.receive_some = conn.read
        self.send_all = conn.write


class MeshHost(BasicHost):
    """The host that pubsub and identify are given."""

    _network: MeshSwarm

    def __init__(self, swarm: MeshSwarm, addrs: Callable[[], tuple[str, ...]]) -> None:
        super().__init__(
            swarm,
            addrs_factory=lambda _: [Multiaddr(addr) for addr in addrs()],
            disable_identify_address_discovery=True,
        )
        # The notifee that asks every new connection to identify itself, at 3 ms each: nobody
        # here needs the answer. And identify-push would let peers write into our address book.
        swarm.notifees.clear()
        self.multiselect.handlers.clear()
        self.multiselect.add_handler(IDENTIFY, identify_handler_for(self, use_varint_format=True))

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        """Open a stream to a connected member; never dials.

        Raises:
            StreamFailure: there is no connection, or the peer serves none of the protocols.
        """
        conns = self._network.connections.get(peer_id)
        if not conns:
            raise StreamFailure(f"not connected to {peer_id}")
        conn = conns[0]
        assert isinstance(conn, MeshConn)
        try:
            muxed, protocol_id = await open_negotiated(conn, protocol_ids)
        except MeshnodeError as exc:
            raise StreamFailure(str(exc)) from exc
        return await conn.wrap(muxed, protocol_id)


async def open_negotiated(conn: MeshConn, protocol_ids: Sequence[str]) -> tuple[YamuxStream, str]:
    """Open a stream and agree on a protocol; leaves nothing behind if it fails or is cancelled.

    Raises:
        PeerRefused: the peer serves none of them.
        MeshError: the connection ended, or has as many streams as it may.
        WireError: the peer broke the protocol of choosing protocols.
    """
    muxed = await conn.muxed_conn.open_stream()
    try:
        return muxed, await propose(muxed, protocol_ids)
    except BaseException:
        muxed.abort()
        raise
