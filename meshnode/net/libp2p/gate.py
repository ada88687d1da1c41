"""How a connection becomes a link: accepted or dialled, secured, and proven a member's.

Two nodes may dial each other at the same moment. The one with the smaller peer ID decides which
connection stands: it lets one at a time prove membership and answers ``duplicate`` on any other,
so that both keep the same one and no stream ever runs on the loser.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from meshnode.core.belonging import Membership
from meshnode.core.membership import BLOCKED, Refusal
from meshnode.errors import (
    MeshError,
    MeshnodeError,
    PeerLate,
    PeerRefused,
    PeerUnreachable,
    StreamReset,
    TokenRefused,
    WireError,
)
from meshnode.metrics import Metrics
from meshnode.net.libp2p.door import Door
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.links import Links
from meshnode.net.libp2p.membership import (
    DUPLICATE,
    PROTOCOL_ID,
    DuplicateConnection,
    await_farewell,
    outcome_label,
    prove_as_dialler,
    prove_as_listener,
)
from meshnode.net.libp2p.remedies import ForeignError
from meshnode.net.libp2p.renewal import Renewal
from meshnode.net.libp2p.stream import Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn, MeshSwarm, RawStream, open_negotiated
from meshnode.net.libp2p.tcp import TcpStream, tune
from meshnode.net.mesh import LinkState

_TOO_MANY = "too_many"
_ACCEPT_PAUSE = 0.1  # seconds

# Connect to where a peer is; raises OSError, PeerUnreachable or PeerRefused.
OpenRaw = Callable[[], Awaitable[RawStream]]


class Gate:
    """Brings connections up to membership, and gives up on those that don't get there."""

    def __init__(
        self,
        swarm: MeshSwarm,
        links: Links,
        *,
        own_id: str,
        membership: Membership,
        limits: Limits,
        metrics: Metrics,
        admit: Callable[[MeshConn], None],
    ) -> None:
        self._swarm = swarm
        self._links = links
        self._own_id = own_id
        self._membership = membership
        self._limits = limits
        self._metrics = metrics
        self._admit = admit
        self._door = Door(limits)
        self._renewal = Renewal(swarm, links, membership, own_id=own_id, limits=limits)
        self._proving: dict[str, MeshConn] = {}  # by peer, where this side decides
        self._dial_locks: dict[str, trio.Lock] = {}

    # Accepting

    async def accept_forever(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take connections on all ``listeners`` until cancelled; closes them then."""
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept_from, listener, nursery)
                task_status.started()
        finally:
            for listener in listeners:
                listener.socket.close()

    async def _accept_from(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                socket = await listener.accept()
            except OSError:
                # Out of descriptors, most likely: the connection stays in the kernel's queue.
                await trio.sleep(_ACCEPT_PAUSE)
                continue
            # Not trio.serve_listeners: it closes the socket when the handler returns, and here
            # the connection outlives it.
            nursery.start_soon(self._take, socket)

    async def _take(self, socket: trio.SocketStream) -> None:
        """See one inbound connection through to membership, or close it."""
        try:
            tune(socket.socket, user_timeout=self._limits.tcp_user_timeout)
            tcp = TcpStream(socket)
        except OSError:
            await socket.aclose()  # gone before it was looked at
            return
        with trio.CancelScope() as scope:
            knock = self._door.knock(tcp.remote_ip, scope.cancel, now=trio.current_time())
            if knock is None:
                self._count_membership("crowded")
                await trio.aclose_forcefully(socket)
                return
            try:
                await self.bring_in(tcp)
            finally:
                self._door.leave(knock)
        if scope.cancelled_caught:
            self._count_membership("crowded")

    async def bring_in(self, stream: RawStream) -> MeshConn | None:
        """See one accepted stream through to membership; None, or a closed one, if it fails."""
        conn: MeshConn | None = None
        try:
            with trio.move_on_after(self._limits.handshake_timeout):
                conn = await self._swarm.upgrade(stream, None)
        except ForeignError:
            return None  # counted; a stranger that speaks something else
        if conn is None:
            self._count_membership("timeout")
            return None
        try:
            with trio.move_on_after(self._limits.membership_timeout):
                await conn.settled.wait()
            if not conn.settled.is_set():
                self._count_membership("timeout")
                await self._refuse(conn, "it did not prove membership in time")
        finally:
            if not conn.settled.is_set():
                with trio.CancelScope(shield=True):
                    await conn.close("no room for connections without proof of membership")
        return conn

    async def answer_membership(self, conn: MeshConn, stream: Libp2pStream) -> None:
        """Run the listening side of the exchange on one connection, pending or a member's."""
        if conn.is_member:
            await self._renewal.answer(conn, stream)
            return
        error: MeshnodeError | None = None
        try:
            conn.proven_by = await prove_as_listener(
                stream,
                self._membership.now.keys,
                self._own_id,
                objection=partial(self._objection, conn),
            )
            self._take_as_member(conn)
        except MeshnodeError as exc:
            error = exc
        finally:
            self._release_slot(conn)
            conn.is_proving = False  # done, one way or the other; a member may prove anew
        self._count_membership(outcome_label(error))
        if error is not None:
            await await_farewell(stream, self._limits.farewell_timeout)
            if isinstance(error, DuplicateConnection | StreamReset):
                await conn.close(str(error))
            else:
                await self._refuse(conn, str(error))

    async def _objection(self, conn: MeshConn) -> Refusal | None:
        """Say why this connection can't be taken, token aside."""
        kept_out = self._membership.now.objection(conn.peer_id)
        if kept_out is not None:
            return Refusal(code=BLOCKED, message=kept_out)
        older = self._links.get(conn.peer_id)
        if older is None and len(self._links) >= self._limits.max_links:
            return Refusal(code=_TOO_MANY, message="this node has all the links it can have")
        if older is not None and _outranks(conn, older):
            older = None
        if self._decides_about(conn.peer_id):
            busy = conn.peer_id in self._proving
            # The peer would not dial if it knew of a link: either the two dials crossed, or its
            # end of the link is dead.
            if busy or (older is not None and await self._answers(older)):
                return Refusal(code=DUPLICATE, message="the two of us are connected already")
            if conn.peer_id in self._proving:
                return Refusal(code=DUPLICATE, message="the two of us are connecting already")
            self._proving[conn.peer_id] = conn
        return None

    async def _answers(self, conn: MeshConn) -> bool:
        try:
            await conn.ping(self._limits.duplicate_timeout / 2)
        except PeerUnreachable:
            return False
        return True

    # Dialling

    async def dial(
        self,
        peer_id: str,
        multiaddr: str,
        open_raw: OpenRaw,
        *,
        direct: bool,
        timeout: float,
        patience: float = 0.0,
    ) -> None:
        """Have a link to ``peer_id``, over ``open_raw`` if there is none yet, or a worse one.

        Args:
            multiaddr: where that leads, for people.
            direct: whether it leads there without a relay.
            timeout, patience: as of ``Mesh.dial``.

        Raises:
            PeerUnreachable, PeerLate, TokenRefused: as ``Mesh.dial``.
        """
        where = f"{peer_id} at {multiaddr}"
        is_taken = False

        async def open_and_note() -> RawStream:
            nonlocal is_taken
            raw = await open_raw()
            is_taken = True
            scope.deadline = max(scope.deadline, trio.current_time() + patience)
            return raw

        began = trio.current_time()
        kept_out = self._membership.now.objection(peer_id)
        if kept_out is not None:
            raise PeerUnreachable(f"{peer_id} is not dialled: {kept_out}")
        with trio.move_on_after(timeout) as scope:
            async with self._only_dial_to(peer_id):
                link = self._links.get(peer_id)
                if link is None or (direct and link.via is not None):
                    await self._dial(peer_id, where, open_and_note)
        if scope.cancelled_caught:
            kind = PeerLate if is_taken else PeerUnreachable
            limit = round(scope.deadline - began, 1)
            raise kind(f"{where} did not answer within {limit:g} s")

    async def _dial(self, peer_id: str, where: str, open_raw: OpenRaw) -> None:
        conn = await self.connect(peer_id, where, open_raw)
        try:
            await self._prove(conn)
        except DuplicateConnection as exc:
            await conn.close("duplicate")
            await self._await_other_link(peer_id, exc)
        except TokenRefused as exc:
            await self._refuse(conn, str(exc))
            raise
        except MeshnodeError as exc:
            await conn.close("membership failed")
            raise PeerUnreachable(f"{where} did not take this node in: {exc}") from exc
        except BaseException:
            with trio.CancelScope(shield=True):
                await conn.close("cancelled")
            raise

    async def connect(self, peer_id: str, where: str, open_raw: OpenRaw) -> MeshConn:
        """Return a secure connection to ``peer_id`` that has not proven membership.

        Raises:
            PeerUnreachable: nobody is there, or somebody else.
            TokenRefused: by the relay on the way.
        """
        try:
            return await self._swarm.upgrade(await open_raw(), peer_id)
        except ForeignError as exc:
            raise PeerUnreachable(f"{where}: no secure connection: {exc}") from exc
        except TokenRefused:
            raise
        except (OSError, MeshError, WireError) as exc:
            raise PeerUnreachable(f"{where} can't be reached: {exc}") from exc

    async def _prove(self, conn: MeshConn) -> None:
        """Run the dialling side of the exchange, and make the connection a link."""
        peer_id = conn.peer_id
        older = self._links.get(peer_id)
        known = older is not None and not _outranks(conn, older)
        if known or peer_id in self._proving:
            raise DuplicateConnection("the peer's own connection came first")
        if self._decides_about(peer_id):
            self._proving[peer_id] = conn
        error: BaseException | None = None
        try:
            with trio.fail_after(self._limits.membership_timeout):
                muxed, _ = await open_negotiated(conn, (PROTOCOL_ID,))
                stream = Libp2pStream(muxed, peer_id, PROTOCOL_ID)
                try:
                    conn.proven_by = await prove_as_dialler(
                        stream, self._membership.now.keys, self._own_id
                    )
                    self._take_as_member(conn)
                except TokenRefused:
                    await stream.send_eof()
                    await await_farewell(stream, self._limits.farewell_timeout)
                    raise
                await stream.aclose()
        except trio.TooSlowError as exc:
            error = exc
            raise PeerUnreachable("the peer did not finish the membership exchange") from exc
        except BaseException as exc:
            error = exc
            raise
        finally:
            self._release_slot(conn)
            self._count_membership(outcome_label(error))

    async def _await_other_link(self, peer_id: str, cause: DuplicateConnection) -> None:
        with (
            self._links.awaiting(peer_id) as linked,
            trio.move_on_after(self._limits.duplicate_timeout),
        ):
            await linked.wait()
            return
        raise PeerUnreachable(
            f"{peer_id} says that it is connected to this node already, and is not"
        ) from cause

    @asynccontextmanager
    async def _only_dial_to(self, peer_id: str) -> AsyncIterator[None]:
        """Let dials to one peer go one after another: the second then finds the first's link."""
        lock = self._dial_locks.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._dial_locks.pop(peer_id, None)

    # Both

    def _decides_about(self, peer_id: str) -> bool:
        return self._own_id < peer_id

    def _take_as_member(self, conn: MeshConn) -> None:
        if conn.is_closed:
            raise StreamReset("the connection ended while membership was being proven")
        belonging = self._membership.now
        if conn.proven_by is None or not belonging.holds(conn.proven_by):
            raise PeerRefused("the key was withdrawn while membership was being proven")
        kept_out = belonging.objection(conn.peer_id)
        if kept_out is not None:
            raise PeerRefused(kept_out)
        self._admit(conn)

    def _release_slot(self, conn: MeshConn) -> None:
        if self._proving.get(conn.peer_id) is conn:
            del self._proving[conn.peer_id]

    async def _refuse(self, conn: MeshConn, reason: str) -> None:
        self._links.tell(LinkState.REFUSED, conn, reason)
        await conn.close(reason)

    def _count_membership(self, outcome: str) -> None:
        self._metrics.memberships.labels(outcome=outcome).inc()


def _outranks(conn: MeshConn, older: MeshConn) -> bool:
    """Whether a new connection replaces one that stands: a direct one does a relayed one."""
    return conn.via is None and older.via is not None
