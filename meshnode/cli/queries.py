"""The verbs that ask a running node, status and peers, and how its answers read to people."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from meshnode.cli.api_client import Api, ask, find_api
from meshnode.cli.output import console, plain, print_json, print_table, table
from meshnode.values import format_size

ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api",
        metavar="HOST:PORT",
        help="Where the node's control API listens (or MESHNODE_API; default 127.0.0.1:4280).",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key-file", metavar="FILE", help="Its API key, if it wants one."),
]
StateDirOption = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Its state folder, which holds a key for this host."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_WATCH_INTERVAL = 1.0  # seconds
PEER_COLUMNS = (
    *("NAME", "PEER ID", "STATE", ">SEEN", ">FREE VRAM", ">TOTAL", ">IN FLIGHT"),
    *("SERVICES", "MODELS", "PATH", ">RTT"),
)
CANDIDATE_COLUMNS = ("", "NAME", "PEER ID", ">IN FLIGHT", ">FREE VRAM", ">LAST USED", "EXCLUDED")
MODEL_COLUMNS = (*CANDIDATE_COLUMNS[:-1], "SERVICE", "LOADED", ">CACHED", CANDIDATE_COLUMNS[-1])
# How each tier reads to people.
TIERS = {
    "only": "nobody else could",
    "in_flight": "fewest requests in flight",
    "last_used": "longest not used",
    "vram": "most free VRAM",
    "first_listed": "a full tie: the first listed",
    "random": "the dice",
    "target": "the target that was asked for",
    "loaded": "the model is loaded there",
    "prefix": "the prompt's beginning is cached there",
    "session": "the session's cache is there",
    "least_cached": "the least cached so far",
}


def status(
    api: ApiOption = None, api_key_file: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Show what this node is and does."""
    body = ask(find_api(api, api_key_file), "/api/status")
    if as_json:
        print_json(body)
        return
    for label, value in _status_lines(body):
        print(f"{label:<12} {plain(value)}")


def peers(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second.")] = False,
    api: ApiOption = None,
    api_key_file: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every node of the mesh, this one included."""
    found = find_api(api, api_key_file)
    if watch:
        _watch_peers(found, as_json)
        return
    body = ask(found, "/api/peers")
    if as_json:
        print_json(body)
    else:
        print_table(PEER_COLUMNS, peer_rows(body))


def candidate_rows(decision: Mapping[str, object]) -> list[tuple[object, ...]]:
    """Return one row for each candidate of a decision; the picked one is marked."""
    return [
        (
            ">" if row["peer_id"] == decision.get("picked") else " ",
            row.get("name"),
            short_id(row["peer_id"]),
            row.get("in_flight"),
            _size(row.get("available_vram")),
            age(row.get("last_used_s")),
            row.get("excluded"),
        )
        for row in maps(decision.get("candidates"))
    ]


def model_rows(decision: Mapping[str, object]) -> list[tuple[object, ...]]:
    """Return the rows of a decision by model: as ``candidate_rows``, and what is warm where."""
    rows = []
    given = maps(decision.get("candidates"))
    for plain_row, row in zip(candidate_rows(decision), given, strict=True):
        loaded = {True: "yes", False: "no"}.get(bool(row.get("loaded")))
        ratio = row.get("match_ratio")
        cached = f"{ratio:.0%}" if isinstance(ratio, float | int) else None
        rows.append((*plain_row[:-1], row.get("service_id"), loaded, cached, plain_row[-1]))
    return rows


def why(decision: Mapping[str, object]) -> str:
    """Return a decision in one sentence."""
    picked = decision.get("picked")
    tier = str(decision.get("tier"))
    reason = TIERS.get(tier, tier)
    if picked is None:
        return f"nobody is picked beforehand; decided by: {reason}"
    names = {row["peer_id"]: row.get("name") for row in maps(decision.get("candidates"))}
    return plain(f"{names.get(picked) or short_id(picked)}; decided by: {reason}")


def short_id(peer_id: object) -> str:
    """Return the end of a peer ID: the beginning is the same for all."""
    text = str(peer_id)
    return text if len(text) <= 12 else "…" + text[-8:]


def _watch_peers(api: Api, as_json: bool) -> None:
    import time

    if as_json or not sys.stdout.isatty():
        while True:
            body = ask(api, "/api/peers")
            print_json(body) if as_json else print_table(PEER_COLUMNS, peer_rows(body))
            time.sleep(_WATCH_INTERVAL)
    from rich.live import Live

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            body = ask(api, "/api/peers")
            live.update(table(PEER_COLUMNS, peer_rows(body)), refresh=True)
            time.sleep(_WATCH_INTERVAL)


def peer_rows(body: Mapping[str, object]) -> list[tuple[object, ...]]:
    """Return one row for each node of ``/api/peers``, under ``PEER_COLUMNS``."""
    rows: list[tuple[object, ...]] = []
    for peer in maps(body.get("peers")):
        services = maps(peer.get("services"))
        models = [str(model) for service in services for model in _list(service.get("models"))]
        is_self = peer.get("peer_id") == body.get("self")
        rows.append(
            (
                f"{peer.get('name') or '-'}{' (here)' if is_self else ''}",
                short_id(peer.get("peer_id")),
                peer.get("state"),
                age(peer.get("last_seen_s")),
                _size(peer.get("available_vram")),
                _size(peer.get("total_vram")),
                peer.get("in_flight"),
                ", ".join(_service_word(service) for service in services),
                ", ".join(models[:3]) + (f" +{len(models) - 3}" if len(models) > 3 else ""),
                peer.get("path"),
                _milliseconds(peer.get("rtt_ms")),
            )
        )
    return rows


def _status_lines(body: Mapping[str, object]) -> list[tuple[str, object]]:
    ready = "ready" if body.get("ready") else "not ready: " + ", ".join(_words(body.get("missing")))
    free = _size(body.get("available_vram"))
    total = _size(body.get("total_vram"))
    return [
        ("name", body.get("name")),
        ("peer ID", body.get("peer_id")),
        ("state", f"{body.get('state')}, {ready}"),
        ("network", f"{body.get('network')}{' (open)' if body.get('open') else ''}"),
        ("addresses", ", ".join(_words(body.get("addrs")))),
        ("proxy", body.get("proxy")),
        ("api", body.get("api")),
        ("services", ", ".join(_service_word(s) for s in maps(body.get("services")))),
        ("VRAM", f"{free} free of {total}, {plain(body.get('gpu_count'))} GPUs"),
        ("in flight", body.get("own_in_flight")),
        ("peers", f"{body.get('peers_online')} online, {body.get('peers_known')} known"),
        ("links", body.get("links")),
        ("uptime", age(body.get("uptime_s"))),
        ("version", body.get("version")),
    ]


def _service_word(service: Mapping[str, object]) -> str:
    healthy = service.get("healthy", True)
    return f"{service.get('service_id')}{'' if healthy else ' (down)'}"


def _size(value: object) -> str:
    return format_size(value) if isinstance(value, int) else "-"


def _milliseconds(value: object) -> str:
    return f"{value:.1f} ms" if isinstance(value, (int, float)) else "-"


def age(value: object) -> str:
    """Return seconds as people read them: ``3.2 s``, ``5 m``; ``-`` for unknown."""
    if not isinstance(value, (int, float)):
        return "-"
    for unit, seconds in (("d", 86_400), ("h", 3600), ("m", 60)):
        if value >= 2 * seconds:
            return f"{value / seconds:.0f} {unit}"
    return f"{value:.1f} s"


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _words(value: object) -> list[str]:
    return [str(item) for item in _list(value)]


def maps(value: object) -> list[Mapping[str, object]]:
    """Return the objects in a JSON list; nothing where it is none."""
    return [item for item in _list(value) if isinstance(item, dict)]
