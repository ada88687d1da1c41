"""What an update of the page costs a browser at 200 members, in Chromium's own measure.

    scripts/bench page [--nodes N] [--seconds S] [--json]

Twenty members change four times a second. Script is the page's own code for one update (a
performance.measure around it); the means add what follows it, style and layout, and whatever
else the page does, in CPU time of the page's thread, from the browser's Performance.getMetrics
over the run, so that a busy machine does not show in them. A frame at 60 Hz lasts 16.7 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")
MEASURES = "performance.getEntriesByName('meshnode-update').map((each) => each.duration)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure for")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium here; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    argv = [sys.executable, "-m", "support.page_mesh", "--nodes", str(args.nodes)]
    argv += ["--churn", "20"]
    mesh = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert mesh.stdout is not None
        api = json.loads(mesh.stdout.readline())["api"]
        result = {"nodes": args.nodes, **measure(chromium, api, args.seconds)}
        print(json.dumps(result)) if args.json else report(result)
    finally:
        mesh.kill()
        mesh.wait(10)
    return 0


def measure(chromium: str, api: str, seconds: float) -> dict[str, Any]:
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
        page.wait_for_timeout(seconds * 1000)
        after = spent()
        updates = sorted(page.evaluate(MEASURES))
        browser.close()
    per_update = {name: (after[name] - before[name]) * 1000 / len(updates) for name in PARTS}
    return {
        "seconds": seconds,
        "updates": len(updates),
        "first_ms": first,
        "script_ms": statistics.median(updates),
        "script_p95_ms": updates[int(len(updates) * 0.95)],
        "parts_mean_ms": per_update,
        "sum_mean_ms": sum(per_update.values()),
    }


def report(result: dict[str, Any]) -> None:
    told = f"{result['updates']} updates in {result['seconds']:g} s"
    print(f"page at {result['nodes']} members, {told}")
    print(f"  script of an update     median {result['script_ms']:6.2f} ms,", end="")
    print(f" 95 % {result['script_p95_ms']:.2f} ms")
    for name, spent in result["parts_mean_ms"].items():
        print(f"  {name:<24}mean   {spent:6.2f} ms")
    print(f"  all of them             mean   {result['sum_mean_ms']:6.2f} ms")
    print(f"  first drawing of all    once   {result['first_ms']:6.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
