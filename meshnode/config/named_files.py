"""What stands in files that settings name: tokens, keys, and lists of peers.

Tokens and keys come from such files or the environment alone, so that no process list and no
shared file shows them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping

from meshnode.config.reading import Reader, as_text
from meshnode.errors import ConfigError
from meshnode.values import parse_peer_list


def token_texts(read: Reader, read_text: Callable[[str], str] | None) -> tuple[str, ...]:
    """Return the tokens to join and be joined with, the newest first; none in an open mesh."""
    direct = read.said.get("token")
    if direct is not None:
        return split_tokens(str(direct.value))
    entry = read.said.get("token_file")
    if entry is None:
        return ()
    texts = split_tokens(_read_text(read, "token_file", read_text))
    if not texts:
        read.fail("token_file", "holds no token; make one with: meshnode token new")
    return texts


def split_tokens(text: str) -> tuple[str, ...]:
    """Return the tokens in ``text``: several, so that a key can be rotated.

    Lines that begin with # are notes. A token that a mail program wrapped stays one: only its
    beginning reads mesh1.
    """
    texts: list[str] = []
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for word in " ".join(lines).split():
        if re.match(r"mesh\d", word) or not texts:
            texts.append(word)
        else:
            texts[-1] += word
    return tuple(texts)


def peer_list(
    read: Reader, key: str, read_text: Callable[[str], str] | None
) -> frozenset[str] | None:
    """Return the peer IDs of the file that ``key`` names; None where it names none."""
    if key not in read.said:
        return None
    try:
        return parse_peer_list(_read_text(read, key, read_text))
    except ValueError as exc:
        read.fail(key, str(exc))


def client_keys(
    read: Reader, read_text: Callable[[str], str] | None
) -> Mapping[str, object] | None:
    """Return the parsed table of clients and their keys; None where no file is named."""
    if "client_keys_file" not in read.said:
        return None
    try:
        return tomllib.loads(_read_text(read, "client_keys_file", read_text))
    except tomllib.TOMLDecodeError as exc:
        # Without the parser's words: they could quote a key.
        position = re.search(r"line \d+", str(exc))
        where = f" ({position[0]})" if position else ""
        read.fail("client_keys_file", f'is no TOML{where}; write [name] and under it key = "…"')


def api_key(read: Reader, read_text: Callable[[str], str] | None) -> str | None:
    """Return the key that the control API asks for; None where no file is named."""
    if "api_key_file" not in read.said:
        return None
    key = _read_text(read, "api_key_file", read_text).strip()
    # 16 characters is what stands between the network and the control API.
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        read.fail(
            "api_key_file",
            "must hold one line of at least 16 printable characters without blanks; "
            "make one with: openssl rand -hex 32",
        )
    return key


def _read_text(read: Reader, key: str, read_text: Callable[[str], str] | None) -> str:
    if read_text is None:
        read.fail(key, "can't be read here")
    try:
        return read_text(as_text(read.said[key].value))
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise ConfigError(
            f"{key}={read.shown(key)} from {read.sources[key]} can't be read: {reason}"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{key}={read.shown(key)} from {read.sources[key]} is not a text file"
        ) from exc
