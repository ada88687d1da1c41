"""Keys of clients that are not members: who may ask, for which models, how often; pure.

A key is never kept in the clear: it is known by its SHA-256, and compared in constant time with
every key there is, so that how long a refusal takes says nothing about any of them.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256

from meshnode.core.model_index import model_key

# More clients than one gateway serves; each is compared with at every request.
MAX_KEYS = 1000
MAX_GLOBS = 64
# Shorter ones can be guessed by asking.
MIN_KEY = 16  # characters
MAX_KEY = 512
MAX_RPM = 1_000_000

_FIELDS = frozenset({"key", "models", "rpm"})


@dataclass(frozen=True, slots=True)
class ClientKey:
    """One client."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    models: tuple[str, ...] = ("*",)  # globs over model names
    rpm: int | None = None  # requests per minute; None = no limit

    @property
    def any_model(self) -> bool:
        """Whether the client may ask for whatever there is."""
        return "*" in self.models

    def allows(self, model: str) -> bool:
        """Say whether the client may ask for a model, however it is spelled."""
        key = model_key(model)
        return any(fnmatchcase(key, model_key(glob)) for glob in self.models)


@dataclass(frozen=True, slots=True)
class KeyRefusal:
    """Why a client is turned away, as an HTTP answer says it."""

    status: int  # 401, 403 or 429
    code: str
    message: str
    retry_after: int | None = None  # seconds


NO_KEY = KeyRefusal(
    401, "api_key_required", "send your API key as Authorization: Bearer KEY, or as x-api-key"
)
WRONG_KEY = KeyRefusal(401, "invalid_api_key", "this API key is not known here; check it")


def parse_client_keys(table: Mapping[str, object]) -> tuple[ClientKey, ...]:
    """Return the keys of a parsed TOML file: ``[name]`` with key, and perhaps models and rpm.

    Raises:
        ValueError: one of them is wrong; the text completes "client_keys=FILE from … ", and
            never holds a key.
    """
    if not table:
        raise ValueError('names no client; write [name] and under it key = "…"')
    if len(table) > MAX_KEYS:
        raise ValueError(f"names more than {MAX_KEYS} clients")
    keys = tuple(_parse_one(name, entry) for name, entry in table.items())
    if len({key.digest for key in keys}) != len(keys):
        raise ValueError("gives one key to two clients; nobody could tell them apart")
    return keys


def _parse_one(name: str, entry: object) -> ClientKey:
    where = f"in [{name[:64]}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f'has {name[:64]!r} outside a table; write [name] and under it key = "…"')
    unknown = sorted(set(entry) - _FIELDS)
    if unknown:
        raise ValueError(f"has the unknown key {unknown[0]!r} {where}; these are: key, models, rpm")
    key, models, rpm = entry.get("key"), entry.get("models", ["*"]), entry.get("rpm")
    if not isinstance(key, str) or not MIN_KEY <= len(key) <= MAX_KEY or not _is_token(key):
        raise ValueError(
            f"has no usable key {where}; write {MIN_KEY} to {MAX_KEY} visible ASCII characters, "
            "as `openssl rand -hex 24` prints them"
        )
    if not isinstance(models, list) or not models or len(models) > MAX_GLOBS:
        raise ValueError(f'has no list of models {where}; write models = ["llama3*"]')
    if not all(isinstance(glob, str) and glob for glob in models):
        raise ValueError(f"has a model that is no text {where}")
    if rpm is not None and (type(rpm) is not int or not 1 <= rpm <= MAX_RPM):
        raise ValueError(f"has an rpm that is no number from 1 to {MAX_RPM} {where}")
    return ClientKey(name, _digest(key), tuple(models), rpm)


class ClientKeys:
    """Tells clients apart by their keys and counts their requests."""

    def __init__(self, keys: Iterable[ClientKey]) -> None:
        self._keys = tuple(keys)
        self._buckets: dict[str, _Bucket] = {}

    def replace(self, keys: Iterable[ClientKey]) -> None:
        """Let newer keys hold from now on; who keeps its limit keeps its count."""
        before = {key.name: key.rpm for key in self._keys}
        self._keys = tuple(keys)
        kept = {key.name for key in self._keys if before.get(key.name) == key.rpm}
        self._buckets = {name: b for name, b in self._buckets.items() if name in kept}

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> ClientKey | KeyRefusal:
        """Return whose key a request shows.

        Args:
            headers: (name in lower case, value).
        """
        shown = _shown(headers)
        if shown is None:
            return NO_KEY
        digest = sha256(shown).digest()
        found: ClientKey | None = None
        for key in self._keys:  # all of them, whichever it is
            if hmac.compare_digest(key.digest, digest):
                found = key
        return WRONG_KEY if found is None else found

    def permit(
        self, client: ClientKey, model: str | None, *, computes: bool, now: float
    ) -> KeyRefusal | None:
        """Say why a client may not have this request now; count it if it may.

        Args:
            model: that the request names.
            computes: whether an engine computes for it; what else engines offer (deleting a
                model, say) is for those that may have any model.
            now: seconds on a monotonic clock.
        """
        if not client.any_model:
            if not computes:
                return KeyRefusal(
                    403, "not_allowed", "this API key is for asking models, and nothing else"
                )
            if model is None or not client.allows(model):
                named = "no model" if model is None else f"the model {model!r}"
                return KeyRefusal(
                    403, "model_not_allowed", f"this API key is not for {named}; ask for another"
                )
        if client.rpm is None:
            return None
        bucket = self._buckets.setdefault(client.name, _Bucket(float(client.rpm), now))
        wait = bucket.take(client.rpm, now)
        if not wait:
            return None
        return KeyRefusal(
            429,
            "rate_limit_exceeded",
            f"this API key is for {client.rpm} requests a minute; wait {math.ceil(wait)} s",
            retry_after=math.ceil(wait),
        )


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float

    def take(self, rpm: int, now: float) -> float:
        """Take one token, and return 0; or return the seconds until there is one."""
        self.tokens = min(float(rpm), self.tokens + (now - self.at) * rpm / 60)
        self.at = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) * 60 / rpm


def _shown(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that a request shows; Authorization goes before x-api-key."""
    other: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and value.strip():
            other = value.strip()
    return other


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _is_token(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key
