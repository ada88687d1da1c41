"""The verbs, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from meshnode import __version__
from meshnode.cli import demo, gpus, queries, token, up

# Plain help: the rich one takes a tenth of a second longer, and pipes badly.
_app = typer.Typer(
    name="meshnode",
    help="Join GPU hosts into one mesh: every request reaches the best free GPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_tokens = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_app.command("up")(up.up)
_app.add_typer(_tokens, name="token", help="Make a token, or see what one says.")
_tokens.command("new")(token.new)
_tokens.command("show")(token.show)
_app.command("status")(queries.status)
_app.command("peers")(queries.peers)
_app.command("explain")(queries.explain)
_app.command("gpus")(gpus.gpus)
_app.command("demo")(demo.demo)


def invoke(argv: Sequence[str]) -> int:
    """Run one command; usage errors are told on stderr and end with 2."""
    try:
        _app(args=list(argv), prog_name="meshnode")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"meshnode {__version__}")
        raise typer.Exit()


@_app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and end.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Join GPU hosts into one mesh: every request reaches the best free GPU."""
