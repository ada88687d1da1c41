"""An engine and a client that cost next to nothing, so that what lies between them is measured.

    bench_http.py engine                      serves until its stdin ends; prints its address
    bench_http.py latency N A B               N requests to A and B in turn; medians in ms
    bench_http.py rate CONNECTIONS SECONDS A  requests per second, each connection in a loop
    bench_http.py streams STREAMS CHUNKS A    server-sent events at 50/s; lateness of each
    bench_http.py leave WINDOW N ENGINE A     N clients of A leave; ms until the engine knows

WINDOW is where in its answer a client leaves: ``head`` (nothing of it came yet), ``stream``
(between two events) or ``whole`` (half of an answer that is no stream). Both ends read one
monotonic clock, so the time inside an event tells how long it was under way.
"""

from __future__ import annotations

import heapq
import json
import select
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

CHUNKS_PER_SECOND = 50
_BODY = b'{"id":"x","object":"chat.completion","choices":[{"message":{"content":"hello"}}]}'
_PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)
_EVENTS = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_HALF = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
_HALF += b" " * 500
# What a client that leaves has seen of its answer.
WINDOWS = {"head": b"", "stream": b"data: ", "whole": b" " * 500}
_ENDLESS = 1_000_000  # events
_PATIENCE = 20.0  # seconds for an engine to be asked, or freed


def request(*, chunks: int = 0, hold: str = "") -> bytes:
    """Return a chat request.

    Args:
        chunks: asks for a stream of so many events.
        hold: "head" asks for no answer at all, "whole" for half of one.
    """
    asked = {"model": "bench", "messages": [{"role": "user", "content": "hello there"}]}
    extra = {"stream": True, "max_tokens": chunks} if chunks else {}
    body = json.dumps(asked | extra | ({"hold": hold} if hold else {})).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\n"
        b"content-type: application/json\r\nuser-agent: bench\r\nauthorization: Bearer x\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Engine:
    """One thread, one epoll: answers at once, or sends an event every 20 ms.

    ``GET /held`` tells how many answers are under way, and when others lost their connection.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(sys.stdin, select.EPOLLIN | select.EPOLLHUP)
        self._connections: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._due: list[tuple[float, int, int, int]] = []  # when, descriptor, number, of how many
        self._held: set[int] = set()  # descriptors whose answers are under way
        self._freed: list[int] = []  # when one of them was closed, in monotonic ns

    def serve(self) -> None:
        host, port = self._listener.getsockname()
        print(json.dumps({"address": f"{host}:{port}"}), flush=True)
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else -1
            for fd, _ in self._epoll.poll(wait):
                if fd == sys.stdin.fileno():
                    return
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._read(fd)
            self._send_due()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection, select.EPOLLIN)

    def _read(self, fd: int) -> None:
        # Who left may have asked before: the answer finds the connection reset.
        try:
            data = self._connections[fd].recv(65536)
            if data:
                self._take(fd, data)
                return
        except ConnectionError:
            pass
        self._drop(fd)

    def _take(self, fd: int, data: bytes) -> None:
        data = self._unread.pop(fd, b"") + data
        end = data.find(b"\r\n\r\n") + 4
        at = data.find(b"content-length: ")
        length = int(data[at + 16 : data.index(b"\r", at)]) if 0 <= at < end else 0
        if end < 4 or len(data) < end + length:
            self._unread[fd] = data
            return
        if b'"stream": true' not in data:
            self._connections[fd].send(self._plain(fd, data))
            return
        count = json.loads(data[end:])["max_tokens"]
        self._connections[fd].send(_EVENTS)
        self._held.add(fd)
        heapq.heappush(self._due, (time.monotonic() + 1 / CHUNKS_PER_SECOND, fd, 0, count))

    def _plain(self, fd: int, data: bytes) -> bytes:
        if data.startswith(b"GET /held"):
            told = json.dumps({"held": len(self._held), "freed": self._freed}).encode()
            return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(told), told)
        if b'"hold"' not in data:
            return _PLAIN
        self._held.add(fd)
        return _HALF if b'"hold": "whole"' in data else b""

    def _drop(self, fd: int) -> None:
        if fd in self._held:
            self._freed.append(time.monotonic_ns())
            self._held.discard(fd)
        self._connections.pop(fd).close()
        self._unread.pop(fd, None)

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            due, fd, number, count = heapq.heappop(self._due)
            connection = self._connections.get(fd)
            if connection is None or fd not in self._held:
                continue
            event = b"data: %d %d\n\n" % (number, time.monotonic_ns())
            chunk = b"%x\r\n%b\r\n" % (len(event), event)
            last = number + 1 == count
            try:
                connection.send(chunk + b"0\r\n\r\n" if last else chunk)
            except ConnectionError:
                self._drop(fd)
                continue
            if last:
                self._held.discard(fd)
            else:
                heapq.heappush(self._due, (due + 1 / CHUNKS_PER_SECOND, fd, number + 1, count))


def one_answer(connection: socket.socket, asked: bytes) -> None:
    connection.sendall(asked)
    data = b""
    while not data.endswith(_BODY):
        more = connection.recv(65536)
        if not more:
            raise SystemExit(f"the connection ended after {data!r}")
        data += more
    if not data.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"not served: {data[:300]!r}")


def latency(count: int, *addresses: str) -> dict[str, float]:
    connections = {address: connect(address) for address in addresses}
    asked = request()
    taken: dict[str, list[float]] = {address: [] for address in addresses}
    for connection in connections.values():
        for _ in range(50):
            one_answer(connection, asked)
    for _ in range(count):
        for address, connection in connections.items():
            began = time.perf_counter()
            one_answer(connection, asked)
            taken[address].append(time.perf_counter() - began)
    return {address: statistics.median(times) * 1000 for address, times in taken.items()}


def rate(count: int, seconds: float, address: str) -> dict[str, float]:
    asked = request()
    epoll = select.epoll()
    connections = {}
    for _ in range(count):
        connection = connect(address)
        connections[connection.fileno()] = connection
        one_answer(connection, asked)
    unread: dict[int, bytes] = {}
    for fd, connection in connections.items():
        epoll.register(fd, select.EPOLLIN)
        connection.send(asked)
    served, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        for fd, _ in epoll.poll(1):
            data = unread.pop(fd, b"") + connections[fd].recv(65536)
            if not data.endswith(_BODY):
                unread[fd] = data
                continue
            assert data.startswith(b"HTTP/1.1 200 "), data[:300]
            served += 1
            connections[fd].send(asked)
    return {"per_second": served / took, "requests": served}


def streams(count: int, chunks: int, address: str) -> dict[str, float]:
    asked = request(chunks=chunks)
    epoll = select.epoll()
    connections = {}
    for _ in range(count):
        connection = connect(address)
        connections[connection.fileno()] = connection
        epoll.register(connection.fileno(), select.EPOLLIN)
        connection.send(asked)
        time.sleep(1 / CHUNKS_PER_SECOND / count)  # their events are spread over the 20 ms
    expected = dict.fromkeys(connections, 0)
    partial = dict.fromkeys(connections, b"")
    late: list[float] = []
    left = set(connections)
    while left:
        for fd, _ in epoll.poll(30):
            data = partial[fd] + connections[fd].recv(65536)
            now = time.monotonic_ns()
            *events, partial[fd] = data.split(b"\n\n")
            for event in events:
                number, sent = event.rpartition(b"data: ")[2].split()
                assert int(number) == expected[fd], (number, expected[fd])
                expected[fd] += 1
                late.append((now - int(sent)) / 1e6)
            if partial[fd].endswith(b"0\r\n\r\n"):
                epoll.unregister(fd)
                left.discard(fd)
    assert set(expected.values()) == {chunks}
    late.sort()
    return {
        "events": len(late),
        "p50_ms": late[len(late) // 2],
        "p99_ms": late[int(len(late) * 0.99)],
    }


def leave(window: str, count: int, engine: str, address: str) -> dict[str, float]:
    """Return how long after its client's leaving the engine's connection was closed.

    Every second client resets its connection, as one that is killed with bytes unread does.
    """
    asked = request(chunks=_ENDLESS) if window == "stream" else request(hold=window)
    watch = connect(engine)
    taken = []
    for number in range(count):
        freed = len(_told(watch)["freed"])
        with connect(address) as client:
            client.settimeout(_PATIENCE)
            client.sendall(asked)
            received = b""
            while WINDOWS[window] not in received:
                received += client.recv(65536)
            _wait(watch, lambda told: told["held"] == 1)
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            left_at = time.monotonic_ns()
        told = _wait(watch, lambda told, before=freed: len(told["freed"]) > before)
        taken.append((told["freed"][-1] - left_at) / 1e6)
    taken.sort()
    return {
        "cancellations": count,
        "p50_ms": taken[len(taken) // 2],
        "p99_ms": taken[int(len(taken) * 0.99)],
        "max_ms": taken[-1],
    }


def _told(watch: socket.socket) -> dict[str, Any]:
    watch.sendall(b"GET /held HTTP/1.1\r\nhost: x\r\n\r\n")
    data = b""
    while not data.endswith(b"}"):
        data += watch.recv(65536)
    told: dict[str, Any] = json.loads(data.partition(b"\r\n\r\n")[2])
    return told


def _wait(watch: socket.socket, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE
    while not is_so(told := _told(watch)):
        if time.monotonic() > deadline:
            raise SystemExit(f"after {_PATIENCE:g} s the engine still tells {told['held']} held")
        time.sleep(0.002)
    return told


def main() -> None:
    match sys.argv[1:]:
        case ["engine"]:
            Engine().serve()
        case ["latency", count, *addresses]:
            print(json.dumps(latency(int(count), *addresses)))
        case ["rate", count, seconds, address]:
            print(json.dumps(rate(int(count), float(seconds), address)))
        case ["streams", count, chunks, address]:
            print(json.dumps(streams(int(count), int(chunks), address)))
        case ["leave", window, count, engine, address] if window in WINDOWS:
            print(json.dumps(leave(window, int(count), engine, address)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
