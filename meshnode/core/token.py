"""The token: one string that lets a host or a laptop into a mesh.

It carries the network's name, the 32-byte key that membership proofs are keyed with, and
addresses to begin with. Whoever holds it is a member, so it is shown only when asked for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field

from meshnode.core.membership import MAX_KEYS
from meshnode.core.wire import Text256, WireModel, decode_model, encode_model
from meshnode.errors import TokenInvalid, WireError

PREFIX = "mesh1"
KEY_BYTES = 32
MAX_BOOTSTRAPS = 16
MAX_TOKEN_CHARS = 8192  # 16 addresses of 256 characters, in base64
_CHECKSUM_BYTES = 4  # a typo passes once in four thousand million
_NETWORK = re.compile(r"[a-z0-9-]{1,32}")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_COPY_AGAIN = "copy it again whole from the host that made it"


class _Body(WireModel):
    network: str = Field(alias="Network", pattern=r"^[a-z0-9-]{1,32}$")
    key: bytes = Field(alias="Key", min_length=KEY_BYTES, max_length=KEY_BYTES)
    bootstraps: tuple[Text256, ...] = Field(
        default=(), alias="Bootstraps", max_length=MAX_BOOTSTRAPS
    )


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says. Its text form comes from ``encode`` alone, never from ``repr``."""

    network: str  # 1 to 32 of a-z, 0-9 and -
    key: bytes = field(repr=False)  # 32 bytes, secret
    bootstraps: tuple[str, ...] = ()  # multiaddrs, each with /p2p/<peer ID>

    def __post_init__(self) -> None:
        if not _NETWORK.fullmatch(self.network):
            raise TokenInvalid(
                f"the network name {self.network!r} is not 1 to 32 of a-z, 0-9 and -; "
                "choose another, such as home or lab-2"
            )
        if len(self.key) != KEY_BYTES:
            raise TokenInvalid(f"a token's key has {KEY_BYTES} bytes, not {len(self.key)}")
        if len(self.bootstraps) > MAX_BOOTSTRAPS:
            raise TokenInvalid(
                f"{len(self.bootstraps)} bootstrap addresses are more than the {MAX_BOOTSTRAPS} "
                "a token holds; name fewer, two or three are plenty"
            )
        for addr in self.bootstraps:
            _check_bootstrap(addr)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits by which people can compare networks; not secret."""
        return network_fingerprint(self.key)


def encode(token: Token) -> str:
    """Return the token as one line of text. It is a secret."""
    fields = _Body(network=token.network, key=token.key, bootstraps=token.bootstraps)
    body = encode_model(fields, MAX_TOKEN_CHARS)
    return PREFIX + _to_base64url(body + _checksum(body))


def decode(text: str) -> Token:
    """Return what a token's text says; white space, also inside, is ignored.

    Raises:
        TokenInvalid: it is no token, of another version, or damaged. The message never
            repeats the text.
    """
    compact = "".join(text.split())
    data = _from_base64url(_without_prefix(compact))
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(data) <= _CHECKSUM_BYTES or not hmac.compare_digest(checksum, _checksum(body)):
        raise TokenInvalid(f"the token is damaged: its checksum does not match; {_COPY_AGAIN}")
    try:
        fields = decode_model(_Body, body, MAX_TOKEN_CHARS)
    except WireError as exc:
        # The checksum fits, so nobody mistyped it: another program made it.
        raise TokenInvalid(
            f"the token's content is not understood ({exc}); "
            "make a new one with: meshnode token new"
        ) from exc
    return Token(fields.network, fields.key, fields.bootstraps)


def decode_all(texts: Sequence[str]) -> tuple[Token, ...]:
    """Return what several tokens of one network say, in their order: the first is the newest.

    Raises:
        TokenInvalid: one of them is no token, they are of several networks, or too many.
    """
    if len(texts) > MAX_KEYS:
        raise TokenInvalid(
            f"{len(texts)} tokens are more than the {MAX_KEYS} that can be valid at a time; "
            "keep the newest"
        )
    found = tuple(decode(text) for text in texts)
    networks = sorted({token.network for token in found})
    if len(networks) > 1:
        raise TokenInvalid(
            f"the tokens are of several networks ({', '.join(networks)}); "
            "keep those of one network in the file"
        )
    return found


def new_token(network: str, bootstraps: tuple[str, ...], random_bytes: bytes) -> Token:
    """Return a new network's token.

    Args:
        network: 1 to 32 of a-z, 0-9 and -.
        bootstraps: multiaddrs, each with ``/p2p/<peer ID>``; may be empty.
        random_bytes: 32 bytes from the system's secure source; they become the key.

    Raises:
        TokenInvalid: an argument does not fit.
    """
    return Token(network, random_bytes, bootstraps)


def open_network_key(network: str) -> bytes:
    """Return the key of an open network, which everybody can work out: it keeps nobody out."""
    return hashlib.sha256(b"meshnode open network 1" + network.encode()).digest()


def network_fingerprint(key: bytes) -> str:
    """Return 16 hexadecimal digits by which people can compare keys; not secret."""
    return hmac.digest(key, b"meshnode network fingerprint 1", hashlib.sha256).hex()[:16]


def _without_prefix(text: str) -> str:
    if not text:
        raise TokenInvalid("the token is empty; make one with: meshnode token new")
    if len(text) > MAX_TOKEN_CHARS:
        raise TokenInvalid(
            f"the token has {len(text)} characters, more than {MAX_TOKEN_CHARS}: "
            "is this the right file?"
        )
    if text.startswith(PREFIX):
        return text[len(PREFIX) :]
    version = re.match(r"mesh(\d{1,4})", text)
    if version:
        raise TokenInvalid(
            f"this is a token of version {version[1]}, and this meshnode reads version 1; "
            "update meshnode, or make a token with the version that runs here"
        )
    raise TokenInvalid(f"this is no token: a token begins with {PREFIX}; {_COPY_AGAIN}")


def _check_bootstrap(addr: str) -> None:
    fits = len(addr) <= 256 and addr.startswith("/") and "/p2p/" in addr and addr.isprintable()
    if not fits:
        raise TokenInvalid(
            f"the bootstrap address {addr[:300]!r} is no multiaddr with a peer ID; "
            "it looks like /ip4/192.168.1.20/tcp/4201/p2p/12D3KooW..."
        )


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + body).digest()[:_CHECKSUM_BYTES]


def _to_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_base64url(text: str) -> bytes:
    damaged = f"the token is damaged: it contains a character that no token has; {_COPY_AGAIN}"
    if not _BASE64URL.fullmatch(text):
        raise TokenInvalid(damaged)
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as exc:
        raise TokenInvalid(f"the token is damaged: it is cut short; {_COPY_AGAIN}") from exc
    if _to_base64url(data) != text:  # spare bits set: another text for the same bytes
        raise TokenInvalid(f"the token is damaged: its last character is wrong; {_COPY_AGAIN}")
    return data
