"""The metrics are clean, and the dashboard and alert rules speak of metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from meshnode.metrics import Metrics

yaml = pytest.importorskip("yaml")

OPS = Path(__file__).resolve().parents[2] / "ops"
RULES = yaml.safe_load((OPS / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((OPS / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
SELECTOR = re.compile(r"(meshnode_\w+)(\{[^}]*\})?")


def exposed() -> str:
    """What a node exposes, each labelled metric with one series so that its labels show."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        names = getattr(metric, "_labelnames", ())
        if names:
            metric.labels(*("x" for _ in names))
    return generate_latest(metrics.registry).decode()


TEXT = exposed()
FAMILIES = list(text_string_to_metric_families(TEXT))
LABELS: dict[str, set[str]] = {}
for _family in FAMILIES:
    for _sample in _family.samples:
        LABELS.setdefault(_sample.name, set()).update(_sample.labels)
# Those that CLI.md's readers hold on to.
PROMISED = {
    "meshnode_peers": {"state"},
    "meshnode_announcements_total": {"direction"},
    "meshnode_announcements_rejected_total": {"reason"},
    "meshnode_available_vram_bytes": set(),
    "meshnode_in_flight": {"service"},
    "meshnode_routing_decisions_total": {"tier"},
    "meshnode_tunnels_total": {"role", "outcome"},
    "meshnode_tunnel_bytes_total": {"direction"},
    "meshnode_tunnel_open_seconds_bucket": {"le"},
    "meshnode_request_ttft_seconds_bucket": {"le"},
    "meshnode_retries_total": {"reason"},
    "meshnode_ejections_total": {"reason"},
    "meshnode_gpu_read_errors_total": {"code"},
    "meshnode_loop_lag_seconds_bucket": {"le"},
    "meshnode_build_info": {"version", "python"},
}


def test_every_promised_metric_is_there_with_its_labels() -> None:
    assert {name: LABELS.get(name) for name in PROMISED} == PROMISED


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_metric_is_named_as_prometheus_lint_wants_it(family: Any) -> None:
    name = family.name
    assert re.fullmatch(r"meshnode_[a-z0-9]+(_[a-z0-9]+)*", name)
    assert len(family.documentation.split()) >= 2
    assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|gib|percent)(_|$)", name), "base units"
    assert not re.search(r"_(counter|gauge|histogram)(_|$)", name), "no types in names"
    if family.type == "histogram":
        assert name.endswith(("_seconds", "_bytes")), "a unit"
    # The parser takes _total off a counter's name; no name may end in it, or like a part.
    assert not name.endswith(("_total", "_sum", "_count", "_bucket"))
    for sample in family.samples:
        assert not {"peer", "peer_id", "instance", "job"} & set(sample.labels)
        assert all(re.fullmatch(r"[a-z_]+", label) for label in sample.labels)


def test_promtool_finds_nothing() -> None:
    # scripts/setup dev puts it beside the interpreter, which need not be in the PATH.
    beside = str(Path(sys.executable).parent)
    promtool = shutil.which("promtool") or shutil.which("promtool", path=beside)
    if promtool is None:
        pytest.skip("promtool is not here; on Debian as root, scripts/setup dev fetches it")
    for argv, given in (
        (["check", "metrics"], TEXT),
        (["check", "rules", str(OPS / "alerts.yml")], ""),
    ):
        result = subprocess.run(
            [promtool, *argv], input=given, capture_output=True, text=True, timeout=30, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def unknown_in(expression: str) -> list[str]:
    """What an expression asks for that no node exposes."""
    wrong = []
    for name, selector in SELECTOR.findall(expression):
        if name not in LABELS:
            wrong.append(name)
            continue
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector)) - {"instance", "job"}
        wrong += [f"{name}{{{label}}}" for label in wanted - LABELS[name]]
    return wrong


def test_an_expression_with_a_wrong_name_or_label_would_be_found() -> None:
    assert unknown_in('rate(meshnode_nothing_total[5m]) + meshnode_peers{colour="red"}') == [
        "meshnode_nothing_total",
        "meshnode_peers{colour}",
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_asks_for_what_exists_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert unknown_in(rule["expr"]) == []
    assert rule["expr"].count("(") == rule["expr"].count(")")
    assert rule["labels"]["severity"] in ("warning", "critical")
    description = rule["annotations"]["description"]
    assert len(description) > 60
    assert re.search(r"\b(run|see|look|compare|add|keep|give|meshnode)\b", description, re.I)
    assert "{{" in rule["annotations"]["summary"] or "%" in rule["annotations"]["summary"]


def test_the_commands_that_alerts_name_exist() -> None:
    from meshnode.cli.app import build_app

    app = build_app(["--help"])
    verbs = {command.name for command in app.registered_commands}
    told = " ".join(rule["annotations"]["description"] for rule in RULES)
    named = set(re.findall(r"meshnode (doctor|peers|status|gpus|explain|top)\b", told))
    assert named and named <= verbs


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_asks_for_what_exists(panel: dict[str, Any]) -> None:
    assert panel["description"]
    for target in panel["targets"]:
        assert unknown_in(target["expr"]) == []


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] >= 0 and grid["x"] + grid["w"] <= 24
