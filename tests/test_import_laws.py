"""The import laws of the house hold, and the check that says so can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINT, "--no-cache", "--config", "pyproject.toml"],
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(project), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "meshnode", tmp_path / "meshnode", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_house_keeps_its_laws(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement", "law"),
    [
        ("core/ledger.py", "import trio", "The core waits for nothing"),
        ("core/router.py", "import random", "The core waits for nothing"),
        ("core/node_data.py", "import time", "The core waits for nothing"),
        ("core/clusterrouting.py", "import pydantic", "standard library alone"),
        ("core/ledger.py", "import meshnode.net.mesh", "The house:"),
        ("net/gossip.py", "import meshnode.http.views", "The house:"),
        ("net/gossip.py", "import libp2p", "Only net/libp2p knows libp2p"),
        ("http/views.py", "import libp2p", "Only net/libp2p knows libp2p"),
        ("net/peering.py", "import meshnode.config", "Settings are handed down"),
        ("node.py", "import meshnode.testing.engine", "public test helpers"),
    ],
)
def test_breaking_a_law_on_purpose_is_reported(
    copy: Path, module: str, statement: str, law: str
) -> None:
    path = copy / "meshnode" / module
    path.write_text(path.read_text() + f"\n{statement}\n")
    result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [line for line in result.stdout.splitlines() if "BROKEN" in line]
    assert any(law in line for line in broken), result.stdout
