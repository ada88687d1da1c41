"""What shall happen to a swarm when: a script of kills, restarts, cuts, stops and skewed clocks.

A step says whom, when, and where it fits for how long: ``WHO@SECONDS[+SECONDS]``. WHO is a count
(``3``), a share (``10%``), one node by its number (``#7``) or ``all``; of whom the action allows
(``restart`` the dead, the others the living, node 0 only by its number), by the swarm's dice.
Seconds count from the moment when the swarm first converged.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import trio

from meshnode.errors import ConfigError
from meshnode.testing.swarm import Swarm

Action: TypeAlias = Literal["kill", "stop", "restart", "cut", "freeze", "skew"]

_STEP = re.compile(
    r"(?P<who>all|#?\d+|\d+(?:\.\d+)?%)"
    r"(?::(?P<seconds>[+-]?\d+(?:\.\d+)?))?"
    r"@(?P<at>\d+(?:\.\d+)?)"
    r"(?:\+(?P<lasts>\d+(?:\.\d+)?))?"
)
_FORMS: dict[Action, str] = {
    "kill": "WHO@AT, e.g. 10%@5",
    "stop": "WHO@AT, e.g. 1@5",
    "restart": "WHO@AT, e.g. all@15",
    "cut": "WHO@AT+FOR, e.g. 50%@10+60",
    "freeze": "WHO@AT+FOR, e.g. 1@10+3",
    "skew": "WHO:SECONDS@AT, e.g. 20%:-3600@2",
}
_LASTING: frozenset[Action] = frozenset({"cut", "freeze"})


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens. Times are seconds after the first convergence."""

    action: Action
    who: str
    at: float
    lasts: float = 0.0  # of a cut or a stop
    seconds: float = 0.0  # by which clocks are set ahead

    def __str__(self) -> str:
        seconds = f":{self.seconds:+g}" if self.action == "skew" else ""
        lasts = f"+{self.lasts:g}" if self.lasts else ""
        return f"{self.action} {self.who}{seconds}@{self.at:g}{lasts}"


DEFAULT_SCRIPT = (Step("kill", "10%", 5.0), Step("restart", "all", 15.0))


def parse_step(action: Action, text: str) -> Step:
    """Return the step that ``text`` says.

    Raises:
        ConfigError: it has another form.
    """
    match = _STEP.fullmatch(text.strip())
    lasting, skewing = action in _LASTING, action == "skew"
    if (
        match is None
        or (match["lasts"] is not None) != lasting
        or (match["seconds"] is not None) != skewing
    ):
        raise ConfigError(f"--{action} {text}: say {_FORMS[action]} (times in seconds)")
    return Step(
        action,
        match["who"],
        float(match["at"]),
        float(match["lasts"] or 0.0),
        float(match["seconds"] or 0.0),
    )


async def play(
    swarm: Swarm,
    steps: Sequence[Step],
    *,
    duration: float,
    patience: float,
    on_event: Callable[[str], None] = lambda _: None,
) -> None:
    """Wait for convergence, carry out ``steps``, and end ``duration`` seconds after it.

    Args:
        patience: seconds that each convergence may take before it counts as failed.
        on_event: told in words what happens.
    """
    on_event("waiting until every ledger is complete")
    await swarm.measure_convergence(patience, label="start")
    began = trio.current_time()
    for at, label, act in sorted(_acts(swarm, steps), key=lambda act: act[0]):
        await trio.sleep_until(began + at)
        on_event(label)
        await act()
        if label.startswith(("restart", "heal", "stop")):
            await swarm.measure_convergence(patience, label=label)
    await trio.sleep_until(began + duration)
    on_event("waiting until every ledger is right")
    await swarm.measure_convergence(patience, label="end")


Act: TypeAlias = tuple[float, str, Callable[[], Awaitable[None]]]


def _acts(swarm: Swarm, steps: Sequence[Step]) -> list[Act]:
    """Return what is done when; who it is done to is chosen when the time has come."""
    acts: list[Act] = []
    for step in steps:
        chosen: list[int] = []
        acts.append((step.at, str(step), partial(_begin, swarm, step, chosen)))
        if step.action in _LASTING:
            undo = "heal" if step.action == "cut" else "thaw"
            end = step.at + step.lasts
            acts.append((end, f"{undo} {step.who}@{end:g}", partial(_end, swarm, step, chosen)))
    return acts


async def _begin(swarm: Swarm, step: Step, chosen: list[int]) -> None:
    chosen += _choose(swarm, step)
    if step.action == "cut":
        swarm.partition([chosen])
    for number in chosen:
        match step.action:
            case "kill":
                swarm.kill(number)
            case "stop":
                await swarm.stop(number)
            case "restart":
                await swarm.restart(number)
            case "freeze":
                swarm.freeze(number)
            case "skew":
                swarm.skew(number, step.seconds)


async def _end(swarm: Swarm, step: Step, chosen: list[int]) -> None:
    if step.action == "cut":
        swarm.heal()
    else:
        for number in chosen:
            if swarm.nodes[number].is_frozen:
                swarm.thaw(number)


def _choose(swarm: Swarm, step: Step) -> list[int]:
    dead = step.action == "restart"
    if step.who.startswith("#"):
        number = int(step.who[1:])
        if number >= len(swarm.nodes):
            raise ConfigError(f"{step}: there is no node {number} among {len(swarm.nodes)}")
        return [number] if swarm.nodes[number].is_alive != dead else []
    pool = [n.number for n in swarm.nodes if n.is_alive != dead and (dead or n.number)]
    if step.who == "all":
        return pool
    if step.who.endswith("%"):
        # At least one: a tenth of five nodes shall mean something too.
        count = max(1, round(float(step.who[:-1]) / 100 * len(swarm.nodes)))
    else:
        count = int(step.who)
    return swarm.choose(count, among=pool)
