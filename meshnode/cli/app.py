"""The verbs, put together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from meshnode import __version__
from meshnode.cli import (
    demo,
    doctor,
    drain,
    forward,
    gpus,
    ping,
    queries,
    settings,
    swarm,
    token,
    token_rotate,
    top,
    up,
)

_COMPLETION_VARIABLE = "_MESHNODE_COMPLETE"


def invoke(argv: Sequence[str]) -> int:
    """Run one command; usage errors are told on stderr and end with 2."""
    try:
        build_app(argv)(args=list(argv), prog_name="meshnode", complete_var=_COMPLETION_VARIABLE)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    return 0


def build_app(argv: Sequence[str]) -> typer.Typer:
    """Return the command line for ``argv``.

    Typer loads pydantic to look at the value of any option, also one that was not given, and a
    verb's --help can't wait for that. So the options of a group, --help and those that install
    shell completion, are left off where a verb follows it.
    """
    completing = _COMPLETION_VARIABLE in os.environ
    app = _group(bare=completing or not argv or argv[0].startswith("-"))
    app.callback()(_options)
    app.command("up", short_help="Run a node until it is told to stop.")(up.up)
    app.command("status", short_help="Show what this node is and does.")(queries.status)
    app.command("peers", short_help="Show every node of the mesh.")(queries.peers)
    app.command("explain", short_help="Show who would serve a request, and why.")(queries.explain)
    app.command("top", short_help="Watch the mesh and its decisions live.")(top.top)
    app.command("ping", short_help="Measure round trips to a peer.")(ping.ping)
    app.command("forward", short_help="Open a local port for each peer.")(forward.forward)
    app.command("gpus", short_help="Show what this host's GPUs say.")(gpus.gpus)
    app.command("drain", short_help="Finish what runs, then leave.")(drain.drain)
    app.command(
        "doctor",
        short_help="Find out what a node lacks here.",
        context_settings=settings.FLAGS_OF_UP,
    )(doctor.doctor)
    app.command("demo", short_help="Show a whole mesh on this machine.")(demo.demo)
    app.command("swarm", short_help="Run many nodes in one process.")(swarm.swarm)
    tokens = _group(bare=completing or len(argv) < 2 or argv[1].startswith("-"), nested=True)
    tokens.command("new")(token.new)
    tokens.command("show")(token.show)
    tokens.command("rotate")(token_rotate.rotate)
    app.add_typer(tokens, name="token", help="Make a token, or see what one says.")
    configs = _group(bare=completing or len(argv) < 2 or argv[1].startswith("-"), nested=True)
    configs.command("show", context_settings=settings.FLAGS_OF_UP)(settings.show)
    configs.command("check", context_settings=settings.FLAGS_OF_UP)(settings.check)
    app.add_typer(configs, name="config", help="See what the settings are, and if they hold.")
    return app


def _group(*, bare: bool, nested: bool = False) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        # Plain help: the rich one takes a tenth of a second longer, and pipes badly.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_help_option=bare,
        add_completion=bare and not nested,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"meshnode {__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and end.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Join GPU hosts into one mesh: every request reaches the best free GPU."""
