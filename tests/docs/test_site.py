"""The documentation builds strictly, asks nobody for anything, and describes what is there."""

from __future__ import annotations

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
