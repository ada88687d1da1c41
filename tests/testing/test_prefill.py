"""The prefix cache that the built-in engine pretends to have."""

from __future__ import annotations

import random

import httpx
import trio

from meshnode.testing.engine import Engine, EngineOptions
from meshnode.testing.prefill import BLOCK, Conversation, PrefixCache, Talk

WORDS = [str(number) for number in range(10 * BLOCK)]


def test_only_whole_leading_blocks_of_the_same_model_are_cached() -> None:
    cache = PrefixCache()
    assert cache.cached("m", WORDS) == 0
    cache.keep("m", WORDS[: 3 * BLOCK + 5])
    assert cache.cached("m", WORDS) == 3 * BLOCK
    assert cache.cached("m", WORDS[: BLOCK - 1]) == 0
    assert cache.cached("m", ["other", *WORDS]) == cache.cached("other", WORDS) == 0


def test_the_longest_unused_blocks_make_room_and_the_deepest_of_them_first() -> None:
    cache = PrefixCache(max_blocks=4)
    cache.keep("m", WORDS)
    assert len(cache) == 4 and cache.cached("m", WORDS) == 4 * BLOCK
    cache.keep("other", WORDS[:BLOCK])
    assert len(cache) == 4 and cache.cached("m", WORDS) == 3 * BLOCK


async def test_the_first_token_takes_as_long_as_what_is_not_cached(autojump_clock) -> None:
    engine = Engine(EngineOptions(prefill_tokens_per_second=100))
    began = trio.current_time()
    await engine.read("m", WORDS)
    assert trio.current_time() - began == 1.6
    await engine.read("m", [*WORDS, *WORDS[:5]])
    assert round(trio.current_time() - began, 6) == 1.65
    assert (engine.stats.prompt_tokens, engine.stats.cached_tokens) == (325, 160)


async def test_two_prompts_at_once_are_read_one_after_the_other(autojump_clock) -> None:
    engine = Engine(EngineOptions(prefill_tokens_per_second=100))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.read, "m", WORDS)
        nursery.start_soon(engine.read, "other", WORDS)
    assert trio.current_time() - began == 3.2


async def test_a_prompt_whose_reader_left_is_not_cached_and_holds_up_nobody(autojump_clock) -> None:
    engine = Engine(EngineOptions(prefill_tokens_per_second=100))
    with trio.move_on_after(1):
        await engine.read("m", WORDS)
    began = trio.current_time()
    await engine.read("m", WORDS)
    assert trio.current_time() - began == 1.6


def test_the_next_turn_finds_the_last_ones_answer_cached_too(start_engine) -> None:
    url = start_engine(
        "--prefill-tokens-per-second", "100000", "--tokens", "24", "--tokens-per-second", "0"
    )
    one = Conversation(Talk(instructions=16, document=48, question=16), random.Random(1))
    for _ in range(2):
        body = {"model": "demo-model", "messages": one.ask()}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20).json()
        one.answered(answer["choices"][0]["message"]["content"])
    stats = httpx.get(f"{url}/stats").json()
    # 80 words at first; then those, 24 of an answer and 16 more, and of 104 six whole blocks.
    assert (stats["prompt_tokens"], stats["cached_tokens"]) == (80 + 120, 6 * BLOCK)
