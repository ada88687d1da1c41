"""What the tests of the fault matrix share: figures, a client that never retries, hosts alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import httpx
import openai
import pytest

from support.cluster import Cluster, Node, eventually
from support.openai_client import open_client


@dataclass(frozen=True)
class Figure:
    what: str
    value: float
    unit: str
    limit: float | None = None
    is_floor: bool = False  # the value must not be below the limit, instead of above it

    @property
    def is_met(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_floor else self.value <= self.limit


class Figures:
    """Notes what was measured for the summary, and holds it to its limit."""

    def __init__(self, node: pytest.Item, slack: float) -> None:
        self._node = node
        self._slack = slack

    @property
    def is_strict(self) -> bool:
        return self._slack == 1.0

    def note(self, what: str, value: float, unit: str) -> None:
        self._keep(Figure(what, value, unit))

    def at_most(self, what: str, value: float, limit: float, unit: str) -> None:
        self._keep(Figure(what, value, unit, limit))
        slack = self._slack if unit in ("s", "ms") else 1.0
        assert value <= limit * slack, f"{what}: {value:g} {unit}, limit {limit:g}"

    def compare(self, what: str, value: float, limit: float, unit: str) -> None:
        """Hold what only a quiet machine can keep: the limit counts where figures are strict."""
        self._keep(Figure(what, value, unit, limit))
        assert value <= limit or not self.is_strict, f"{what}: {value:g} {unit}, limit {limit:g}"

    def at_least(self, what: str, value: float, limit: float, unit: str) -> None:
        self._keep(Figure(what, value, unit, limit, is_floor=True))
        assert value >= limit, f"{what}: {value:g} {unit}, limit {limit:g}"

    def _keep(self, figure: Figure) -> None:
        told = asdict(figure) | {"is_met": figure.is_met}
        self._node.user_properties.append(("figure", told))


@dataclass(frozen=True)
class Asked:
    """How one request went."""

    text: str | None  # the whole answer, or None
    error: Exception | None
    took: float  # seconds
    words: int = 0  # that came, of a failed one too


class Client:
    """The official client at one entry point; a request that fails is seen to fail."""

    def __init__(self, entry: Node, *, model: str = "demo-model") -> None:
        self._entry = entry
        self._model = model

    def open(self) -> openai.OpenAI:
        return open_client(self._entry.base_url, timeout=60)

    def ask(self, text: str = "hello", *, max_tokens: int = 4) -> Asked:
        began = monotonic()
        words: list[str] = []
        try:
            with (
                self.open() as client,
                client.chat.completions.create(
                    model=self._model,
                    messages=[{"role": "user", "content": text}],
                    max_tokens=max_tokens,
                    stream=True,
                ) as stream,
            ):
                words.extend(c.choices[0].delta.content or "" for c in stream if c.choices)
        except (openai.OpenAIError, httpx.HTTPError) as exc:
            return Asked(None, exc, monotonic() - began, len(words))
        return Asked("".join(words), None, monotonic() - began, len(words))

    def stream(self, text: str = "hello", *, max_tokens: int = 1000) -> Any:
        """Begin a long answer; closes with its block."""
        client = self.open()
        return client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": text}],
            max_tokens=max_tokens,
            stream=True,
        )

    def ask_many(self, count: int, at_once: int = 8) -> list[Asked]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda number: self.ask(f"number {number}"), range(count)))


def failures(asked: list[Asked]) -> list[str]:
    return [repr(one.error) for one in asked if one.error is not None]


def wait_for(node: Node, *names: str, within: float = 20) -> None:
    eventually(lambda: node.online() >= set(names), within=within)


def by_peer_id(nodes: list[Node], peer_id: str) -> Node:
    return next(node for node in nodes if node.peer_id == peer_id)


def start_hosts(
    cluster: Cluster, count: int, *engine_args: str, engines: int | None = None
) -> list[Node]:
    """Equal hosts host0, host1, ... of one bootstrap, each with an engine of its own.

    With ``engines``, hosts share that many: where only nodes die, fewer processes do.
    """
    started = [
        cluster.start_engine(f"host{number}", *engine_args) for number in range(engines or count)
    ]
    nodes: list[Node] = []
    for number in range(count):
        service = f"llm={started[number % len(started)].wait_ready().address}"
        first = nodes[0] if nodes else None
        nodes.append(
            cluster.start_node(
                f"host{number}", "--vram", "24GiB", "--expose", service, bootstrap=first
            )
        )
        if number == 0:
            nodes[0].wait_ready()
    return [node.wait_ready() for node in nodes]
