"""What a chaos run knows of its hosts, and whether a failure that a client was told was true."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

Kind = Literal["kill", "stop", "terminate", "engine"]
KINDS: tuple[Kind, ...] = ("kill", "stop", "terminate", "engine")
# The faults after which an answer that has begun can't go on. A host that is told to terminate
# finishes what it serves.
_CUTS: frozenset[Kind] = frozenset({"kill", "stop", "engine"})
_TRIED = re.compile(r"(\d+) of the peers were tried")


@dataclass(frozen=True)
class Fault:
    """One that is to come; times in seconds from the beginning of the run."""

    at: float
    host: str
    kind: Kind
    lasts: float  # until the host is started again or goes on


def plan(rng: Random, hosts: Sequence[str], *, minutes: float, every: float) -> list[Fault]:
    """Return the faults of a run, about one in ``every`` seconds, the last ones half a minute
    before its end or at half of it, whichever is later, so that the mesh is seen to recover.
    """
    end = max(minutes * 60 - 30, minutes * 30)
    faults: list[Fault] = []
    at = every / 2
    while at < end:
        kind = rng.choice(KINDS)
        faults.append(Fault(at, rng.choice(hosts), kind, rng.uniform(0.5, 9.0)))
        at += rng.expovariate(1 / every)
    return faults


@dataclass
class Trouble:
    """A fault that happened; ``until`` is when the entries knew the host to be well again."""

    host: str
    kind: Kind
    since: float
    until: float = float("inf")

    def touches(self, began: float, ended: float) -> bool:
        return self.since <= ended and self.until >= began


Outcome = Literal["served", "cut", "status", "disconnected", "timeout", "wrong"]


@dataclass(frozen=True)
class Request:
    """How one request went, as its client saw it."""

    entry: str
    began: float  # seconds, on the clock of the troubles
    ended: float
    stream: bool
    outcome: Outcome
    host: str | None = None  # who answered, if a head came
    status: int | None = None
    error: str = ""  # in the words that the client was given

    @property
    def reason(self) -> str:
        return f"{self.outcome} {self.status}" if self.outcome == "status" else self.outcome


@dataclass
class Timeline:
    """All troubles of a run."""

    hosts: tuple[str, ...]
    troubles: list[Trouble] = field(default_factory=list)

    def untruth(self, request: Request) -> str | None:
        """Return why what the client was told is not true; None if it is."""
        touching = [
            trouble
            for trouble in list(self.troubles)
            if trouble.touches(request.began, request.ended)
        ]
        troubled = {trouble.host for trouble in touching}
        match request.outcome:
            case "served":
                return None
            case "cut":
                if request.host is None:
                    return "cut, though no answer had begun"
                if any(t.host == request.host and t.kind in _CUTS for t in touching):
                    return None
                return f"cut, though nothing had happened to {request.host}"
            case "status" if request.status == 503:
                well = set(self.hosts) - troubled
                if well:
                    return f"told that nobody can serve, though {', '.join(sorted(well))} could"
                return None
            case "status" if request.status == 502:
                tried = _TRIED.search(request.error)
                if tried is not None and int(tried[1]) <= len(troubled):
                    return None
                return f"told that peers had failed; only {sorted(troubled)} were in trouble"
            case "status":
                return "an answer that no part of this run gives"
            case "disconnected":
                return "no answer, and the entry point lived"
            case "timeout":
                return "no answer in time"
            case "wrong":
                return "the answer is not what its engine says"
