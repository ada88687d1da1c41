"""What ``meshnode demo`` does: a mesh of real processes, one chat, then eight at once.

It asserts what it shows: the demo fails if an idle mesh does not answer from the node with the
most free VRAM, or if eight at once don't spread over all three.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from meshnode.cli.api_client import Api, ask
from meshnode.cli.demo_mesh import DemoMesh, DemoNode
from meshnode.cli.output import console, print_json, table
from meshnode.cli.queries import CANDIDATE_COLUMNS, candidate_rows, maps, why
from meshnode.cli.running import first_mesh_error, run_until_signalled
from meshnode.core.token import encode, new_token
from meshnode.errors import MeshnodeError
from meshnode.testing.engine import EngineOptions, serve_engine
from meshnode.values import parse_host_port

GIB = 2**30
SIZES = (8, 16, 24)  # GiB that the three nodes pretend
AT_ONCE = 8
_SERVICE = "llm"
_MODEL = "demo-model"
# Slow enough that eight at once are in flight together, and that streaming can be seen.
_TOKENS_PER_SECOND = 25.0
_WORDS = 24
_JOIN_LIMIT = 15.0  # seconds until the proxy knows all three
_ANSWER_LIMIT = 15.0  # seconds
_POLL = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Served:
    """One answer: which engine gave it, and what it said."""

    engine: str
    text: str
    seconds: float


def run_demo(*, once: bool, as_json: bool) -> int:
    """Run the demo; return the exit code.

    Raises:
        MeshnodeError: a node did not start or died, or the mesh did not do what it promises.
    """
    demo = _Demo(once=once, as_json=as_json)
    try:
        return trio.run(run_until_signalled, demo.run)
    except BaseExceptionGroup as group:
        error = first_mesh_error(group)
        if error is None:
            raise
        raise error from group


class _Demo:
    def __init__(self, *, once: bool, as_json: bool) -> None:
        self._once = once
        self._as_json = as_json
        # With --json stdout is for the one object at the end.
        self._console = console(sys.stderr if as_json else sys.stdout)

    async def run(self) -> None:
        token = encode(new_token("demo", (), secrets.token_bytes(32)))
        with tempfile.TemporaryDirectory(prefix="meshnode-demo-") as folder:
            async with trio.open_nursery() as nursery:
                mesh = DemoMesh(nursery, Path(folder), token)
                try:
                    await self._show(mesh, nursery)
                finally:
                    nursery.cancel_scope.cancel()
                    await mesh.stop()

    async def _show(self, mesh: DemoMesh, nursery: trio.Nursery) -> None:
        started = trio.current_time()
        self._say("Starting three nodes that pretend 8, 16 and 24 GiB, and one with the proxy …")
        proxy = await self._start(mesh, nursery)
        await self._wait_for_all(proxy)
        self._say(f"The mesh stands after {trio.current_time() - started:.1f} s.\n")
        first, decision = await self._chat_once(proxy)
        spread = await self._chat_at_once(proxy)
        if self._as_json:
            print_json(_result(proxy, first, decision, spread, trio.current_time() - started))
        _check(first, spread)
        if not self._once:
            self._tell_how_to_go_on(proxy)
            await trio.sleep_forever()

    async def _start(self, mesh: DemoMesh, nursery: trio.Nursery) -> DemoNode:
        """Start three engines, then the node to begin with, then the others side by side."""
        flags: dict[str, list[str]] = {}
        for size in SIZES:
            name = f"gpu-{size}"
            options = EngineOptions(
                name=name,
                models=(_MODEL,),
                vram=size * GIB,
                tokens=_WORDS,
                tokens_per_second=_TOKENS_PER_SECOND,
            )
            host, port = await nursery.start(serve_engine, options)
            flags[name] = ["--expose", f"{_SERVICE}={host}:{port}", "--vram", f"{size}GiB"]
        flags["laptop"] = ["--proxy", "127.0.0.1:0"]
        names = list(flags)
        bootstrap = await mesh.start_node(names[0], flags[names[0]], self._tell_ready)
        async with trio.open_nursery() as starting:
            for name in names[1:]:
                joined = [*flags[name], "--bootstrap", bootstrap.addr]
                starting.start_soon(mesh.start_node, name, joined, self._tell_ready)
        return next(node for node in mesh.nodes if node.name == "laptop")

    async def _wait_for_all(self, proxy: DemoNode) -> None:
        with trio.move_on_after(_JOIN_LIMIT):
            while True:
                peers = maps((await _ask(proxy, "/api/peers"))["peers"])
                if sum(map(can_be_picked, peers)) == len(SIZES):
                    return
                await trio.sleep(_POLL)
        raise MeshnodeError(f"the proxy did not find all three nodes in {_JOIN_LIMIT:g} s")

    async def _chat_once(self, proxy: DemoNode) -> tuple[Served, Mapping[str, object]]:
        self._say(f"[bold]One chat[/bold] through http://{proxy.facts['proxy']}/v1, streamed:")
        served = await _chat(proxy, "Who are you?", self._write)
        self._write("\n")
        decision = maps((await _ask(proxy, "/api/decisions"))["decisions"])[0]
        self._say(f"[green]Served by {served.engine}[/green]. Picked: {why(decision)}.")
        self._console.print(table(CANDIDATE_COLUMNS, candidate_rows(decision)))
        return served, decision

    async def _chat_at_once(self, proxy: DemoNode) -> list[Served]:
        self._say(f"\n[bold]{AT_ONCE} at once[/bold]:")
        answers: list[Served] = []

        async def one(number: int) -> None:
            answers.append(await _chat(proxy, f"Request {number}", _ignore))

        async with trio.open_nursery() as nursery:
            for number in range(AT_ONCE):
                nursery.start_soon(one, number)
        counts = Counter(answer.engine for answer in answers)
        rows = [
            (f"gpu-{size}", f"{size} GiB", counts[f"gpu-{size}"], "█" * counts[f"gpu-{size}"])
            for size in reversed(SIZES)
        ]
        self._console.print(table(("NODE", ">FREE VRAM", ">REQUESTS", ""), rows))
        return answers

    def _tell_how_to_go_on(self, proxy: DemoNode) -> None:
        url = f"http://{proxy.facts['proxy']}/v1"
        body = json.dumps(_request("Hello", stream=True))
        for line in (
            "\nThe mesh stays up until Ctrl-C. Try:",
            f"  curl -N {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            f"  meshnode peers --api {proxy.api}",
            f"  meshnode explain --api {proxy.api}",
        ):
            self._console.print(line, soft_wrap=True, markup=False)

    def _tell_ready(self, node: DemoNode) -> None:
        self._say(f"  {node.name} is up")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def can_be_picked(peer: Mapping[str, object]) -> bool:
    """Whether the proxy knows all of a peer that routing goes by.

    A node is announced before its engine was asked for its models, and until then one that is
    known to have the model goes before it.
    """
    models = [service["models"] for service in maps(peer["services"])]
    return bool(peer["online"] and peer["connected"] and [_MODEL] in models)


async def _ask(node: DemoNode, path: str) -> dict[str, object]:
    api = Api(parse_host_port(node.api))
    return await trio.to_thread.run_sync(ask, api, path, abandon_on_cancel=True)


async def _chat(proxy: DemoNode, prompt: str, on_text: Callable[[str], None]) -> Served:
    def show(text: str) -> None:
        trio.from_thread.run_sync(on_text, text)

    chat = partial(_stream_chat, str(proxy.facts["proxy"]), prompt, show)
    started = trio.current_time()
    engine, text = await trio.to_thread.run_sync(chat, abandon_on_cancel=True)
    return Served(engine, text, trio.current_time() - started)


def _stream_chat(address: str, prompt: str, show: Callable[[str], None]) -> tuple[str, str]:
    """Stream one chat in this thread, as any OpenAI client does; return (engine, text)."""
    import http.client

    at = parse_host_port(address)
    connection = http.client.HTTPConnection(at.host, at.port, timeout=_ANSWER_LIMIT)
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(_request(prompt, stream=True)),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        if response.status != 200:
            raise MeshnodeError(f"the proxy answered {response.status}: {response.read(300)!r}")
        engine = response.getheader("x-engine") or "unknown"
        return engine, _read_events(response, show)
    except (OSError, http.client.HTTPException) as exc:
        raise MeshnodeError(f"the chat through the proxy failed: {exc!r}") from exc
    finally:
        connection.close()


def _read_events(lines: Iterable[bytes], show: Callable[[str], None]) -> str:
    text = ""
    for line in lines:
        data = line.strip().removeprefix(b"data: ")
        if not data:
            continue
        if data == b"[DONE]":
            return text
        for choice in json.loads(data)["choices"]:
            piece = choice["delta"].get("content") or ""
            text += piece
            show(piece)
    raise MeshnodeError("the streamed answer ended before its [DONE]")


def _request(prompt: str, *, stream: bool) -> dict[str, object]:
    message = {"role": "user", "content": prompt}
    return {"model": _MODEL, "messages": [message], "stream": stream}


def _ignore(text: str) -> None:
    """Of eight answers at once none can be read."""


def _check(first: Served, spread: list[Served]) -> None:
    biggest = f"gpu-{max(SIZES)}"
    if first.engine != biggest:
        raise MeshnodeError(f"an idle mesh answered from {first.engine}, not from {biggest}")
    used = {answer.engine for answer in spread}
    if len(used) != len(SIZES):
        raise MeshnodeError(f"{AT_ONCE} at once reached only {', '.join(sorted(used))}")


def _result(
    proxy: DemoNode,
    first: Served,
    decision: Mapping[str, object],
    spread: list[Served],
    seconds: float,
) -> dict[str, object]:
    counts = Counter(answer.engine for answer in spread)
    return {
        "schema_version": 1,
        "proxy": proxy.facts["proxy"],
        "first": {
            "served_by": first.engine,
            "text": first.text,
            "seconds": round(first.seconds, 3),
            "tier": decision.get("tier"),
            "decision": decision,
        },
        "at_once": {"requests": len(spread), "served_by": dict(sorted(counts.items()))},
        "seconds": round(seconds, 3),
    }
