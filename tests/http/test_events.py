from __future__ import annotations

import json

import pytest
import trio

from meshnode.http import events, server
from meshnode.http.control_api import build_app
from meshnode.http.events import MAX_CLIENTS, MAX_QUEUED, Feed
from meshnode.http.server import bind, serve_forever
from support.page_mesh import MadeUpMesh


@pytest.fixture
async def mesh():
    return MadeUpMesh(12)


@pytest.fixture
async def feed(mesh):
    return Feed(mesh)


@pytest.fixture
async def port(nursery, mesh, feed):
    sock = bind("127.0.0.1", 0, setting="api")
    await nursery.start(serve_forever, build_app(mesh, events=feed), sock)
    with trio.fail_after(30):
        yield sock.getsockname()[1]


class Page:
    """One client of the events, on a socket of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.text = ""

    @classmethod
    async def open(cls, port: int, path: str = "/api/events") -> Page:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        page = cls(stream)
        await page.until("\r\n\r\n")
        return page

    async def until(self, mark: str) -> str:
        """Everything up to the next ``mark``; None is left of it."""
        while mark not in self.text:
            piece = await self.stream.receive_some(65536)
            assert piece, f"ended before {mark!r}: {self.text[-300:]!r}"
            self.text += piece.decode("utf-8", "replace").replace("\r\n", "\r\n")
        found, _, self.text = self.text.partition(mark)
        return found

    async def event(self) -> tuple[str, dict]:
        """The next event, past chunk headers and heartbeats."""
        while True:
            block = await self.until("\n\n")
            lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
            if "event" in lines:
                return lines["event"], json.loads(lines["data"])

    async def next(self, name: str) -> dict:
        while True:
            got, body = await self.event()
            if got == name:
                return body


async def test_a_page_begins_with_a_snapshot_of_everything(port, mesh):
    page = await Page.open(port)
    name, body = await page.event()
    assert name == "snapshot"
    assert [row["peer_id"] for row in body["peers"]] == list(mesh.rows)
    assert body["peers_total"] == 12
    assert len(body["traffic"]["requests"]) == 600
    assert len(body["decisions"]) == 12
    assert body["status"]["network"] == "lab"
    await page.stream.aclose()


async def test_then_only_the_rows_that_differ_are_told(port, mesh, feed):
    page = await Page.open(port)
    await page.next("snapshot")
    feed.tick()
    peer_id, row = list(mesh.rows.items())[4]
    row["state"], row["online"] = "offline", False
    feed.tick()
    body = await page.next("peers")
    assert [changed["peer_id"] for changed in body["changed"]] == [peer_id]
    assert body["changed"][0]["state"] == "offline"
    assert "order" not in body
    await page.stream.aclose()


async def test_a_member_that_is_gone_is_named_and_the_order_told(port, mesh, feed):
    page = await Page.open(port)
    await page.next("snapshot")
    peer_id = list(mesh.rows)[7]
    del mesh.rows[peer_id]
    feed.tick()
    body = await page.next("peers")
    assert body["gone"] == [peer_id]
    assert body["order"] == list(mesh.rows)
    assert body["total"] == 11
    await page.stream.aclose()


async def test_a_sighting_alone_is_told_once_a_person_could_tell_the_difference(feed, mesh):
    with feed.subscribe() as client:
        client.inbox.receive_nowait()
        row = list(mesh.rows.values())[3]
        row["seen_at"] += 0.5
        feed.tick()
        told = [
            client.inbox.receive_nowait()
            for _ in range(client.inbox.statistics().current_buffer_used)
        ]
        assert not any(b"event: peers" in message for message in told)
        row["seen_at"] += 0.5
        feed.tick()
        assert b"event: peers" in client.inbox.receive_nowait()


async def test_event_ids_rise(feed):
    with feed.subscribe() as client:
        first = client.inbox.receive_nowait()
        feed.tick()
        later = client.inbox.receive_nowait()
    ids = [int(message.split(b"\n")[0].removeprefix(b"id: ")) for message in (first, later)]
    assert ids[0] < ids[1]


async def test_a_page_that_does_not_read_is_dropped_and_told_and_others_go_on(port, mesh, feed):
    slow, quick = await Page.open(port), await Page.open(port)
    await quick.next("snapshot")
    # More than the sockets' own buffers hold, so that messages pile up at the node.
    for row in mesh.rows.values():
        row["services"] = [{"service_id": "s", "models": ["m" * 128] * 200, "healthy": True}]
    for count in range(MAX_QUEUED + 60):
        for row in mesh.rows.values():
            row["in_flight"] = count
        feed.tick()
        await quick.next("peers")
        await trio.lowlevel.checkpoint()
    assert (await slow.next("dropped"))["reason"] == "slow"
    with pytest.raises(AssertionError, match="ended before"):
        await slow.until("\n\n event")
    next(iter(mesh.rows.values()))["in_flight"] = 777
    feed.tick()
    body = await quick.next("peers")
    assert body["changed"][0]["in_flight"] == 777
    for page in (slow, quick):
        await page.stream.aclose()


async def test_a_page_that_never_reads_loses_its_connection(nursery, mesh, feed, monkeypatch):
    monkeypatch.setattr(server, "SEND_TIMEOUT", 0.2)
    sock = bind("127.0.0.1", 0, setting="api")
    await nursery.start(serve_forever, build_app(mesh, events=feed), sock)
    with trio.fail_after(20):
        page = await Page.open(sock.getsockname()[1])
        for row in mesh.rows.values():
            row["services"] = [{"service_id": "s", "models": ["m" * 128] * 500, "healthy": True}]
        count = 0
        while feed._clients:
            count += 1
            for row in mesh.rows.values():
                row["in_flight"] = count
            feed.tick()
            await trio.sleep(0.01)
        await page.stream.aclose()


async def test_one_page_too_many_is_told_to_come_later(port, feed):
    pages = [await Page.open(port) for _ in range(MAX_CLIENTS)]
    for page in pages:
        await page.next("snapshot")
    late = await trio.open_tcp_stream("127.0.0.1", port)
    await late.send_all(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = (await late.receive_some(65536)).decode()
    assert answer.startswith("HTTP/1.1 503")
    assert "retry-after: 5" in answer.lower()
    await pages[0].stream.aclose()
    while feed.is_full:  # noqa: ASYNC110
        await trio.sleep(0.01)
    for stream in (late, *(page.stream for page in pages[1:])):
        await stream.aclose()


async def test_an_idle_stream_has_heartbeats(port, monkeypatch):
    monkeypatch.setattr(events, "HEARTBEAT", 0.05)
    page = await Page.open(port)
    await page.next("snapshot")
    await page.until(": still here\n\n")
    await page.stream.aclose()


async def test_nobody_looks_through_the_node_while_nobody_looks_on(mesh, nursery, autojump_clock):
    feed = Feed(mesh)
    asked = 0

    def count():
        nonlocal asked
        asked += 1
        return {}

    mesh.status = count
    nursery.start_soon(feed.run_forever)
    await trio.sleep(10)
    assert asked == 0
    with feed.subscribe():
        await trio.sleep(1.1)
        assert 3 <= asked <= 6
    asked = 0
    await trio.sleep(10)
    assert asked == 0


async def test_when_the_node_ends_the_pages_are_told(mesh, autojump_clock):
    feed = Feed(mesh)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run_forever)
        with feed.subscribe() as client:
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                while client.dropped_for is None:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                assert client.dropped_for == "node_stopped"
