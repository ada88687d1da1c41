"""The processes of the demo: nodes started as a user would start them, and always ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshnode.errors import MeshnodeError

# A node takes a second to start on an idle machine; four at once on two busy cores take longer.
READY_LIMIT = 30.0  # seconds
_END_LIMIT = 4.0  # seconds for a goodbye, before it is killed
_LINES_KEPT = 20


@dataclass(eq=False)
class DemoNode:
    """One ``meshnode up`` in a process of its own."""

    name: str
    process: trio.Process
    ready: trio.Event = field(default_factory=trio.Event)
    facts: dict[str, object] = field(default_factory=dict)  # its ready line
    stderr_ended: trio.Event = field(default_factory=trio.Event)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))

    @property
    def api(self) -> str:
        return str(self.facts["api"])

    @property
    def addr(self) -> str:
        addrs = self.facts["addrs"]
        assert isinstance(addrs, list)
        return str(addrs[0])

    async def read_stdout_forever(self) -> None:
        assert self.process.stdout is not None
        await _each_line(self.process.stdout, self._take_stdout)

    async def read_stderr_forever(self) -> None:
        assert self.process.stderr is not None
        await _each_line(self.process.stderr, self.last_lines.append)
        self.stderr_ended.set()

    def _take_stdout(self, line: str) -> None:
        facts = json.loads(line)
        if facts.get("event") == "ready":
            self.facts = facts
            self.ready.set()

    async def fail_when_it_ends(self) -> None:
        """Wait for its end, which is a failure while the demo runs.

        Raises:
            MeshnodeError: it ended; the text holds the last lines it logged.
        """
        code = await self.process.wait()
        with trio.move_on_after(1):  # what it logged last is still on its way
            await self.stderr_ended.wait()
        tail = "; ".join(list(self.last_lines)[-3:]) or "it logged nothing"
        raise MeshnodeError(f"the demo's node {self.name} ended with exit code {code}: {tail}")


class DemoMesh:
    """Starts nodes in a nursery, and ends every one of them with ``stop``."""

    def __init__(self, nursery: trio.Nursery, folder: Path, token: str) -> None:
        self._nursery = nursery
        self._folder = folder
        self._token = token
        self.nodes: list[DemoNode] = []

    async def start_node(
        self, name: str, flags: Sequence[str], on_ready: Callable[[DemoNode], None]
    ) -> DemoNode:
        """Start one node and wait until it is ready.

        Raises:
            MeshnodeError: it did not become ready in time.
        """
        process = await trio.lowlevel.open_process(
            [*_PROGRAM, *_COMMON, "--name", name, "--state-dir", self._state(name), *flags],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C reaches the demo alone, which then ends its nodes in order.
            start_new_session=True,
        )
        node = DemoNode(name, process)
        self.nodes.append(node)
        self._nursery.start_soon(node.read_stdout_forever)
        self._nursery.start_soon(node.read_stderr_forever)
        self._nursery.start_soon(node.fail_when_it_ends)
        with trio.move_on_after(READY_LIMIT):
            await node.ready.wait()
            on_ready(node)
            return node
        tail = "; ".join(node.last_lines) or "it logged nothing"
        raise MeshnodeError(f"the demo's node {name} was not ready in {READY_LIMIT:g} s: {tail}")

    async def stop(self) -> None:
        """End every process: asked first, killed after a limit. Shielded by itself."""
        with trio.CancelScope(shield=True):
            for node in self.nodes:
                if node.process.poll() is None:
                    node.process.terminate()
            with trio.move_on_after(_END_LIMIT):
                for node in self.nodes:
                    await node.process.wait()
            for node in self.nodes:
                if node.process.poll() is None:
                    node.process.kill()
                    await node.process.wait()
                for pipe in (node.process.stdout, node.process.stderr):
                    if pipe is not None:
                        await pipe.aclose()

    def _state(self, name: str) -> str:
        return str(self._folder / name)

    def _environment(self) -> dict[str, str]:
        # A user's own MESHNODE_* settings are for the user's node, not for these.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}
        kept.pop("STATE_DIRECTORY", None)
        return {**kept, "MESHNODE_TOKEN": self._token}


_PROGRAM = (sys.executable, "-m", "meshnode", "up")
_COMMON = (
    *("--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0", "--no-mdns"),
    *("--log-format", "json", "--log-level", "warning"),
)


async def _each_line(pipe: trio.abc.ReceiveStream, take: Callable[[str], None]) -> None:
    rest = b""
    async for data in pipe:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            take(line.decode(errors="replace"))
