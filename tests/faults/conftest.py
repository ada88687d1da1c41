"""The fault matrix: one test per row, on real processes, each with the figures it is held to.

``scripts/faults`` runs all rows, holds them to their limits and prints the figures. In the suite,
on a machine that does other things too, a limit of time is stretched by ``SLACK``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.cluster import Backend
from support.faults import Figures
from support.lan import Lan

# Between a quiet machine and one that runs a test suite on two cores.
SLACK = 5.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-figures", action="store_true", help="hold every figure to its limit as it is"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Ten interpreters that start on a busy machine take a minute and more.
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    strict = request.config.getoption("--strict-figures", default=False)
    return Figures(request.node, 1.0 if strict else SLACK)


@pytest.fixture
def lan() -> Iterator[Lan]:
    lan = Lan.open_or_skip()
    yield lan
    lan.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB that a test may fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode != 0:
        pytest.skip("a small file system can't be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], timeout=20, check=True)


@pytest.fixture
def backend() -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(serve) -> Backend:
        made.append(Backend(serve))
        return made[-1]

    yield make
    for one in made:
        one.close()
