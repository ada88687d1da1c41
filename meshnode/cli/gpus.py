"""``meshnode gpus``: what each reader of GPU memory says on this host."""

from __future__ import annotations

from typing import Annotated

import typer

from meshnode.cli.output import print_json, print_table, say
from meshnode.values import format_size, parse_size

_COLUMNS = ("SOURCE", "GPU", "NAME", ">FREE", ">TOTAL", "ANNOUNCED", "SAYS")


def gpus(
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Pretend, as meshnode up --vram would.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show this host's GPUs and what would be announced."""
    from dataclasses import asdict

    from meshnode.gpu.probe import describe, find_readers

    try:
        pretended = None if vram is None else parse_size(vram)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--vram") from exc
    rows = describe(find_readers(pretended))
    if as_json:
        print_json({"schema_version": 1, "gpus": [asdict(row) for row in rows]})
        return
    print_table(
        _COLUMNS,
        [
            (
                row.source,
                row.index,
                row.name,
                format_size(row.available),
                format_size(row.total),
                "yes" if row.announced else "no",
                row.message or ("the system's own memory" if row.shared else ""),
            )
            for row in rows
        ],
    )
    for row in rows:
        if row.advice:
            say(f"{row.source}: {row.advice}")
