"""``meshnode ping``: round trips from the running node to a peer."""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated

import typer

from meshnode.cli.api_client import ask, find_api
from meshnode.cli.output import plain, say
from meshnode.cli.queries import ApiOption, JsonOption, KeyOption
from meshnode.errors import NoSuchPeer, PeerUnreachable

_MAX_COUNT = 10_000


def ping(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Its peer ID, or its name.")],
    count: Annotated[
        int,
        typer.Option(
            "--count", "-c", metavar="N", min=1, max=_MAX_COUNT, help="How many round trips."
        ),
    ] = 4,
    interval: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.0, max=3600.0, help="Seconds from one to the next."),
    ] = 1.0,
    api: ApiOption = None,
    api_key_file: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure round trips to a peer over the mesh, with a link made if there is none.

    With --json each round trip is one line. Ends with 1 if none came back.
    """
    found = find_api(api, api_key_file)
    times: list[float] = []
    for number in range(count):
        if number:
            time.sleep(interval)
        try:
            answer = ask(found, "/api/ping", {"peer": peer})
        except NoSuchPeer:
            raise  # asking again would find nobody either
        except PeerUnreachable as exc:
            _tell(as_json, {"peer": peer, "error": str(exc)}, f"{plain(peer)}: {exc}")
            continue
        rtt = answer.get("rtt_ms")
        if isinstance(rtt, (int, float)):
            times.append(float(rtt))
            words = f"{plain(answer.get('name'))} {plain(answer.get('peer_id'))}: {rtt:.3f} ms"
            _tell(as_json, answer, words)
    if not times:
        raise PeerUnreachable(f"none of {count} round trips to {plain(peer)} came back")
    if not as_json:
        say(
            f"{len(times)} of {count} came back; min {min(times):.3f}, "
            f"median {statistics.median(times):.3f}, max {max(times):.3f} ms"
        )


def _tell(as_json: bool, facts: dict[str, object], words: str) -> None:
    print(json.dumps({"schema_version": 1, **facts}) if as_json else words, flush=True)
