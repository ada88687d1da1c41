"""The verbs, put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import typer

from meshnode import __version__

_COMPLETION_VARIABLE = "_MESHNODE_COMPLETE"


# What stands behind such a verb is read as meshnode up would read it.
_FLAGS_OF_UP = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(frozen=True, slots=True)
class _Verb:
    """One verb, and where its function stands; it is loaded only where it is asked for."""

    name: str
    place: str  # module.function in this package
    short_help: str
    takes_flags_of_up: bool = False

    def load(self) -> Callable[..., None]:
        module, _, function = self.place.partition(".")
        loaded: Callable[..., None] = getattr(import_module(f"meshnode.cli.{module}"), function)
        return loaded


_VERBS = (
    _Verb("up", "up.up", "Run a node until it is told to stop."),
    _Verb("status", "queries.status", "Show what this node is and does."),
    _Verb("peers", "queries.peers", "Show every node of the mesh."),
    _Verb("explain", "explain.explain", "Show who would serve a request, and why."),
    _Verb("top", "top.top", "Watch the mesh and its decisions live."),
    _Verb("ping", "ping.ping", "Measure round trips to a peer."),
    _Verb("forward", "forward.forward", "Open a local port for each peer."),
    _Verb("gpus", "gpus.gpus", "Show what this host's GPUs say."),
    _Verb("drain", "drain.drain", "Finish what runs, then leave."),
    _Verb("doctor", "doctor.doctor", "Find out what a node lacks here.", takes_flags_of_up=True),
    _Verb("demo", "demo.demo", "Show a whole mesh on this machine."),
    _Verb("swarm", "swarm.swarm", "Run many nodes in one process."),
)
_TOKEN_VERBS = (
    _Verb("new", "token.new", "Print a new token."),
    _Verb("show", "token.show", "Show what a token says, never its key."),
    _Verb("rotate", "token_rotate.rotate", "Change a network's key while nodes run."),
)
_CONFIG_VERBS = (
    _Verb("show", "settings.show", "Show every setting, and its source.", takes_flags_of_up=True),
    _Verb("check", "settings.check", "Say whether the settings hold.", takes_flags_of_up=True),
)


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
    _add(app, _VERBS, argv[:1], everything=completing)
    for name, verbs, about in (
        ("token", _TOKEN_VERBS, "Make a token, or see what one says."),
        ("config", _CONFIG_VERBS, "See what the settings are, and if they hold."),
    ):
        nested = _group(bare=completing or len(argv) < 2 or argv[1].startswith("-"), nested=True)
        wanted = argv[1:2] if argv[:1] == [name] else []
        _add(nested, verbs, wanted, everything=completing)
        app.add_typer(nested, name=name, help=about)
    return app


def _add(
    group: typer.Typer, verbs: Sequence[_Verb], wanted: Sequence[str], *, everything: bool
) -> None:
    """Add all verbs, and load those alone that may be run."""
    for verb in verbs:
        run = verb.load() if everything or verb.name in wanted else _only_listed
        group.command(
            verb.name,
            short_help=verb.short_help,
            context_settings=_FLAGS_OF_UP if verb.takes_flags_of_up else None,
        )(run)


def _only_listed() -> None:
    """Stand for a verb that this command line does not name."""


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
