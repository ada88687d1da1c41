"""``meshnode forward``: one local port for each peer that offers a service, printed as a list.

The ports are opened by the node that runs here, and live as long as this command.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Annotated

import typer

from meshnode.cli.api_client import Api, find_api, follow, with_local_key
from meshnode.cli.output import plain, say
from meshnode.cli.queries import ApiOption, KeyOption, maps
from meshnode.errors import ConfigError, NodeNotRunning
from meshnode.values import parse_service_name

VARIABLE = "LLAMACPP_GRPC_SERVERS"
_RETRY_INTERVAL = 1.0  # seconds


def forward(
    service: Annotated[
        str, typer.Option(metavar="NAME", help="The service whose peers to reach, like worker.")
    ],
    env_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=f"Keep {VARIABLE}=HOST:PORT,… in this file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line a change.")] = False,
    api: ApiOption = None,
    api_key_file: KeyOption = None,
    state_dir: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The node's state folder, which holds its key."),
    ] = None,
) -> None:
    """Open a local port for each peer that offers a service, until ended.

    Prints the ports separated by commas, as LLAMACPP_GRPC_SERVERS wants them: a line at first and
    one at every join and leave.
    """
    try:
        named = parse_service_name(service)
    except ValueError as exc:
        raise ConfigError(f"service={service} from flag --service {exc}") from exc
    found = with_local_key(find_api(api, api_key_file), state_dir)
    last: str | None = None
    for body in _follow_for_ever(found, named):
        addresses = ",".join(str(row.get("address")) for row in maps(body.get("forwards")))
        if addresses == last:
            continue
        last = addresses
        if env_file is not None:
            _write(env_file, f"{VARIABLE}={addresses}\n")
        print(json.dumps(body) if as_json else addresses, flush=True)


def _follow_for_ever(api: Api, service: str) -> Iterator[Mapping[str, object]]:
    """Yield the lists, through the node's restarts once it was reached.

    Raises:
        NodeNotRunning: nobody answered at first.
    """
    reached = False
    while True:
        try:
            for body in follow(api, "/api/forward", {"service": service}):
                reached = True
                yield body
            lost = "it ended"
        except NodeNotRunning as exc:
            if not reached:
                raise
            lost = str(exc)
        say(f"the node is gone ({plain(lost)}); waiting for it")
        yield {"schema_version": 1, "service": service, "forwards": []}
        time.sleep(_RETRY_INTERVAL)


def _write(path: str, text: str) -> None:
    """Replace the file's content at once: whoever reads it never finds half a list."""
    fresh = f"{path}.new"
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(fresh, path)
    except OSError as exc:
        raise ConfigError(
            f"env_file={path} from flag --env-file can't be written: {exc.strerror or exc}"
        ) from exc
