"""Membership proven anew on a link that stands, so that a rotated token breaks no stream.

A link rests on the key that it was proven with. When this node drops that key, it asks the peer
to prove another over the same connection; only who has none is cut off.
"""

from __future__ import annotations

import trio

from meshnode.core.belonging import Membership
from meshnode.core.membership import BLOCKED, Refusal
from meshnode.errors import MeshnodeError
from meshnode.net.libp2p.limits import Limits
from meshnode.net.libp2p.links import Links
from meshnode.net.libp2p.membership import (
    PROTOCOL_ID,
    await_farewell,
    prove_as_dialler,
    prove_as_listener,
)
from meshnode.net.libp2p.stream import Libp2pStream
from meshnode.net.libp2p.swarm import MeshConn, MeshSwarm, open_negotiated


class Renewal:
    """Keeps every link in step with who belongs now."""

    def __init__(
        self, swarm: MeshSwarm, links: Links, membership: Membership, *, own_id: str, limits: Limits
    ) -> None:
        self._swarm = swarm
        self._links = links
        self._membership = membership
        self._own_id = own_id
        self._limits = limits
        membership.watch(self._look_at_all)

    def _look_at_all(self) -> None:
        belonging = self._membership.now
        for link in self._links.snapshot():
            for conn in self._links.all_of(link.peer_id):
                kept_out = belonging.objection(conn.peer_id)
                if kept_out is not None:
                    self._swarm.close_soon(conn, kept_out)
                elif conn.proven_by is not None and not belonging.holds(conn.proven_by):
                    self._swarm.start_soon(self._ask, conn)

    async def _ask(self, conn: MeshConn) -> None:
        """Have a peer prove a key that still counts, or close its connection."""
        error: MeshnodeError | None = None
        with trio.move_on_after(self._limits.renewal_timeout) as scope:
            try:
                muxed, _ = await open_negotiated(conn, (PROTOCOL_ID,))
                stream = Libp2pStream(muxed, conn.peer_id, PROTOCOL_ID)
                conn.proven_by = await prove_as_dialler(
                    stream, self._membership.now.keys, self._own_id
                )
                await stream.aclose()
            except MeshnodeError as exc:
                error = exc
        if error is not None or scope.cancelled_caught:
            why = "it did not answer" if error is None else str(error)
            await conn.close(f"the key that it proved membership with is withdrawn: {why}")

    async def answer(self, conn: MeshConn, stream: Libp2pStream) -> None:
        """Run the listening side: the peer dropped the key that this link rests on."""
        try:
            with trio.fail_after(self._limits.renewal_timeout):
                conn.proven_by = await prove_as_listener(
                    stream,
                    self._membership.now.keys,
                    self._own_id,
                    objection=lambda: self._objection(conn.peer_id),
                )
        except (MeshnodeError, trio.TooSlowError) as exc:
            await await_farewell(stream, self._limits.farewell_timeout)
            await conn.close(f"membership was not proven anew: {exc}")
        finally:
            conn.is_proving = False

    async def _objection(self, peer_id: str) -> Refusal | None:
        kept_out = self._membership.now.objection(peer_id)
        return None if kept_out is None else Refusal(code=BLOCKED, message=kept_out)
