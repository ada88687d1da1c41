"""What changes in a node, as server-sent events for the pages that look on.

A page gets a snapshot and from then on only what differs. What is sent is made once for all
pages. A page that does not read as fast as things happen is dropped and told so: it comes back
and gets a snapshot, which is shorter than everything it missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import structlog
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meshnode.http.answers import HEADERS, error_response

# An eye sees a quarter of a second as at once; the state is looked through no more often.
INTERVAL = 0.25  # seconds
# Decisions pass faster than anybody reads.
_DECISIONS_INTERVAL = 1.0  # seconds
# Looking through the state of a large mesh may take at most a twentieth of this node's time.
_BUSY_SHARE = 20
# What an idle connection gets, so that a dead one is found out on both sides.
HEARTBEAT = 5.0  # seconds
# Every open page is one; a room full of screens has ten.
MAX_CLIENTS = 16
# About ten seconds of a busy mesh. A page that lags further is better off with a snapshot.
MAX_QUEUED = 64
# How long a page that was dropped may take to hear why.
_FAREWELL = 1.0  # seconds

_log = structlog.get_logger(__name__)

Json = Mapping[str, object]


class LiveState(Protocol):
    """What the events tell of a node. Every call is quick and reads only."""

    def status(self) -> Json: ...

    def live_peers(self) -> tuple[dict[str, Json], int]:
        """Return rows by peer ID, in the order to show, and how many peers there are in all."""
        ...

    def live_decisions(self) -> list[Json]:
        """Return the last decisions, the newest first, each with its ``key``."""
        ...

    def traffic(self) -> Json:
        """Return the last ten minutes in columns."""
        ...

    def last_second(self) -> Json:
        """Return the last second, in the same columns."""
        ...


class _Client:
    """One page that looks on."""

    def __init__(self) -> None:
        self.inbox: trio.MemoryReceiveChannel[bytes]
        self._outbox: trio.MemorySendChannel[bytes]
        self._outbox, self.inbox = trio.open_memory_channel[bytes](MAX_QUEUED)
        self.dropped_for: str | None = None

    def put(self, message: bytes) -> None:
        try:
            self._outbox.send_nowait(message)
        except trio.WouldBlock:
            self.drop("slow")
        except trio.ClosedResourceError:
            return  # dropped already

    def drop(self, reason: str) -> None:
        self.dropped_for = self.dropped_for or reason
        self._outbox.close()


class Feed:
    """Looks through the node's state while somebody looks on, and tells them what changed."""

    def __init__(self, state: LiveState, *, interval: float = INTERVAL) -> None:
        self._state = state
        self._interval = interval
        self._clients: set[_Client] = set()
        self._wanted = trio.Event()
        self._id = 0
        self._seen = _Seen()
        self._decisions_due = 0.0
        self._second: Json = {}

    async def run_forever(self) -> None:
        """Tell changes until cancelled; then end every stream, so that no page holds the node."""
        try:
            while True:
                await self._wanted.wait()
                started = trio.current_time()
                self.tick()
                await trio.sleep(max(self._interval, _BUSY_SHARE * (trio.current_time() - started)))
        finally:
            for client in self._clients:
                client.drop("node_stopped")

    def tick(self) -> None:
        """Tell every page what changed since the last time."""
        now = trio.current_time()
        changes = self._seen.changes(self._state, now, with_decisions=now >= self._decisions_due)
        if now >= self._decisions_due:
            self._decisions_due = now + _DECISIONS_INTERVAL
            changes["traffic"] = self._state.last_second()
        for name, body in changes.items():
            message = self._message(name, body)
            for client in self._clients:
                client.put(message)

    @contextmanager
    def subscribe(self) -> Iterator[_Client]:
        """Take in one page; its inbox begins with a snapshot."""
        client = _Client()
        if not self._clients:
            self._seen = _Seen()
            self._seen.changes(self._state, trio.current_time(), with_decisions=True)
        client.put(self._message("snapshot", self._snapshot()))
        self._clients.add(client)
        self._wanted.set()
        try:
            yield client
        finally:
            self._clients.discard(client)
            client.drop("gone")
            client.inbox.close()
            if not self._clients:
                self._wanted = trio.Event()

    @property
    def is_full(self) -> bool:
        return len(self._clients) >= MAX_CLIENTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one page: an ASGI application."""
        if self.is_full:
            refusal: Response = error_response(
                503,
                "too_many_clients",
                f"{MAX_CLIENTS} pages look on already; close one",
                headers={"Retry-After": "5"},
            )
            await refusal(scope, receive, send)
            return
        with self.subscribe() as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_for_disconnect, receive, nursery.cancel_scope)
                await _pump(client, send)
                nursery.cancel_scope.cancel()

    def _snapshot(self) -> dict[str, object]:
        seen = self._seen
        return {
            "now": round(trio.current_time(), 3),
            "status": seen.status,
            "peers": [_row(row, at) for row, at in seen.peers.values()],
            "peers_total": seen.peers_total,
            "decisions": list(seen.decisions.values()),
            "traffic": self._state.traffic(),
        }

    def _message(self, name: str, body: Json) -> bytes:
        self._id += 1
        # JSON has no bare line breaks, so one data line holds it all.
        data = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        # A lone surrogate in a peer's name must not end the stream.
        return f"id: {self._id}\nevent: {name}\ndata: {data}\n\n".encode("utf-8", "replace")


class _Seen:
    """The state as it was last told."""

    def __init__(self) -> None:
        self.status: Json = {}
        self.peers: dict[str, tuple[Json, float | None]] = {}  # row, and when it was last seen
        self.peers_total = 0
        self.decisions: dict[str, Json] = {}

    def changes(self, state: LiveState, now: float, *, with_decisions: bool) -> dict[str, Json]:
        """Return what to tell, by the name of its event, and remember it as told."""
        told: dict[str, Json] = {}
        status = {key: value for key, value in state.status().items() if key != "uptime_s"}
        if status != self.status:
            self.status = status
            told["status"] = status
        peers = self._peer_changes(state, now)
        if peers is not None:
            told["peers"] = peers
        if with_decisions:
            decisions = {str(decision["key"]): decision for decision in state.live_decisions()}
            if decisions != self.decisions:
                fresh = [d for key, d in decisions.items() if self.decisions.get(key) != d]
                told["decisions"] = {"order": list(decisions), "changed": fresh}
                self.decisions = decisions
        return told

    def _peer_changes(self, state: LiveState, now: float) -> Json | None:
        rows, total = state.live_peers()
        peers: dict[str, tuple[Json, float | None]] = {}
        changed: list[Json] = []
        for peer_id, row in rows.items():
            seen_at = row.get("seen_at")
            at = seen_at if isinstance(seen_at, float) else None
            bare = {key: value for key, value in row.items() if key != "seen_at"}
            old = self.peers.get(peer_id)
            if old is None or old[0] != bare or not _about_equal(old[1], at):
                changed.append(_row(bare, at))
                old = (bare, at)
            peers[peer_id] = old
        gone = [peer_id for peer_id in self.peers if peer_id not in peers]
        reordered = list(peers) != list(self.peers)
        same_total = total == self.peers_total
        self.peers, self.peers_total = peers, total
        if not changed and not gone and not reordered and same_total:
            return None
        body: dict[str, object] = {"now": round(now, 3), "total": total, "changed": changed}
        body["gone"] = gone
        if reordered:
            body["order"] = list(peers)
        return body


def _row(bare: Json, seen_at: float | None) -> Json:
    return {**bare, "seen_at": seen_at}


def _about_equal(one: float | None, other: float | None) -> bool:
    """Say whether two sightings look the same to a person."""
    if one is None or other is None:
        return one is other
    return abs(one - other) < 0.9


async def _pump(client: _Client, send: Send) -> None:
    headers = {
        **HEADERS,
        "Content-Type": "text/event-stream; charset=utf-8",
        "Connection": "close",  # a stream that ended is worth no waiting for another request
    }
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )
    while client.dropped_for is None:
        message = b": still here\n\n"
        with trio.move_on_after(HEARTBEAT):
            try:
                message = await client.inbox.receive()
            except trio.EndOfChannel:
                break
        await send({"type": "http.response.body", "body": message, "more_body": True})
    _log.debug("page_dropped", reason=client.dropped_for)
    farewell = json.dumps({"reason": client.dropped_for})
    # Shielded, for the last send itself makes the server say that the client is gone.
    with trio.move_on_after(_FAREWELL, shield=True):
        last = f"event: dropped\ndata: {farewell}\n\n".encode()
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _wait_for_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
