"""``meshnode top``: the mesh and its last routing decisions, live on the whole screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from meshnode.cli.api_client import Api, ask, find_api
from meshnode.cli.output import console, plain, print_json, table
from meshnode.cli.queries import (
    PEER_COLUMNS,
    ApiOption,
    JsonOption,
    KeyOption,
    age,
    maps,
    peer_rows,
    why,
)
from meshnode.errors import NodeNotRunning

if TYPE_CHECKING:
    from rich.console import Group

_DECISION_COLUMNS = (">AGO", "SERVICE", "PICKED; WHY", "OUTCOME", ">TOOK", ">RETRIES")
_LINES_AROUND = 6  # status, headings and blanks around the two tables


def top(
    interval: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.2, max=60.0, help="Seconds from one look to the next."
        ),
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    api: ApiOption = None,
    api_key_file: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the mesh live: its nodes, and the last decisions with the tier that decided.

    Ends with Ctrl-C. A node that ends meanwhile is waited for.
    """
    found = find_api(api, api_key_file)
    if as_json or once or not sys.stdout.isatty():
        shown = _look(found)
        print_json(shown) if as_json else console().print(_screen(shown, rows=1_000))
        return
    _watch(found, interval)


def _watch(api: Api, interval: float) -> None:
    from rich.live import Live

    screen = console()
    shown = _look(api)  # a node that does not run at all is an error; one that ends is waited for
    problem: str | None = None
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(shown, rows=screen.height, problem=problem), refresh=True)
            time.sleep(interval)
            try:
                shown, problem = _look(api), None
            except NodeNotRunning as exc:
                problem = str(exc)


def _look(api: Api) -> dict[str, object]:
    parts = ("status", "peers", "decisions")
    return {"schema_version": 1} | {part: ask(api, f"/api/{part}") for part in parts}


def _screen(shown: Mapping[str, object], *, rows: int, problem: str | None = None) -> Group:
    from rich.console import Group
    from rich.text import Text

    status, peers, decisions = (_map(shown[part]) for part in ("status", "peers", "decisions"))
    nodes = peer_rows(peers)
    room = max(4, rows - _LINES_AROUND)
    node_room = max(2, room - min(8, room // 3))
    made = [_decision_row(one) for one in maps(decisions.get("decisions"))]
    kept, left_out = nodes[:node_room], len(nodes) - node_room
    head = (
        f"{plain(status.get('name'))}: {plain(status.get('state'))}, "
        f"{plain(status.get('peers_online'))} online, "
        f"{plain(status.get('own_in_flight'))} in flight here"
    )
    parts = [Text(head, style="bold"), Text("")]
    if problem is not None:
        parts[1] = Text(f"not answering: {plain(problem)}", style="bold red")
    more = [Text(f"and {left_out} more: meshnode peers")] if left_out > 0 else []
    recent = table(_DECISION_COLUMNS, made[: max(1, room - len(kept))])
    return Group(*parts, table(PEER_COLUMNS, kept), *more, Text(""), recent)


def _decision_row(decision: Mapping[str, object]) -> tuple[object, ...]:
    took = decision.get("duration_s")
    return (
        age(decision.get("age_s")),
        decision.get("service_id"),
        why(decision),
        decision.get("outcome") or "open",
        age(took) if took is not None else None,
        decision.get("retries"),
    )


def _map(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
