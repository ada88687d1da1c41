"""Golden vectors as parameters: ``vectors("announce/1.0.0", "valid")`` fills ``vector``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROTOCOLS = Path(__file__).resolve().parents[2] / "protocols"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "vectors(protocol, name): run once for each golden vector of that file"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = []
    for marker in metafunc.definition.iter_markers("vectors"):
        protocol, name = marker.args
        path = PROTOCOLS / protocol / "vectors" / f"{name}.json"
        rows += [
            pytest.param(row, id=f"{name}: {row['name']}")
            for row in json.loads(path.read_text())["vectors"]
        ]
    if "vector" in metafunc.fixturenames:
        metafunc.parametrize("vector", rows)


@pytest.fixture
def protocols() -> Path:
    """The folder that alone must suffice to write another implementation."""
    return PROTOCOLS
