"""A prefix cache that only pretends, and conversations that profit from one; pure.

An engine reads a prompt before its first token: at a fixed rate, one prompt after another, but
for the leading blocks that it has read before. As vLLM's automatic prefix caching, in blocks of
16 tokens and with the longest unused dropped first; a token is a word here.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BLOCK = 16  # tokens
# 48,000 tokens: what Llama 3 8B leaves of 24 GB, at 128 KiB a token in 16 bits.
MAX_BLOCKS = 3000


class PrefixCache:
    """The blocks of prompts that one engine has read.

    Args:
        max_blocks: how many it keeps, of all models together.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._blocks)

    def cached(self, model: str, tokens: Sequence[str]) -> int:
        """Return how many leading tokens need not be read again; whole blocks only."""
        count = 0
        for block in _chain(model, tokens):
            if block not in self._blocks:
                break
            count += BLOCK
        return count

    def keep(self, model: str, tokens: Sequence[str]) -> None:
        """Take in what has been read, or written as an answer."""
        # The deepest block is the first to go: without those before it, it is of no use.
        for block in reversed(list(_chain(model, tokens))):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)


def _chain(model: str, tokens: Sequence[str]) -> Iterator[int]:
    """Yield a hash per whole block that covers all before it too; of this process only."""
    previous = hash(model)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        previous = hash((previous, *tokens[start : start + BLOCK]))
        yield previous


@dataclass(frozen=True)
class Talk:
    """How long the conversations of a simulation are."""

    instructions: int = 40  # words, the same in all
    document: int = 1000  # words, which the first question brings along
    question: int = 40  # words
    turns: int = 6
    start_within: float = 8.0  # seconds in which they all begin
    think: tuple[float, float] = (2.0, 7.0)  # seconds from an answer to the next question


@dataclass
class Conversation:
    """One user's turns; each sends all that was said so far, as chat clients do."""

    talk: Talk
    rng: random.Random
    messages: list[dict[str, str]] = field(default_factory=list)
    asked: int = 0

    def ask(self) -> list[dict[str, str]]:
        """Return the messages of the next turn."""
        if not self.messages:
            shared = random.Random(0)
            self._add("system", _words(shared, self.talk.instructions))
            self._add("user", _words(self.rng, self.talk.document + self.talk.question))
        else:
            self._add("user", _words(self.rng, self.talk.question))
        self.asked += 1
        return self.messages

    def answered(self, text: str) -> None:
        self._add("assistant", text)

    @property
    def is_over(self) -> bool:
        return self.asked >= self.talk.turns

    def pause(self) -> float:
        """Return the seconds until its next question, or until its first."""
        if not self.asked:
            return self.rng.uniform(0, self.talk.start_within)
        return self.rng.uniform(*self.talk.think)

    def _add(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})


def _words(rng: random.Random, count: int) -> str:
    return " ".join(f"{rng.randrange(16**5):05x}" for _ in range(count))
