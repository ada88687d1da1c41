"""Text to values, each error with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from meshnode.config.settings import field_names
from meshnode.config.sources import Said
from meshnode.errors import ConfigError
from meshnode.values import parse_bool, plain_table

T = TypeVar("T")


class Reader:
    """Turns what was said into values and remembers the sources."""

    def __init__(self, said: Mapping[str, Said]) -> None:
        self.said = said
        self.sources = dict.fromkeys(field_names(), "default")
        self.sources.update({key: entry.source for key, entry in said.items()})

    def one(self, key: str, parse: Callable[[str], T], default: T) -> T:
        entry = self.said.get(key)
        if entry is None:
            return default
        return self._parse(key, entry.value, parse)

    def optional(self, key: str, parse: Callable[[str], T | None]) -> T | None:
        return self.one(key, parse, None)

    def many(
        self, key: str, parse: Callable[[str], T], default: tuple[T, ...] = ()
    ) -> tuple[T, ...]:
        entry = self.said.get(key)
        if entry is None:
            return default
        return tuple(self._parse(key, item, parse) for item in _items(entry.value))

    def switch(self, key: str, default: bool) -> bool:
        return self.one(key, parse_bool, default)

    def fail(self, key: str, reason: str) -> NoReturn:
        raise ConfigError(f"{key}={self.shown(key)} from {self.sources[key]} {reason}")

    def _parse(self, key: str, raw: object, parse: Callable[[str], T]) -> T:
        try:
            return parse(as_text(raw))
        except ValueError as exc:
            source = self.sources[key]
            raise ConfigError(f"{key}={as_text(raw)} from {source} {exc}") from exc

    def shown(self, key: str) -> str:
        return ",".join(as_text(item) for item in _items(self.said[key].value))


def as_text(raw: object) -> str:
    """Return one value of any source as a person would write it on the command line."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    return str(raw)


def _items(raw: object) -> list[object]:
    """Split what may hold several values: a list, a TOML table of names, or text with commas."""
    if isinstance(raw, str):
        return [item for item in raw.replace(",", " ").split() if item]
    table = plain_table(raw)
    if table is not None:
        return [f"{key}={as_text(value)}" for key, value in table.items()]
    if isinstance(raw, (list, tuple)):
        return list(raw)
    return [raw]
