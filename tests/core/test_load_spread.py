"""Several entry points before the same hosts, by the simulator of ``scripts/bench load``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_load.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_load", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_load"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_load"]


def test_with_what_peers_say_eight_entry_points_spread_better_than_blindly(bench) -> None:
    def imbalance(signals: str) -> float:
        row = bench.measure(8, 8, signals, per_host=4.0, seconds=60.0, seeds=3)
        return row.imbalance

    assert 1.0 <= imbalance("combined") < 0.95 * imbalance("local")


def test_one_entry_point_needs_nobodys_word(bench) -> None:
    rows = [
        bench.measure(1, 8, signals, per_host=4.0, seconds=40.0, seeds=1)
        for signals in ("local", "combined")
    ]
    assert rows[0].imbalance == pytest.approx(rows[1].imbalance, rel=0.1)
    assert rows[0].requests == rows[1].requests > 100
