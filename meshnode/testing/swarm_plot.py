"""A swarm's report as a picture, for which matplotlib must be there (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnode.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = Mapping[str, Any]


def check_plotting() -> None:
    """Find out before a long run whether its report can be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed; run: pip install 'meshnode[plot]'"
        ) from exc


def draw(report: Report, path: Path) -> None:
    """Write ``report`` to ``path`` as a PNG.

    Raises:
        ConfigError: matplotlib is missing, or the file can't be written.
    """
    check_plotting()
    # The figure alone: pyplot would look for a screen, and keep what it draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    _draw_convergence(upper, report["convergence"])
    _draw_detection(lower, report["deaths"])
    figure.suptitle(
        f"{report['nodes']} nodes on {report['mesh']}, {report['duration_s']:.0f} s, "
        f"seed {report['seed']}: {report['false_evictions']} false evictions"
    )
    try:
        figure.savefig(path, format="png", dpi=100)
    except OSError as exc:
        raise ConfigError(f"--plot {path} can't be written: {exc.strerror or exc}") from exc


def _draw_convergence(axes: Axes, convergences: Sequence[Report]) -> None:
    axes.set_title("Until every ledger was right")
    axes.set_ylabel("seconds")
    positions = range(len(convergences))
    for name, offset in (("p50_s", -0.25), ("p99_s", 0.0), ("max_s", 0.25)):
        heights = [one[name] or 0.0 for one in convergences]
        axes.bar([p + offset for p in positions], heights, width=0.22, label=name[:-2])
    axes.set_xticks(list(positions), [one["after"] for one in convergences])
    axes.legend()


def _draw_detection(axes: Axes, deaths: Sequence[Report]) -> None:
    axes.set_title("Until a death was noticed: share of the survivors")
    axes.set_xlabel("seconds after the death")
    axes.set_ylim(0, 1.02)
    for death in deaths:
        after = sorted(death["detected_after_s"].values())
        survivors = len(after) + len(death["unnoticed_by"])
        if survivors:
            shares = [(rank + 1) / survivors for rank in range(len(after))]
            axes.step([0.0, *after], [0.0, *shares], where="post", label=f"node {death['node']}")
    if 0 < len(deaths) <= 12:
        axes.legend(ncols=3)
