"""Which proven members are connected now, and who is told when that changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from meshnode.net.libp2p.swarm import MeshConn
from meshnode.net.mesh import Link, LinkEvent, LinkState, LinkWatcher


class Links:
    """Members' connections, newest first per peer; UP with the first, DOWN with the last."""

    def __init__(self) -> None:
        self._conns: dict[str, list[MeshConn]] = {}
        self._watchers: list[LinkWatcher] = []
        self._awaited: dict[str, list[trio.Event]] = {}

    def __len__(self) -> int:
        return len(self._conns)

    def watch(self, watcher: LinkWatcher) -> None:
        self._watchers.append(watcher)

    def get(self, peer_id: str) -> MeshConn | None:
        """Return the connection to use for ``peer_id``, if there is one."""
        conns = self._conns.get(peer_id)
        return conns[0] if conns else None

    def all_of(self, peer_id: str) -> tuple[MeshConn, ...]:
        return tuple(self._conns.get(peer_id, ()))

    def add(self, conn: MeshConn) -> tuple[MeshConn, ...]:
        """Enter a member's connection; return the older ones that it replaces."""
        older = self._conns.setdefault(conn.peer_id, [])
        replaced = tuple(older)
        older.insert(0, conn)
        for event in self._awaited.get(conn.peer_id, ()):
            event.set()
        if not replaced:
            how = "dialled" if conn.dialled else "accepted"
            self.tell(LinkState.UP, conn, how)
        return replaced

    def remove(self, conn: MeshConn) -> bool:
        """Forget a connection that ended; True if it was the last to its peer."""
        conns = self._conns.get(conn.peer_id)
        if conns is None or conn not in conns:
            return False
        conns.remove(conn)
        if conns:
            return False
        del self._conns[conn.peer_id]
        self.tell(LinkState.DOWN, conn, conn.why_it_ended)
        return True

    def tell(self, state: LinkState, conn: MeshConn, reason: str) -> None:
        """Tell every watcher of one change, in the order of their registration."""
        event = LinkEvent(state, conn.peer_id, reason, addr=conn.addr, dialled=conn.dialled)
        for watcher in self._watchers:
            watcher(event)

    @contextmanager
    def awaiting(self, peer_id: str) -> Iterator[trio.Event]:
        """Give an event that is set when a link to ``peer_id`` comes up."""
        event = trio.Event()
        if peer_id in self._conns:
            event.set()
        waiters = self._awaited.setdefault(peer_id, [])
        waiters.append(event)
        try:
            yield event
        finally:
            waiters.remove(event)
            if not waiters:
                self._awaited.pop(peer_id, None)

    def snapshot(self) -> tuple[Link, ...]:
        return tuple(_link(conns[0]) for conns in self._conns.values())

    def link_to(self, peer_id: str) -> Link | None:
        conn = self.get(peer_id)
        return None if conn is None else _link(conn)


def _link(conn: MeshConn) -> Link:
    return Link(
        peer_id=conn.peer_id,
        addr=conn.addr,
        dialled=conn.dialled,
        since=conn.since,
        last_received=max(conn.since, conn.muxed_conn.last_received),
        rtt=conn.rtt,
        via=conn.via,
    )
