"""What goes to stdout (data) and how it looks; everything else goes to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Wide enough for a row to stay one line where nobody's screen bounds it.
_PIPE_WIDTH = 240


def print_json(body: Mapping[str, object]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(body, indent=2, ensure_ascii=False), flush=True)


def say(message: str) -> None:
    """Print a line for people on stderr."""
    print(message, file=sys.stderr, flush=True)


def console(file: TextIO | None = None) -> Console:
    """Return a console; colours only on a terminal and without NO_COLOR."""
    from rich.console import Console

    file = file or sys.stdout
    width = None if file.isatty() else _PIPE_WIDTH
    return Console(file=file, width=width, highlight=False, soft_wrap=False, emoji=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table; a heading that begins with ``>`` is right-aligned.

    Cells are plain text: what peers call themselves must not colour or move the screen.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        right = heading.startswith(">")
        made.add_column(
            heading.removeprefix(">"), justify="right" if right else "left", no_wrap=True
        )
    for row in rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def plain(cell: object) -> str:
    """Return a value as text without control characters; ``-`` for unknown."""
    if cell is None or cell == "":
        return "-"
    return "".join(c if c.isprintable() else "?" for c in str(cell))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout."""
    console().print(table(columns, rows))
