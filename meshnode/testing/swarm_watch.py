"""What a swarm's ledgers did: who was found dead how soon, and who was taken for dead wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# Of a node that is back this soon, a peer may still find out that it was gone.
LATE_NEWS = 6.0  # seconds

LossKind = Literal["false", "late", "cut", "frozen"]


@dataclass(frozen=True, slots=True)
class Eviction:
    """A living node that another one took for gone. Times are seconds on the swarm's clock.

    ``false``: it was reachable, and nothing excuses it. ``cut``: the two could not reach each
    other. ``frozen``: one of them was stopped. ``late``: it had been dead a moment ago.
    """

    at: float
    observer: int
    target: int
    kind: LossKind
    reason: str


@dataclass(slots=True)
class Death:
    """One node's end, and how long each of the others took to notice."""

    number: int
    at: float
    leaving: bool  # it said goodbye
    waiting: set[int]
    detected_after: dict[int, float] = field(default_factory=dict)  # seconds, by observer


@dataclass(frozen=True, slots=True)
class Convergence:
    """How long each ledger took, after ``label`` happened, to be right and stay so."""

    label: str
    at: float
    complete: bool
    after: dict[int, float]  # seconds, by node


class Watch:
    """Follows every ledger of a swarm, change by change.

    Args:
        excuse: (observer, target, now) -> why the one need not see the other, or None.
    """

    def __init__(self, excuse: Callable[[int, int, float], LossKind | None]) -> None:
        self.evictions: list[Eviction] = []
        self.deaths: list[Death] = []
        self.convergences: list[Convergence] = []
        self._excuse = excuse
        self._dying: dict[int, Death] = {}

    @property
    def false_evictions(self) -> list[Eviction]:
        return [eviction for eviction in self.evictions if eviction.kind == "false"]

    def died(self, number: int, now: float, observers: set[int], *, leaving: bool) -> Death:
        """A node ended; ``observers`` live and had it online."""
        for death in self._dying.values():
            death.waiting.discard(number)
        death = Death(number, now, leaving, set(observers))
        self._dying[number] = death
        self.deaths.append(death)
        return death

    def returned(self, number: int) -> None:
        """A dead node runs again: whoever had not missed it by now never will."""
        if (death := self._dying.pop(number, None)) is not None:
            death.waiting.clear()

    def lost(self, observer: int, target: int, now: float, reason: str) -> None:
        """``observer`` took ``target`` out of its candidates."""
        death = self._dying.get(target)
        if death is not None:
            if observer in death.waiting:
                death.waiting.discard(observer)
                death.detected_after[observer] = now - death.at
            return
        kind = self._excuse(observer, target, now) or "false"
        self.evictions.append(Eviction(now, observer, target, kind, reason))

    def death_of(self, number: int) -> Death | None:
        return self._dying.get(number)
