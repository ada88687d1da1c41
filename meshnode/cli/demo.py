"""``meshnode demo``: the verb; what it does stands in ``demo_run``."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    once: Annotated[
        bool, typer.Option("--once", help="End when the demo is over, with 0 if it went well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a whole mesh on this machine.

    Three nodes, a proxy, a streamed chat, then eight at once. Needs no GPU and no model: the
    nodes pretend 8, 16 and 24 GiB, and a small built-in engine answers.
    """
    from meshnode.cli.demo_run import run_demo

    raise typer.Exit(run_demo(once=once, as_json=as_json))
