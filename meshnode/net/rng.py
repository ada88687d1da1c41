"""The dice that this room is handed, so that a seeded swarm plays the same game twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Rng(Protocol):
    """The part of ``random.Random`` that is used here."""

    def random(self) -> float: ...

    def uniform(self, a: float, b: float) -> float: ...

    def choice(self, seq: Sequence[_T]) -> _T: ...

    def sample(self, population: Sequence[_T], k: int) -> list[_T]: ...

    def getrandbits(self, k: int) -> int: ...

    def randrange(self, start: int, /) -> int: ...
