"""The documentation builds strictly, asks nobody for anything, and describes what is there."""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed; scripts/setup dev installs it")
pytest.importorskip("material", reason="mkdocs-material is not installed; scripts/setup dev does")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Fetched(HTMLParser):
    """What a browser would fetch by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.urls.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.urls.append(given.get("href") or "")


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = _Fetched()
        fetched.feed(page.read_text())
        assert fetched.urls
        outside = [url for url in fetched.urls if re.match(r"(https?:)?//", url)]
        assert outside == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style


def test_every_protocol_metric_and_setting_has_its_place(site: Path) -> None:
    from meshnode.config import field_names
    from meshnode.metrics import Metrics

    for spec in (ROOT / "protocols").rglob("SPEC.md"):
        assert (site / spec.relative_to(ROOT).with_suffix("") / "index.html").exists(), spec
    metrics = (site / "generated/metrics/index.html").read_text()
    for metric in vars(Metrics()).values():
        if hasattr(metric, "describe"):
            assert next(iter(metric.describe())).name in metrics
    settings = (site / "generated/settings/index.html").read_text()
    assert [name for name in field_names() if f"<code>{name}</code>" not in settings] == []


def test_the_command_line_is_shown_as_help_prints_it(site: Path) -> None:
    page = html.unescape((site / "generated/commands/index.html").read_text())
    for words in (["up"], ["peers"], ["token", "rotate"], ["config", "show"]):
        done = subprocess.run(
            [sys.executable, "-m", "meshnode", *words, "--help"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert f"Usage: meshnode {' '.join(words)} " in page
        options = set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M))
        section = page.partition(f"Usage: meshnode {' '.join(words)} ")[2].partition("Usage:")[0]
        assert options <= set(re.findall(r"--[a-z-]+", section)), words


def test_the_tests_directions_are_not_shown(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "<!-- not run" not in page.read_text()
        assert "<!-- on " not in page.read_text()


LEVELS = ("debug", "info", "warning", "error", "exception")


def _levels_in(node: ast.AST) -> set[str]:
    """The levels of a logger's methods named below ``node``."""
    return {
        "error" if inner.attr == "exception" else inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and inner.attr in LEVELS
        and ast.unparse(inner.value).rpartition(".")[2].lstrip("_") == "log"
    }


def logged_events() -> dict[str, set[str]]:
    """Every event that the source logs, with its levels; an exception is an error."""
    events: dict[str, set[str]] = {}
    for path in (ROOT / "meshnode").rglob("*.py"):
        tree = ast.parse(path.read_text())
        # A method that was chosen before it is called: log = _log.info if … else _log.warning
        chosen = {
            target.id: _levels_in(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and _levels_in(node.value)
        }
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            if isinstance(call.func, ast.Name):
                levels = chosen.get(call.func.id, set())
            else:
                levels = _levels_in(call.func) if isinstance(call.func, ast.Attribute) else set()
            if levels:
                assert call.args and isinstance(call.args[0], ast.Constant), (
                    f"{path}:{call.lineno} logs an event that is no constant"
                )
                events.setdefault(str(call.args[0].value), set()).update(levels)
    return events


def test_every_log_event_is_described_with_its_level_and_no_other() -> None:
    page = (ROOT / "docs/log-events.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z, ]+) \| (.+) \|$", page, re.M)
    described = {event: set(levels.split(", ")) for event, levels, _ in rows}
    assert len(rows) == len(described), "an event stands there twice"
    assert described == logged_events()
    assert all(len(meaning.split()) >= 4 for _, _, meaning in rows)
