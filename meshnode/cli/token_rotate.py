"""``meshnode token rotate``: a new key for a network, with the old one valid until all have it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshnode.cli.output import say
from meshnode.config import split_tokens
from meshnode.errors import ConfigError, TokenInvalid

_MAX_BYTES = 64 * 1024


def rotate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The token's file.")],
    finish: Annotated[
        bool,
        typer.Option("--finish", help="Drop the older tokens: whoever has only those is out."),
    ] = False,
) -> None:
    """Put a new token of the same network on top of the file, or drop the older ones.

    Run it on one host, copy the file to the others, then run it with --finish and copy again.
    Nodes take up the changed file by themselves within a second, and no link breaks on the way.
    """
    import secrets

    from meshnode.core.membership import MAX_KEYS
    from meshnode.core.token import Token, decode_all, encode
    from meshnode.state_files import write_atomically

    path = Path(file)
    found = decode_all(split_tokens(_read(path)))
    if not found:
        raise TokenInvalid(f"{file} holds no token; make one with: meshnode token new > {file}")
    if finish:
        kept: tuple[Token, ...] = found[:1]
    elif len(found) >= MAX_KEYS:
        raise TokenInvalid(
            f"{file} holds {len(found)} tokens, and no more can be valid at a time; when every "
            f"node has the newest, run: meshnode token rotate {file} --finish"
        )
    else:
        newest = found[0]
        made = Token(newest.network, secrets.token_bytes(32), newest.bootstraps)
        kept = (made, *found)
    try:
        # Resolved, so that a link to the file stays one.
        write_atomically(path.resolve(), "".join(encode(one) + "\n" for one in kept).encode())
    except OSError as exc:
        raise ConfigError(f"{file} can't be written: {exc.strerror}; it is as it was") from exc
    if finish:
        say(f"{file} holds {kept[0].fingerprint()} alone now; {len(found) - 1} dropped.")
        say("Copy it to every node; whoever has only the older ones is cut off as they take it.")
    else:
        say(f"{file} begins with {kept[0].fingerprint()} now; {found[0].fingerprint()} goes on.")
        say("Copy it to every node; they take it up within a second, without a restart.")
        say(f"Then drop the old one: meshnode token rotate {file} --finish")


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as opened:
            return opened.read(_MAX_BYTES)
    except OSError as exc:
        raise ConfigError(f"the token file {path} can't be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the token file {path} is not a text file") from exc
