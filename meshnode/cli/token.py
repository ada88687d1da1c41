"""``meshnode token``: make one, or see what one says. The key is never shown."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from meshnode.cli.output import plain, print_json, say
from meshnode.config import split_tokens
from meshnode.errors import ConfigError, TokenInvalid
from meshnode.values import parse_bootstrap, parse_network

_MAX_BYTES = 64 * 1024  # a token has a few hundred; this is some other file


def new(
    network: Annotated[
        str, typer.Option(metavar="NAME", help="The network's name: a-z, 0-9 and -.")
    ] = "mesh",
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", help="Where joiners begin; may be repeated."),
    ] = None,
) -> None:
    """Print a new token: whoever has it is a member of the mesh."""
    import secrets

    from meshnode.core.token import encode, new_token

    addrs = [_checked("--bootstrap", addr) for addr in bootstrap or []]
    made = new_token(_checked("--network", network), tuple(addrs), secrets.token_bytes(32))
    print(encode(made), flush=True)
    if sys.stdout.isatty():
        say("Keep it secret. To save it: (umask 077; meshnode token new > mesh.token)")


def show(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="The token's file, or - for standard input."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    qr: Annotated[
        bool,
        typer.Option("--qr", help="Show the token itself, key and all, as a QR code to scan."),
    ] = False,
) -> None:
    """Show what a token says: network and bootstraps, never the key (but for --qr).

    Without FILE it is MESHNODE_TOKEN, then the file that MESHNODE_TOKEN_FILE names, then
    standard input.
    """
    from meshnode.core.token import decode, encode

    # Several, while a network's key is being changed: the first is the newest.
    tokens = [decode(text) for text in split_tokens(_token_text(file))]
    if not tokens:
        raise TokenInvalid("there is no token; make one with: meshnode token new")
    shown: list[dict[str, object]] = [
        {
            "network": token.network,
            "fingerprint": token.fingerprint(),
            "bootstraps": list(token.bootstraps),
        }
        for token in tokens
    ]
    if qr:
        _print_qr(encode(tokens[0]))
        return
    if as_json:
        print_json({"schema_version": 1, **shown[0], "older": shown[1:]})
        return
    for token in tokens:
        print(f"network      {plain(token.network)}")
        print(f"fingerprint  {token.fingerprint()}")
        for addr in token.bootstraps or ("none; say --bootstrap, or rely on mDNS",):
            print(f"bootstrap    {plain(addr)}")


def _print_qr(text: str) -> None:
    """Print a QR code of half blocks; it is the secret itself, so it is said aloud."""
    import segno

    say("Whoever scans this is a member of the mesh.")
    try:
        segno.make(text, error="l", micro=False).terminal(compact=True)
    except segno.DataOverflowError as exc:
        raise ConfigError(
            "the token is too long for a QR code; make one with fewer bootstrap addresses"
        ) from exc
    sys.stdout.flush()


def _checked(flag: str, text: str) -> str:
    try:
        return parse_network(text) if flag == "--network" else parse_bootstrap(text)
    except ValueError as exc:
        raise ConfigError(f"{text} from flag {flag} {exc}") from exc


def _token_text(file: str | None) -> str:
    if file is None:
        direct = os.environ.get("MESHNODE_TOKEN", "")
        if direct.strip():
            return direct
        file = os.environ.get("MESHNODE_TOKEN_FILE") or None
    if file is None and sys.stdin.isatty():
        raise TokenInvalid("no token to show; name its file, or set MESHNODE_TOKEN")
    if file is None or file == "-":
        return sys.stdin.read(_MAX_BYTES)
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read(_MAX_BYTES)
    except OSError as exc:
        raise ConfigError(f"the token file {file} can't be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the token file {file} is not a text file") from exc
