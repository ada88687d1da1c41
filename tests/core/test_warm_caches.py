"""What prefix affinity is for: conversations get their first token sooner, on a virtual clock.

The choices are the router's own; the engines read a prompt at a fixed rate, one after another,
but for the blocks that they have cached (``testing/prefill``). ``scripts/bench_prefix.py``
measures the same with real processes.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from statistics import median

import pytest

from meshnode.core.ledger import Ledger
from meshnode.core.model_router import Affinity, ModelRequest, ModelRouter
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.core.openai_request import parse_request
from meshnode.core.router import Router
from meshnode.testing.prefill import Conversation, PrefixCache, Talk

HOSTS = ("a", "b", "c", "d")
CONVERSATIONS = 50
READ_RATE = 3000.0  # tokens a second, of prompts
WRITE_RATE = 100.0  # of answers
ANSWER = "this is what an engine says " * 4


@dataclass
class SimulatedEngine:
    """Reads one prompt after another, and remembers what it read and wrote."""

    cache: PrefixCache = field(default_factory=PrefixCache)
    idle_at: float = 0.0  # seconds

    def read(self, tokens: list[str], now: float) -> float:
        """Return when the first token comes."""
        lacking = len(tokens) - self.cache.cached("m", tokens)
        self.cache.keep("m", tokens)
        self.idle_at = max(now, self.idle_at) + lacking / READ_RATE
        return self.idle_at


class Simulation:
    """Conversations with four hosts through one entry point."""

    def __init__(self, affinity: Affinity, policy: str, seed: int) -> None:
        self.now = 0.0  # seconds
        self.waits: list[float] = []  # seconds to each first token
        self.served: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._engines = {host: SimulatedEngine() for host in HOSTS}
        self._ledger = Ledger("self")
        rng = random.Random(seed)
        router = Router(self._ledger, self_id="self", policy=policy, rng=rng)
        self._router = ModelRouter(router, self._ledger, rng=rng, affinity=affinity)
        self._announce()
        for number in range(CONVERSATIONS):
            one = Conversation(Talk(), random.Random(f"{seed} {number}"))
            self._after(one.pause(), lambda one=one: self._ask(one))

    def run(self) -> None:
        while len(self.waits) < CONVERSATIONS * Talk().turns:
            self.now, _, event = heappop(self._events)
            event()

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._events, (self.now + seconds, self._serial, event))

    def _announce(self) -> None:
        service = ServiceData(service_id="llm", models=("m",), loaded=("m",))
        self._serial += 1
        for host in HOSTS:
            node = NodeData(id=host, services=(service,), available_vram=2**34, seq=self._serial)
            self._ledger.observe(node, now=self.now)
        self._after(2.0, self._announce)

    def _ask(self, one: Conversation) -> None:
        messages = one.ask()
        body = json.dumps({"model": "m", "messages": messages}).encode()
        asked = parse_request("POST", "/v1/chat/completions", "application/json", body)
        lease = self._router.lease(ModelRequest(self.now, asked.model, asked.prompt))
        self.served[lease.peer_id] += 1
        engine = self._engines[lease.peer_id]
        tokens = " ".join(message["content"] for message in messages).split()
        first = engine.read(tokens, self.now)
        self.waits.append(first - self.now)

        def answer() -> None:
            engine.cache.keep("m", [*tokens, *ANSWER.split()])
            one.answered(ANSWER)
            lease.release()
            if not one.is_over:
                self._after(one.pause(), lambda: self._ask(one))

        self._after(first - self.now + len(ANSWER.split()) / WRITE_RATE, answer)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_conversations_get_their_first_token_twice_as_soon_and_no_host_is_crowded(seed) -> None:
    warm, rotated = Simulation("prefix", "vram", seed), Simulation("off", "rotate", seed)
    for simulation in (warm, rotated):
        simulation.run()
    assert median(rotated.waits) >= 2 * median(warm.waits)
    # First turns are cold for everybody, and load drives some off their warm host.
    assert sum(rotated.waits) >= 1.5 * sum(warm.waits)
    for simulation in (warm, rotated):
        mean = sum(simulation.served.values()) / len(HOSTS)
        assert max(simulation.served.values()) <= 1.3 * mean
