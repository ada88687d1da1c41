"""Real processes on real sockets: a cluster of ``meshnode up`` and engines, cleaned up always."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import pytest

from meshnode.core import token as tokens
from support import lan

T = TypeVar("T")

# Twelve interpreters that start at once on two busy cores take minutes; a hang takes for ever.
READY_TIMEOUT = 150.0


def eventually(check: Callable[[], T], *, within: float, every: float = 0.05) -> T:
    """Return the first truthy result of ``check``; fail with the last one after ``within`` s."""
    deadline = monotonic() + within
    pause = threading.Event()
    while True:
        result = check()
        if result:
            return result
        if monotonic() > deadline:
            pytest.fail(f"not so within {within} s; last seen: {result!r}")
        pause.wait(every)


class Process:
    """A child whose output is read all the time, so that it never blocks on a full pipe."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self.argv = argv
        self.child = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.out: deque[str] = deque(maxlen=10_000)
        self.err: deque[str] = deque(maxlen=10_000)
        self._first_line = threading.Event()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.child.stdout, self.out), (self.child.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: deque[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            if lines is self.out:
                self._first_line.set()
        if lines is self.out:
            self._first_line.set()

    def first_line(self, within: float = READY_TIMEOUT) -> dict[str, Any]:
        """The ready line, as JSON."""
        if not self._first_line.wait(within) or not self.out:
            pytest.fail(f"{' '.join(self.argv)} is not ready:\n" + "\n".join(self.err))
        ready: dict[str, Any] = json.loads(self.out[0])
        return ready

    @property
    def pid(self) -> int:
        return self.child.pid

    def signal(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)

    def wait(self, timeout: float) -> int:
        code = self.child.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        return code

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.wait(10)
        for stream in (self.child.stdout, self.child.stderr):
            if stream is not None:
                stream.close()


class Node(Process):
    """One ``meshnode up`` and its control API."""

    state_dir: Path
    netns: str | None = None  # the network namespace it runs in, if not this process's

    def wait_ready(self, within: float = READY_TIMEOUT) -> Node:
        self.ready = self.first_line(within)
        return self

    @property
    def peer_id(self) -> str:
        return str(self.ready["peer_id"])

    @property
    def addr(self) -> str:
        """A loopback multiaddr of this node."""
        addrs: list[str] = self.ready["addrs"]
        return next(addr for addr in addrs if addr.startswith("/ip4/127.0.0.1/"))

    @property
    def proxy(self) -> tuple[str, int]:
        host, _, port = str(self.ready["proxy"]).rpartition(":")
        return host, int(port)

    @property
    def base_url(self) -> str:
        return f"http://{self.ready['proxy']}/v1"

    def get(self, path: str) -> Any:
        url = f"http://{self.ready['api']}{path}"
        body = _fetch(url) if self.netns is None else lan.within(self.netns, lambda: _fetch(url))
        return json.loads(body) if path.startswith("/api/") else body.decode()

    def peers(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get("/api/peers")["peers"]
        return rows

    def online(self) -> set[str]:
        """Names of the peers that this node holds to be online, itself included."""
        return {row["name"] for row in self.peers() if row["online"]}

    def state_of(self, name: str) -> str | None:
        return next((row["state"] for row in self.peers() if row["name"] == name), None)

    def in_flight(self) -> int:
        """Requests that this node's own services are serving."""
        return sum(row["in_flight"] for row in self.peers() if row["peer_id"] == self.peer_id)

    def decisions(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get("/api/decisions")["decisions"]
        return rows

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.err)]


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
        return body


def _prefix(netns: str | None) -> list[str]:
    return ["ip", "netns", "exec", netns] if netns is not None else []


class Engine(Process):
    """A built-in engine in a process of its own."""

    def wait_ready(self) -> Engine:
        self.ready = self.first_line()
        return self

    @property
    def address(self) -> str:
        return f"{self.ready['host']}:{self.ready['port']}"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.address}/stats", timeout=10) as answer:
            stats: dict[str, Any] = json.loads(answer.read())
        return stats


class Cluster:
    """Starts nodes and engines of one network and stops them all in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self.token = self.new_token()

    def new_token(self, network: str = "e2e") -> str:
        """What ``meshnode token new`` prints, without the interpreter that it takes."""
        return tokens.encode(tokens.new_token(network, (), secrets.token_bytes(32)))

    def env(self, **more: str) -> dict[str, str]:
        # Nothing of the caller's own meshnode settings may leak in.
        env = {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
        return env | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"} | more

    def run(self, *args: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``meshnode`` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "meshnode", *args],
            env=self.env(**env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start_node(
        self,
        name: str,
        *args: str,
        bootstrap: Node | str | None = None,
        token: str | None = None,
        listen: str = "/ip4/127.0.0.1/tcp/0",
        mdns: bool = False,
        netns: str | None = None,
        clock_offset: float = 0.0,
        max_files: int | None = None,
        env: dict[str, str] | None = None,
    ) -> Node:
        """Start a node without waiting for it, in the network namespace ``netns`` if named.

        Its wall clock is ahead of this machine's by ``clock_offset`` seconds; it may have
        ``max_files`` descriptors open. With an empty ``token`` none is in its environment.
        """
        if isinstance(bootstrap, Node):
            bootstrap = bootstrap.addr
        state_dir = self.folder / f"state-{name}"
        argv = [sys.executable, "-m", "meshnode", "up", "--name", name, "--listen", listen]
        argv += ["--api", "127.0.0.1:0", "--log-format", "json"]
        argv += ["--mdns" if mdns else "--no-mdns"]
        argv += ["--state-dir", str(state_dir)]
        if bootstrap is not None:
            argv += ["--bootstrap", bootstrap]
        if max_files is not None:
            argv = ["prlimit", f"--nofile={max_files}:{max_files}", *argv]
        own = self._wrong_clock(clock_offset) | (env or {})
        environment = self.env(MESHNODE_TOKEN=self.token if token is None else token, **own)
        node = Node([*_prefix(netns), *argv, *args], environment)
        node.state_dir = state_dir
        node.netns = netns
        self.processes.append(node)
        return node

    def _wrong_clock(self, offset: float) -> dict[str, str]:
        """Return the environment of an interpreter whose wall clock is ``offset`` s ahead."""
        if not offset:
            return {}
        site = self.folder / f"clock{offset:+g}"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(
            f"import time\nright = time.time\ntime.time = lambda: right() + {offset}\n"
        )
        return {"PYTHONPATH": str(site)}

    def node(self, name: str, *args: str, **settings: Any) -> Node:
        """Start a node and wait until it is ready."""
        return self.start_node(name, *args, **settings).wait_ready()

    def start_engine(self, name: str, *args: str, netns: str | None = None) -> Engine:
        """Start an engine without waiting for it."""
        argv = [sys.executable, "-m", "meshnode.testing.engine", "--name", name, "--port", "0"]
        engine = Engine([*_prefix(netns), *argv, *args], self.env())
        self.processes.append(engine)
        return engine

    def engine(self, name: str, *args: str) -> Engine:
        return self.start_engine(name, *args).wait_ready()

    def hosts(self, *vram: int, engine_args: tuple[str, ...] = ()) -> list[Node]:
        """One host per entry of ``vram`` (GiB), each before an engine named as the host."""
        engines = [self.start_engine(f"host{gib}", *engine_args) for gib in vram]
        nodes: list[Node] = []
        for gib, engine in zip(vram, engines, strict=True):
            service = f"llm={engine.wait_ready().address}"
            args = ("--vram", f"{gib}GiB", "--expose", service)
            nodes.append(
                self.start_node(f"host{gib}", *args, bootstrap=nodes[0] if nodes else None)
            )
            if len(nodes) == 1:
                nodes[0].wait_ready()
        return [node.wait_ready() for node in nodes]

    def entry(self, bootstrap: Node, *args: str, name: str = "laptop") -> Node:
        """A node with a proxy and no service of its own."""
        return self.node(name, "--proxy", "127.0.0.1:0", *args, bootstrap=bootstrap)

    def close(self) -> None:
        for process in self.processes:
            process.close()


class Backend:
    """A plain TCP service on a thread per connection, told what to do with each."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.connections = 0
        threading.Thread(target=self._accept_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept_forever(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(60)
            try:
                self._serve(connection)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the other side's clean end; ConnectionResetError at a cut."""
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def answer_with_hash(connection: socket.socket) -> None:
    """Read until the client half-closes, then answer with the SHA-256 of it all."""
    digest = hashlib.sha256()
    while piece := connection.recv(1 << 16):
        digest.update(piece)
    connection.sendall(digest.hexdigest().encode())
