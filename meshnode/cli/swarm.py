"""``meshnode swarm``: the verb; what it does stands in ``swarm_run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHEN = "seconds after the first convergence"


def swarm(
    nodes: Annotated[int, typer.Option("-n", "--nodes", metavar="N", help="How many nodes.")] = 20,
    mesh: Annotated[
        str,
        typer.Option(
            "--mesh",
            metavar="memory|libp2p",
            help="On a virtual clock, with links that can be cut; or real sockets.",
        ),
    ] = "memory",
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="Of all dice; with the same one the memory mesh's report repeats.",
        ),
    ] = 0,
    duration: Annotated[
        float | None,
        typer.Option(
            "--duration",
            metavar="SECONDS",
            help=f"When to end, in {_WHEN}; default: 30, or longer.",
        ),
    ] = None,
    kill: Annotated[
        list[str] | None,
        typer.Option(
            "--kill", metavar="WHO@AT", help="End without a goodbye, e.g. 10%@5, 3@5, #7@5."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="WHO@AT", help="Leave with a goodbye.")
    ] = None,
    restart: Annotated[
        list[str] | None,
        typer.Option("--restart", metavar="WHO@AT", help="Run dead ones again, e.g. all@15."),
    ] = None,
    cut: Annotated[
        list[str] | None,
        typer.Option("--cut", metavar="WHO@AT+FOR", help="Part them from the rest (memory mesh)."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            "--freeze", metavar="WHO@AT+FOR", help="Stop them as SIGSTOP does (memory mesh)."
        ),
    ] = None,
    skew: Annotated[
        list[str] | None,
        typer.Option(
            "--skew",
            metavar="WHO:SECONDS@AT",
            help="Set their wall clocks ahead by SECONDS, e.g. 20%:-3600@2.",
        ),
    ] = None,
    loss: Annotated[
        float,
        typer.Option(
            "--loss",
            metavar="SHARE",
            help="The share of announcements that each link loses, 0 to 1 (memory mesh).",
        ),
    ] = 0.0,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", help="How often each node announces.")
    ] = 10.0,
    patience: Annotated[
        float,
        typer.Option("--patience", metavar="SECONDS", help="How long a convergence may take."),
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the report to this PNG file."),
    ] = None,
    log_level: Annotated[
        str,
        typer.Option(
            "--log-level",
            metavar="debug|info|warning|error",
            help="The least severe lines of the nodes that standard error gets.",
        ),
    ] = "error",
) -> None:
    """Run many nodes in this process, with churn and cuts, and report what the mesh did.

    WHO is a count (3), a share (10%), all, or one node (#7), AT and FOR are seconds; AT counts
    from the moment when every ledger was complete. Such flags may be repeated. Without any of
    --kill, --stop, --restart, --cut, --freeze and --skew a tenth is killed after 5 s and
    restarted after 15 s. Ends with 1 if the ledgers are not right at the end, or somebody
    alive was taken for dead.
    """
    from meshnode.cli.swarm_run import SwarmOrder, run_swarm

    said = {
        "kill": kill,
        "stop": stop,
        "restart": restart,
        "cut": cut,
        "freeze": freeze,
        "skew": skew,
    }
    order = SwarmOrder(
        nodes=nodes,
        mesh=mesh,
        seed=seed,
        duration=duration,
        said={action: tuple(texts or ()) for action, texts in said.items()},
        loss=loss,
        interval=interval,
        patience=patience,
        as_json=as_json,
        plot=plot,
        log_level=log_level,
    )
    raise typer.Exit(run_swarm(order))
