"""``meshnode up``: settings from argv, environment and file, then a node until it is ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import typer

from meshnode.config import PREFIX, Config, resolve
from meshnode.errors import ConfigError

_MAX_SECRET = 64 * 1024  # bytes; a token or a key has a few hundred, this is some other file


def up(
    context: typer.Context,
    token_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The mesh's token (or MESHNODE_TOKEN)."),
    ] = None,
    open_: Annotated[
        bool | None,
        typer.Option(
            "--open", help="A mesh without a token: anybody may join.", show_default=False
        ),
    ] = None,
    network: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name of an open mesh.")
    ] = None,
    allow_peers_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Let in these alone: a peer ID a line."),
    ] = None,
    block_peers_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep these out: a peer ID a line.")
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", help="Default /ip4/0.0.0.0/tcp/4201; port 0 works."),
    ] = None,
    announce_addr: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", help="Where others reach this host, behind a NAT."),
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", help="A node to begin with, ending in /p2p/PEER_ID."),
    ] = None,
    mdns: Annotated[
        bool | None,
        typer.Option("--mdns/--no-mdns", help="Look for the mesh on the LAN.", show_default=False),
    ] = None,
    relay: Annotated[
        bool | None,
        typer.Option(
            "--relay/--no-relay",
            help="Carry connections for members that can only dial out.",
            show_default=False,
        ),
    ] = None,
    expose: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=HOST:PORT", help="A local server that members may use."),
    ] = None,
    health: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KIND",
            help="How a server is probed: auto (default), tcp, http:/path, ollama, openai, "
            "llamacpp, vllm or off.",
        ),
    ] = None,
    max_in_flight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Requests that a server takes at once."),
    ] = None,
    max_clients: Annotated[
        str | None, typer.Option(metavar="N", help="Clients of the proxy at a time; default 4096.")
    ] = None,
    max_clients_per_ip: Annotated[
        str | None,
        typer.Option(metavar="N", help="Of them, from one other host; default 1024."),
    ] = None,
    drain_grace: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS", help="How long running requests may take to end; default 30."
        ),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:PORT]",
            help="Serve the mesh here; --proxy alone means 127.0.0.1:8080.",
        ),
    ] = None,
    proxy_mode: Annotated[
        str | None,
        typer.Option(
            metavar="http|tcp",
            help="http (default) routes each request; tcp each connection, whatever it carries.",
        ),
    ] = None,
    first_byte_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="How long an engine may take to begin its answer; default 300.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages that may use the proxy; default none."),
    ] = None,
    response_headers: Annotated[
        bool | None,
        typer.Option(
            "--response-headers/--no-response-headers",
            help="Say in headers which peer answered, and why.",
            show_default=False,
        ),
    ] = None,
    affinity: Annotated[
        str | None,
        typer.Option(
            metavar="off|prefix|session",
            help="Prefer the peer whose cache is warm: for the prompt's beginning (default), or "
            "for the client's session.",
        ),
    ] = None,
    session_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where clients name it; default x-session-id."),
    ] = None,
    client_keys_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Keys of clients, each [name] with key = "…", models = ["llama3*"], rpm = 60.',
        ),
    ] = None,
    open_proxy: Annotated[
        bool | None,
        typer.Option(
            "--open-proxy",
            help="Let anybody who reaches the proxy use it, beyond loopback too.",
            show_default=False,
        ),
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which service the proxy serves; default the only one."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="PEER", help="Send everything to one peer, by ID or name.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="vram|rotate|random",
            help="Who goes first among equals: most free VRAM (default), each in turn, or by "
            "chance.",
        ),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Pretend this much free VRAM, like 24GiB.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What people call this node; default the host name."),
    ] = None,
    api: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|unix:/PATH", help="Control API; default 127.0.0.1:4280."),
    ] = None,
    api_host_allow: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name under which browsers may ask for it."),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The key it wants beyond loopback.")
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The folder of this node's identity.key, peers.json and api.key, which no other "
            "node may share; default the variable STATE_DIRECTORY, which systemd sets, else this "
            "user's folder for such files.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="A TOML file with any of these settings.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Send a trace of each request here (extra: otel)."),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="debug|info|warning|error",
            help="The least severe lines that standard error gets; default info.",
        ),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            metavar="pretty|json",
            help="Lines for people, or one JSON object a line; default pretty.",
        ),
    ] = None,
    announce_interval: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="How often this node says what it has; default 10. In a large mesh it does so "
            "less often by itself.",
        ),
    ] = None,
    online_window: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="After how long a silence others take this node for gone; default 40, and at "
            "least twice --announce-interval.",
        ),
    ] = None,
    queue_length: Annotated[
        str | None,
        typer.Option(metavar="N", help="Requests that wait while all peers are full; default 256."),
    ] = None,
    queue_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="How long such a request waits for room before it is refused; default 30.",
        ),
    ] = None,
) -> None:
    """Run a node until SIGINT or SIGTERM: it joins, announces, exposes, proxies.

    Every flag is also an environment variable (MESHNODE_LISTEN) and a key of the --config file
    (listen). A flag goes before the environment, that before the file. SECONDS may have a unit:
    500ms, 90s, 2m, 1h.
    """
    flags = flags_of(context.params)
    settings = read_settings(flags, config)

    from meshnode.cli.running import run_node_here

    raise typer.Exit(run_node_here(settings, partial(read_settings, flags, config)))


def flags_of(params: Mapping[str, object]) -> dict[str, object]:
    """Return the settings among the parameters of ``up``, by the names that they have in Config."""
    return {name.rstrip("_"): value for name, value in params.items() if name != "config"}


def read_settings(
    flags: Mapping[str, object], config_path: str | None, *, must_hold: bool = True
) -> Config:
    """Return the Config of flags, this process's environment, and the TOML file.

    Arguments and errors are those of ``config.resolve``.

    Raises:
        ConfigError: one of them is wrong.
    """
    import socket

    import platformdirs

    path, source = config_path, "flag --config"
    if path is None:
        path, source = os.environ.get(PREFIX + "CONFIG") or None, f"environment {PREFIX}CONFIG"
    return resolve(
        flags,
        os.environ,
        _read_toml(path, source) if path else None,
        file_path=path or "",
        host_name=socket.gethostname(),
        platform_state_dir=platformdirs.user_state_dir("meshnode"),
        read_text=_read_secret,
        must_hold=must_hold,
    )


def _read_toml(path: str, source: str) -> dict[str, object]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"config={path} from {source} can't be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config={path} from {source} is no TOML: {exc}") from exc


def _read_secret(path: str) -> str:
    if path == "-":
        return sys.stdin.read(_MAX_SECRET)
    with open(path, encoding="utf-8") as file:
        return file.read(_MAX_SECRET)
