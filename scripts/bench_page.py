"""What an update of the page costs a browser at 200 members, in Chromium's own measure.

    .venv/bin/python scripts/bench_page.py [NODES]

Twenty members change four times a second. Script is the page's own code for one update (a
performance.measure around it); the means add what follows it, style and layout, and whatever
else the page does, in CPU time of the page's thread, from the browser's Performance.getMetrics
over the run, so that a busy machine does not show in them. A frame at 60 Hz lasts 16.7 ms.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20
PARTS = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")
MEASURES = "performance.getEntriesByName('meshnode-update').map((each) => each.duration)"


def main() -> int:
    nodes = sys.argv[1] if len(sys.argv) > 1 else "200"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium here; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    argv = [sys.executable, "-m", "support.page_mesh", "--nodes", nodes, "--churn", "20"]
    mesh = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert mesh.stdout is not None
        api = json.loads(mesh.stdout.readline())["api"]
        report(measure(chromium, api), int(nodes))
    finally:
        mesh.kill()
        mesh.wait(10)
    return 0


def measure(chromium: str, api: str) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"http://{api}/")
        page.wait_for_selector('#connection[data-state="live"]')
        page.wait_for_timeout(2000)
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def spent() -> dict[str, float]:
            told = session.send("Performance.getMetrics")["metrics"]
            return {each["name"]: each["value"] for each in told if each["name"] in PARTS}

        first = page.evaluate(MEASURES)[0]
        page.evaluate("performance.clearMeasures()")
        before = spent()
        page.wait_for_timeout(SECONDS * 1000)
        after = spent()
        updates = sorted(page.evaluate(MEASURES))
        browser.close()
    return {
        "first": first,
        "updates": updates,
        "parts": {name: (after[name] - before[name]) * 1000 for name in PARTS},
    }


def report(result: dict[str, Any], nodes: int) -> None:
    updates = result["updates"]
    half, late = statistics.median(updates), updates[int(len(updates) * 0.95)]
    print(f"page at {nodes} members, {len(updates)} updates in {SECONDS} s")
    print(f"  script of an update     median {half:6.2f} ms, 95 % {late:.2f} ms")
    for name, spent in result["parts"].items():
        print(f"  {name:<24}mean   {spent / len(updates):6.2f} ms")
    print(f"  first drawing of all    once   {result['first']:6.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
