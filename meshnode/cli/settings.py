"""``meshnode config``: what the settings are, where each came from, and whether they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Annotated

import typer

from meshnode.cli.output import print_json, print_table, say
from meshnode.cli.up import flags_of, read_settings, up
from meshnode.config import Config, check_together, field_names
from meshnode.errors import MeshnodeError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Settings that hold one value for each service, written NAME=VALUE.
_BY_SERVICE = frozenset({"health", "max_in_flight"})
_COLUMNS = ("SETTING", "VALUE", "FROM")


def show(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show every setting as meshnode up would use it, and where its value came from.

    Takes the flags of meshnode up. Tokens and keys are never shown.
    """
    settings = settings_of(context.args)
    problem = _problem(settings)
    if as_json:
        rows = {
            key: {"value": _plain(value), "source": settings.sources[key]}
            for key, value in _values(settings)
        }
        told = None if problem is None else str(problem)
        print_json(
            {
                "schema_version": 1,
                "settings": rows,
                "tokens": len(settings.token_texts),
                "problem": told,
                "warnings": list(settings.warnings),
            }
        )
    else:
        print_table(_COLUMNS, _rows(settings))
    for warning in settings.warnings:
        say(f"warning: {warning}")
    if problem is not None:
        raise problem


def check(context: typer.Context, as_json: JsonOption = False) -> None:
    """Say whether meshnode up could start with these settings; starts nothing.

    Takes the flags of meshnode up. meshnode doctor also looks at the machine.
    """
    settings = settings_of(context.args)
    problem = _problem(settings)
    if as_json:
        told = None if problem is None else str(problem)
        print_json(
            {
                "schema_version": 1,
                "ok": problem is None,
                "problem": told,
                "warnings": list(settings.warnings),
            }
        )
    for warning in settings.warnings:
        say(f"warning: {warning}")
    if problem is not None:
        raise problem
    if not as_json:
        said = sum(source != "default" for source in settings.sources.values())
        print(f"ok: {said} settings said, the rest are defaults; see meshnode config show")


def settings_of(words: Sequence[str]) -> Config:
    """Return what ``meshnode up`` followed by ``words`` would run with, whether it holds or not.

    Raises:
        ConfigError: a value or a name is wrong.
    """
    app = typer.Typer(add_completion=False)
    app.command("up")(up)
    with typer.main.get_command(app).make_context("meshnode up", list(words)) as context:
        path = context.params.get("config")
        return read_settings(
            flags_of(context.params), path if isinstance(path, str) else None, must_hold=False
        )


def _problem(settings: Config) -> MeshnodeError | None:
    """Return why these settings can't run a node; None if they can."""
    from meshnode.core.token import decode_all

    try:
        check_together(settings)
        decode_all(settings.token_texts)
    except MeshnodeError as exc:
        return exc
    return None


def _rows(settings: Config) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for key, value in _values(settings):
        rows.append((key, _written(value), settings.sources[key]))
    hidden = f"(hidden: {len(settings.token_texts)})" if settings.token_texts else None
    rows.append(("token", hidden, settings.sources.get("token", settings.sources["token_file"])))
    return rows


def _values(settings: Config) -> Iterator[tuple[str, object]]:
    for key in field_names():
        value = getattr(settings, key)
        yield key, dict(value) if key in _BY_SERVICE else value


def _written(value: object) -> str:
    """Return a setting as a flag takes it, and ``-`` where there is none."""
    if isinstance(value, Mapping):
        value = tuple(f"{name}={each}" for name, each in value.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return str(value).lower()  # as the environment and the file take it
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)


def _plain(value: object) -> object:
    """Return a setting as JSON holds it: addresses and services as people write them."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return str(value) if type(value).__str__ is not object.__str__ else asdict(value)
    return value
