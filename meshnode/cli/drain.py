"""``meshnode drain``: let the running node finish what it serves, and leave."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated

import typer

from meshnode.cli.api_client import Api, ask, find_api, with_local_key
from meshnode.cli.output import print_json, say
from meshnode.cli.queries import ApiOption, JsonOption, KeyOption, StateDirOption
from meshnode.errors import MeshnodeError, NodeNotRunning

# Between two looks at what still runs.
_LOOK_INTERVAL = 0.2  # seconds
# After the grace the node says goodbye and closes its connections.
_LEAVING = 15.0  # seconds


def drain(
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the node has left.")
    ] = True,
    api: ApiOption = None,
    api_key_file: KeyOption = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the node take nothing new, finish what runs, and leave.

    It leaves when the last request has ended, or after its grace (up --drain-grace, 30 seconds).
    """
    found = with_local_key(find_api(api, api_key_file), state_dir)
    began = time.monotonic()
    answer = ask(found, "/api/drain", method="POST")
    if not wait:
        print_json(answer) if as_json else say("the node drains; it leaves by itself")
        return
    left_running = _wait_until_gone(found, answer, began, quiet=as_json)
    took = round(time.monotonic() - began, 3)
    if as_json:
        told = {"state": "left", "duration_s": took, "cut": left_running}
        print_json({"schema_version": answer["schema_version"], **told})
    else:
        cut = f"; {left_running} requests outlasted the grace and were cut" if left_running else ""
        say(f"the node has left after {took:.1f} s{cut}")


def _wait_until_gone(api: Api, answer: Mapping[str, object], began: float, *, quiet: bool) -> int:
    """Follow the drain; return how many requests ran when the node left with its grace over.

    Raises:
        MeshnodeError: it is still there long after its grace.
    """
    grace = _number(answer.get("grace_s"))
    running, shown = _running(answer), -1
    while time.monotonic() - began < grace + _LEAVING:
        if running != shown and not quiet:
            say(f"draining: {running} requests still run")
            shown = running
        time.sleep(_LOOK_INTERVAL)
        try:
            # Asking to drain once more changes nothing, and tells what runs.
            running = _running(ask(api, "/api/drain", method="POST"))
        except NodeNotRunning:
            return running if time.monotonic() - began >= grace else 0
    raise MeshnodeError(
        f"the node still answers {_LEAVING:g} s after its grace of {grace:g} s; its log says why"
    )


def _running(answer: Mapping[str, object]) -> int:
    return int(_number(answer.get("served_here")) + _number(answer.get("sent_elsewhere")))


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
