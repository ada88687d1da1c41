"""``meshnode doctor``: looks at everything a node needs, and says what mends what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from meshnode.cli.output import plain, print_json, say
from meshnode.cli.settings import settings_of
from meshnode.errors import MeshnodeError

if TYPE_CHECKING:
    from meshnode.cli.findings import Finding

_SIGNS = {"ok": "ok  ", "warning": "warn", "failed": "FAIL", "skipped": "-   "}


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check token, clock, ports, mDNS, bootstraps, GPUs, services, file limit, state folder.

    Takes the flags of meshnode up, and looks at what a node with these settings would need. It
    may be run beside the node, and changes nothing; without a token it asks the node that runs
    here about itself. Ends with 1 if something fails.
    """
    findings: list[Finding] = []
    for finding in _findings(context.args):
        findings.append(finding)
        if not as_json:
            _print(finding)
    failed = sum(finding.verdict == "failed" for finding in findings)
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "ok": not failed,
                "checks": [asdict(finding) for finding in findings],
            }
        )
    elif failed:
        say(f"{failed} of {len(findings)} checks failed")
    if failed:
        raise typer.Exit(1)


def _findings(words: Sequence[str]) -> Iterable[Finding]:
    from meshnode.cli.findings import Finding, examine

    try:
        settings = settings_of(words)
    except MeshnodeError as exc:
        return [Finding("settings", "failed", str(exc), "meshnode config show")]
    return examine(settings)


def _print(finding: Finding) -> None:
    line = f"{_SIGNS[finding.verdict]}  {finding.check:<12} {plain(finding.message)}"
    if finding.mend is not None and finding.verdict in ("failed", "warning"):
        line += f"; run: {finding.mend}"
    print(line, flush=True)
