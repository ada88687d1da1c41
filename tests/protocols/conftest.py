"""Golden vectors as parameters.

``vectors("announce/1.0.0", "valid")`` fills ``vector`` with each of one protocol's; and
``messages("valid")`` fills ``protocol`` and ``vector`` with those of every protocol.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PROTOCOLS = Path(__file__).resolve().parents[2] / "protocols"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "vectors(protocol, name): run once for each golden vector of that file"
    )
    config.addinivalue_line(
        "markers", "messages(name): run once for each golden vector of that name of any protocol"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector" not in metafunc.fixturenames:
        return
    of_all = [marker.args[0] for marker in metafunc.definition.iter_markers("messages")]
    if of_all:
        rows = [
            pytest.param(protocol, row, id=f"{protocol} {name}: {row['name']}")
            for name in of_all
            for protocol in _protocols_with(name)
            for row in _read(protocol, name)
        ]
        metafunc.parametrize(("protocol", "vector"), rows)
        return
    metafunc.parametrize(
        "vector",
        [
            pytest.param(row, id=f"{name}: {row['name']}")
            for protocol, name in (
                marker.args for marker in metafunc.definition.iter_markers("vectors")
            )
            for row in _read(protocol, name)
        ],
    )


def _protocols_with(name: str) -> list[str]:
    found = sorted(PROTOCOLS.glob(f"*/*/vectors/{name}.json"))
    return [str(path.parents[1].relative_to(PROTOCOLS)) for path in found]


def _read(protocol: str, name: str) -> list[dict[str, Any]]:
    path = PROTOCOLS / protocol / "vectors" / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["vectors"]
    return rows


@pytest.fixture
def protocols() -> Path:
    """The folder that alone must suffice to write another implementation."""
    return PROTOCOLS
