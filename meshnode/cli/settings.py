"""``meshnode config``: what the settings are, where each came from, and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Annotated

import typer

from meshnode.cli.output import print_json, print_table, say
from meshnode.cli.up import flags_of, read_settings, up
from meshnode.config import Config, check_together, field_names
from meshnode.errors import MeshnodeError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_COLUMNS = ("SETTING", "VALUE", "FROM")


def show(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show every setting as meshnode up would use it, and where its value came from.

    Takes the flags of meshnode up. Tokens and keys are never shown.
    """
    settings = settings_of(context.args)
    problem = _problem(settings)
    if as_json:
        rows = {
            key: {"value": _plain(getattr(settings, key)), "source": settings.sources[key]}
            for key in field_names()
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
    for key in field_names():
        value = getattr(settings, key)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        rows.append((key, "-" if shown is None else str(shown), settings.sources[key]))
    hidden = f"(hidden: {len(settings.token_texts)})" if settings.token_texts else None
    rows.append(("token", hidden, settings.sources.get("token", settings.sources["token_file"])))
    return rows


def _plain(value: object) -> object:
    """Return a setting as JSON holds it: addresses and services as people write them."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return str(value) if type(value).__str__ is not object.__str__ else asdict(value)
    return value
