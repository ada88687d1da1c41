"""Runs tests/faults and prints one row for each fault, with the figures of every round."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """One test over all rounds."""

    name: str
    outcomes: list[str] = field(default_factory=list)  # passed, failed, skipped
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if "failed" in self.outcomes:
            return f"FAIL {self.outcomes.count('failed')}/{len(self.outcomes)}"
        return "skip" if set(self.outcomes) == {"skipped"} else "pass"

    @property
    def words(self) -> str:
        made = []
        for what, seen in self.figures.items():
            values = sorted(one["value"] for one in seen)
            unit, limit = seen[0]["unit"], seen[0]["limit"]
            shown = _number(median(values)) + (
                f" ({_number(values[0])}-{_number(values[-1])})" if len(values) > 1 else ""
            )
            sign = "≥" if seen[0]["is_floor"] else "≤"
            held = f", limit {sign} {_number(limit)}" if limit is not None else ""
            made.append(f"{what}: {shown} {unit}".rstrip() + held)
        return "\n".join([*made, *dict.fromkeys(self.reasons)])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


class Collector:
    """The pytest plugin that keeps what each test noted."""

    def __init__(self, rows: dict[str, Row], progress: bool) -> None:
        self._rows = rows
        self._progress = progress

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        failed_around = report.when != "call" and report.outcome != "passed"
        if report.when != "call" and not failed_around:
            return
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        row = self._rows.setdefault(name, Row(name))
        row.outcomes.append(report.outcome)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row.reasons.append(str(report.longrepr[2]).removeprefix("Skipped: "))
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            row.reasons.append((crash.message if crash else str(report.longrepr))[:200])
        for key, figure in report.user_properties:
            if key == "figure":
                row.figures.setdefault(figure["what"], []).append(figure)
        if self._progress:
            print(f"{report.outcome:<8} {name} ({report.duration:.0f} s)", file=sys.stderr)
            for line in row.words.splitlines():
                print(f"         {line}", file=sys.stderr)
            sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="rounds (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-k", dest="words", help="only rows that match, as for pytest")
    args = parser.parse_args()
    rows: dict[str, Row] = {}
    os.chdir(ROOT)
    for number in range(args.times):
        print(f"round {number + 1} of {args.times}", file=sys.stderr, flush=True)
        chosen = ["-k", args.words] if args.words else []
        options = ["tests/faults", "-m", "", "-q", "--strict-figures", "--tb=short", *chosen]
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            pytest.main(options, plugins=[Collector(rows, progress=True)])
    if args.json:
        told = [
            {
                "fault": row.name,
                "verdict": row.verdict,
                "outcomes": row.outcomes,
                "figures": row.figures,
                "reasons": row.reasons,
            }
            for row in rows.values()
        ]
        print(json.dumps({"schema_version": 1, "rounds": args.times, "rows": told}, indent=2))
    else:
        _print_table(list(rows.values()))
    return 0 if rows and all("FAIL" not in row.verdict for row in rows.values()) else 1


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    for heading in ("Fault", "Verdict", "Figures: median (least-most)"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.name, row.verdict, row.words)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
