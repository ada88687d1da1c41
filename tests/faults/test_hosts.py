"""What can be wrong with a host itself: its clock, its GPU's driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from time import monotonic, sleep

import pytest

from support.cluster import Cluster, eventually
from support.faults import Client, Figures, failures, start_hosts, wait_for

HOUR = 3600.0
SOURCE = Path(__file__).resolve().parents[1] / "gpu" / "fake_nvml.c"


@pytest.mark.long
@pytest.mark.timeout(200)
def test_clocks_an_hour_ahead_and_behind(cluster: Cluster, figures: Figures) -> None:
    first = cluster.node("right")
    ahead = cluster.node("ahead", bootstrap=first, clock_offset=HOUR)
    behind = cluster.node("behind", bootstrap=first, clock_offset=-HOUR)
    nodes = (first, ahead, behind)
    everybody = {"right", "ahead", "behind"}
    began = monotonic()
    eventually(lambda: all(node.online() == everybody for node in nodes), within=20)
    while monotonic() - began < 60:  # longer than an online window
        assert all(node.online() == everybody for node in nodes)
        sleep(1)
    lost = [line for node in nodes for line in node.log() if line["event"] == "peer_offline"]
    figures.at_most("evictions in a minute", len(lost), 0, "")


@pytest.fixture
def nvml(tmp_path: Path):
    """The environment of a host whose NVML does what the scenario file says."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to test against the fake NVML library")
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE], check=True, timeout=60)
    scenario = tmp_path / "scenario"
    scenario.write_text("ok")
    return scenario, {
        "LD_LIBRARY_PATH": str(tmp_path),
        "FAKE_NVML_SCENARIO_FILE": str(scenario),
    }


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        pytest.param("hanging", "timeout", marks=pytest.mark.long),
        ("future_error", "nvml_4242"),
    ],
)
def test_nvml_that_fails_or_hangs(
    cluster: Cluster, figures: Figures, nvml, trouble: str, code: str
) -> None:
    scenario, env = nvml
    (host,) = start_hosts(cluster, 1)
    engine = cluster.engine("gpu")
    node = cluster.start_node(
        "gpu", "--expose", f"llm={engine.address}", bootstrap=host, env=env
    ).wait_ready()
    entry = cluster.entry(host)
    wait_for(entry, "host0", "gpu")

    def free() -> int | None:
        return next(row["available_vram"] for row in entry.peers() if row["name"] == "gpu")

    eventually(lambda: free() == 20 * 2**30, within=20)
    scenario.write_text(trouble)
    broken_at = monotonic()
    eventually(lambda: free() is None, within=40)
    figures.note("known to be unknown after", monotonic() - broken_at, "s")
    asked = Client(entry).ask_many(30)
    assert failures(asked) == []
    assert f'meshnode_gpu_read_errors_total{{code="{code}"}}' in node.get("/metrics")
    told = [line for line in node.log() if line.get("code") == code]
    assert len(told) == 1, "one line for a change of state, not one for each reading"
    scenario.write_text("ok")
    eventually(lambda: free() == 20 * 2**30, within=60)
    figures.at_most("of 30 requests failed", len(failures(asked)), 0, "")
