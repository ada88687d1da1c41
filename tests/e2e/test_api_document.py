"""The control API's own document against a real node: a fuzzer finds nothing that it denies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from meshnode.http import openapi
from support.cluster import Cluster, Node

schemathesis = pytest.importorskip("schemathesis")
requests = pytest.importorskip("requests")  # what schemathesis asks with

# Streams have no end that could be checked, and a drained node answers no more.
STREAMS = ["/api/events", "/api/forward"]
ENDING = ["/api/drain"]

_RAW = openapi.document(openapi._paths())
SCHEMA = schemathesis.openapi.from_dict(_RAW).exclude(path=[*STREAMS, *ENDING])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder: Path = tmp_path_factory.mktemp("api")
    cluster = Cluster(folder)
    yield cluster.node("host", "--expose", "llm=127.0.0.1:9", "--vram", "8GiB")
    cluster.close()


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    """One connection for all: those that are left open count against the API's limit."""
    with requests.Session() as session:
        yield session


def test_every_answer_of_the_api_is_described(node: Node) -> None:
    import json

    described = json.loads(node.get("/openapi.json"))["paths"]
    assert {"/api/peers", "/api/events", "/api/forward", "/api/p2p/token"} <= set(described)
    from meshnode.http import control_api, localai

    app: Any = control_api.build_app(None, more=localai.routes(None))  # type: ignore[arg-type]
    paths = {route.path for route in app._app.routes}
    undescribed = {
        path
        for path in paths
        if not path.startswith("/dashboard/") and path not in ("/", "/openapi.json")
    } - set(openapi._paths())
    assert undescribed == set()


@SCHEMA.parametrize()
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_a_fuzzer_finds_no_answer_that_the_document_denies(
    case: Any, node: Node, session: Any
) -> None:
    key = (node.state_dir / "api.key").read_text().strip()
    case.call_and_validate(
        base_url=f"http://{node.ready['api']}",
        headers={"Authorization": f"Bearer {key}"},
        # 503 and 504 are answers here; that they are described is another check.
        excluded_checks=[schemathesis.checks.not_a_server_error],
        timeout=20,
        session=session,
    )
