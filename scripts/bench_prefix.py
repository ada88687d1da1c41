"""Time to first token of conversations with four hosts: warm caches found again, or round robin.

50 conversations of six turns through one gateway, first of a node with ``--affinity off --policy
rotate``, then of one with ``--affinity prefix``. Engines and nodes are real processes; the
engines pretend to read prompts, but for what they have cached (``meshnode/testing/prefill.py``).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import httpx
import trio
from bench_gateway import READY_LIMIT, child, node
from rich.console import Console
from rich.table import Table

from meshnode.testing.prefill import BLOCK, MAX_BLOCKS, Conversation, Talk

HOSTS = 4
CONVERSATIONS = 50
MODEL = "bench"
# Slow, so that what two cores make all these processes wait is little beside it.
READ_RATE = 3000  # tokens a second, of prompts
WRITE_RATE = 100  # tokens a second, of answers
ANSWER_LENGTH = 16  # tokens
PATIENCE = 60.0  # seconds, of one turn
TALK = Talk()
TIMES_FASTER = 2.0  # at least, the median first token, beside round robin
MAX_OVER_MEAN = 1.3  # at most, the busiest host's requests over the mean
WAYS = {
    "round robin": ("--affinity", "off", "--policy", "rotate"),
    "prefix": ("--affinity", "prefix"),
}


@dataclass(frozen=True)
class Result:
    """What one way of choosing came to."""

    requests: int
    median_ms: float  # to the first token
    mean_ms: float
    p99_ms: float
    max_over_mean: float  # requests of the busiest host
    cached: float  # the part of all prompts' tokens that the engines had cached

    @classmethod
    def of(cls, waits: list[float], served: Counter[str], cached: float) -> Result:
        return cls(
            requests=len(waits),
            median_ms=statistics.median(waits) * 1000,
            mean_ms=statistics.fmean(waits) * 1000,
            p99_ms=statistics.quantiles(waits, n=100)[98] * 1000,
            max_over_mean=max(served.values()) * HOSTS / len(waits),
            cached=cached,
        )


class Talking:
    """All conversations with one gateway."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.waits: list[float] = []  # seconds to each first token
        self.served: Counter[str] = Counter()  # by engine

    async def talk(self, one: Conversation) -> None:
        while not one.is_over:
            await trio.sleep(one.pause())
            with trio.fail_after(PATIENCE):
                one.answered(await self._ask(one.ask()))

    async def _ask(self, messages: list[dict[str, str]]) -> str:
        body = {"model": MODEL, "messages": messages, "stream": True}
        text = ""
        began = time.perf_counter()
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            self.served[answer.headers["x-engine"]] += 1
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                if not text:
                    self.waits.append(time.perf_counter() - began)
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text


class Tokens:
    """How many tokens of prompts the engines were sent since, and how many were cached."""

    def __init__(self, engines: list[str]) -> None:
        self._engines = engines
        self._before = self._told()

    def cached(self) -> float:
        prompt, cached = (now - then for now, then in zip(self._told(), self._before, strict=True))
        return cached / prompt

    def _told(self) -> tuple[int, int]:
        stats = [httpx.get(f"http://{engine}/stats").json() for engine in self._engines]
        return sum(s["prompt_tokens"] for s in stats), sum(s["cached_tokens"] for s in stats)


async def converse(proxy: str, seed: str) -> Talking:
    limits = httpx.Limits(max_connections=None)
    url = f"http://{proxy}"
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE) as client:
        talking = Talking(client)
        async with trio.open_nursery() as nursery:
            for number in range(CONVERSATIONS):
                one = Conversation(TALK, random.Random(f"{seed} {number}"))
                nursery.start_soon(talking.talk, one)
    return talking


def wait_for_hosts(proxy: str) -> None:
    deadline = time.monotonic() + READY_LIMIT
    while True:
        try:
            with urllib.request.urlopen(f"http://{proxy}/v1/models", timeout=5) as answer:
                models = json.load(answer)["data"]
            if models and models[0]["meshnode"]["peers_total"] == HOSTS:
                return
        except OSError:
            pass  # it says so below, once its time is up
        if time.monotonic() > deadline:
            raise SystemExit("the entry nodes did not find the hosts in time")
        time.sleep(0.1)


def start_mesh(stack: ExitStack) -> tuple[list[str], dict[str, str]]:
    """Start engines, hosts and an entry node for each way; return engines and gateways."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    new_token = [sys.executable, "-m", "meshnode", "token", "new", "--network", "bench"]
    token = subprocess.run(new_token, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    bootstrap: tuple[str, ...] = ()
    engines = []
    for number in range(HOSTS):
        argv = [sys.executable, "-m", "meshnode.testing.engine", "--name", f"engine{number}"]
        argv += ["--model", MODEL, "--tokens", str(ANSWER_LENGTH)]
        argv += ["--tokens-per-second", str(WRITE_RATE)]
        argv += ["--prefill-tokens-per-second", str(READ_RATE)]
        engine = stack.enter_context(child(argv))
        engines.append(f"{engine['host']}:{engine['port']}")
        exposed = ("--expose", f"llm={engines[-1]}")
        argv, env = node(folder, token, f"host{number}", *exposed, *bootstrap)
        host = stack.enter_context(child(argv, **env))
        bootstrap = bootstrap or ("--bootstrap", host["addrs"][0])
    gateways = {}
    for number, (way, flags) in enumerate(WAYS.items()):
        proxy = ("--proxy", "127.0.0.1:0")
        argv, env = node(folder, token, f"entry{number}", *proxy, *flags, *bootstrap)
        gateways[way] = stack.enter_context(child(argv, **env))["proxy"]
    for gateway in gateways.values():
        wait_for_hosts(gateway)
    return engines, gateways


def measure() -> dict[str, Result]:
    with ExitStack() as stack:
        engines, gateways = start_mesh(stack)
        results = {}
        for way, proxy in gateways.items():
            tokens = Tokens(engines)
            # Other words in each, so that neither finds what the other left in the caches.
            talking = trio.run(converse, proxy, way)
            results[way] = Result.of(talking.waits, talking.served, tokens.cached())
        return results


def parameters() -> dict[str, float]:
    """Return what is simulated; a token is a word."""
    first = TALK.instructions + TALK.document + TALK.question
    return {
        "hosts": HOSTS,
        "sessions": CONVERSATIONS,
        "turns": TALK.turns,
        "first_prompt_tokens": first,
        "last_prompt_tokens": first + (TALK.turns - 1) * (TALK.question + ANSWER_LENGTH),
        "prefill_tokens_per_second": READ_RATE,
        "answer_tokens": ANSWER_LENGTH,
        "answer_tokens_per_second": WRITE_RATE,
        "cache_tokens_per_host": MAX_BLOCKS * BLOCK,
        "block_tokens": BLOCK,
        "think_seconds_from": TALK.think[0],
        "think_seconds_to": TALK.think[1],
    }


def judge(rotated: Result, warm: Result) -> list[dict[str, object]]:
    """Return the targets, each with what was measured and whether that meets it."""
    faster = rotated.median_ms / warm.median_ms
    busiest = warm.max_over_mean
    rows = [
        ("median first token sooner than round robin, times", faster, "≥", TIMES_FASTER, True),
        ("requests of the busiest host over the mean", busiest, "≤", MAX_OVER_MEAN, False),
    ]
    return [
        {
            "what": what,
            "measured": measured,
            "target": f"{sign} {limit:g}",
            "met": measured >= limit if is_floor else measured <= limit,
        }
        for what, measured, sign, limit, is_floor in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench prefix", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args()
    with Console(stderr=True).status(f"{CONVERSATIONS} conversations, twice"):
        results = measure()
    rotated, warm = results["round robin"], results["prefix"]
    times_faster = rotated.median_ms / warm.median_ms
    targets = judge(rotated, warm)
    if options.json:
        told = {
            "schema_version": 1,
            "parameters": parameters(),
            "targets": targets,
            "times_faster": times_faster,
            "ways": {way: asdict(result) for way, result in results.items()},
        }
        print(json.dumps(told))
        return
    out = Console()
    said = (f"{name.replace('_', ' ')} {value:,g}" for name, value in parameters().items())
    out.print(", ".join(said), soft_wrap=True)
    table = Table(title=f"time to first token, {CONVERSATIONS} conversations with {HOSTS} hosts")
    for column in ("", "requests", "median", "mean", "p99", "cached", "busiest/mean"):
        table.add_column(column, justify="right" if column else "left")
    for way, row in results.items():
        figures = (f"{value:,.1f} ms" for value in (row.median_ms, row.mean_ms, row.p99_ms))
        others = (f"{row.cached:.0%}", f"{row.max_over_mean:.2f}")
        table.add_row(way, str(row.requests), *figures, *others)
    out.print(table)
    for each in targets:
        verdict = "met" if each["met"] else "MISS"
        measured = f"{each['measured']:.2f}, target {each['target']}"
        out.print(f"{each['what']}: {measured}: {verdict}", soft_wrap=True)
    out.print(f"mean first token sooner, times: {rotated.mean_ms / warm.mean_ms:.2f}")


if __name__ == "__main__":
    main()
