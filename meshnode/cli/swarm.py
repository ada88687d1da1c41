"""``meshnode swarm``: the verb; what it does stands in ``swarm_run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHEN = "seconds after the first convergence"


def swarm(
    nodes: Annotated[int, typer.Option("-n", "--nodes", help="How many nodes.")] = 20,
    mesh: Annotated[
        str,
        typer.Option(
            "--mesh", help="memory (virtual clock, links can be cut) or libp2p (real sockets)."
        ),
    ] = "memory",
    seed: Annotated[
        int, typer.Option("--seed", help="Of all dice; on the memory mesh the report repeats.")
    ] = 0,
    duration: Annotated[
        float | None,
        typer.Option("--duration", help=f"When to end, in {_WHEN}; default: 30, or longer."),
    ] = None,
    kill: Annotated[
        list[str] | None,
        typer.Option("--kill", help="WHO@AT: end without a goodbye, e.g. 10%@5, 3@5, #7@5."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="WHO@AT: leave with a goodbye.")
    ] = None,
    restart: Annotated[
        list[str] | None,
        typer.Option("--restart", help="WHO@AT: run dead ones again, e.g. all@15."),
    ] = None,
    cut: Annotated[
        list[str] | None,
        typer.Option("--cut", help="WHO@AT+FOR: part them from the rest (memory mesh)."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option("--freeze", help="WHO@AT+FOR: stop them as SIGSTOP does (memory mesh)."),
    ] = None,
    skew: Annotated[
        list[str] | None,
        typer.Option("--skew", help="WHO:SECONDS@AT: set their clocks, e.g. 20%:-3600@2."),
    ] = None,
    loss: Annotated[
        float, typer.Option("--loss", help="Share of announcements lost per link (memory mesh).")
    ] = 0.0,
    interval: Annotated[
        float, typer.Option("--interval", help="Seconds between announcements of a node.")
    ] = 10.0,
    patience: Annotated[
        float, typer.Option("--patience", help="Seconds that a convergence may take.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the report to this PNG file.")
    ] = None,
    log_level: Annotated[
        str, typer.Option("--log-level", help="What the nodes log: debug … error.")
    ] = "error",
) -> None:
    """Run many nodes in this process, with churn and cuts, and report what the mesh did.

    Times count in seconds from the moment when every ledger was complete. Without any of
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
