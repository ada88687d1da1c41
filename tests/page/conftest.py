"""A real Chromium, and what it saw go wrong on a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster import Cluster

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

OUT = Path(__file__).resolve().parents[2] / "out" / "page"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-first-run", "--disable-default-apps", "--no-default-browser-check"),
)
# A started browser may take a while on a busy machine; what it shows then may not.
START_TIMEOUT = 60_000  # ms


class Look:
    """One page in a browser, what it asked for, and what it complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, api: str) -> Any:
        self.page.goto(f"http://{api}/", timeout=START_TIMEOUT)
        self.page.wait_for_selector('#connection[data-state="live"]', timeout=20_000)
        return self.page

    def states(self) -> dict[str, str]:
        """What each row of the table says: name to state."""
        rows: dict[str, str] = self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll("#members-body tr")].map(
                (row) => [row.querySelector(".name").textContent,
                          row.querySelector(".state").textContent]))"""
        )
        return rows

    def keep(self, name: str, **how: Any) -> None:
        """Keep a picture of the page, for people."""
        OUT.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(OUT / f"{name}.png"), **how)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    # Playwright's own driver must not look for newer browsers either.
    os.environ["PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD"] = "1"
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(
            executable_path=CHROMIUM, args=list(ARGS), timeout=START_TIMEOUT
        )
        yield launched
        launched.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Look]:
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    context.set_default_timeout(20_000)
    yield Look(context.new_page())
    context.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()
