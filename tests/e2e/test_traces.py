"""One span a request, with the decision, at a collector on a socket; nothing where it is off."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.cluster import Backend, Cluster, eventually
from support.collector import Collector

pytest.importorskip("opentelemetry.proto", reason="the extra otel is not here")

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
SECRET = "a prompt that nobody may see"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
    }


def test_a_request_is_one_span_that_goes_on_from_its_client_to_its_engine(
    cluster: Cluster, collector: Collector, backend: Callable[..., Backend]
) -> None:
    heads: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        data = connection.recv(65536)
        if b"/v1/chat/completions" not in data:
            body = b'{"data": [{"id": "m"}]}'
        else:
            heads.append(data)
            body = b"{}"
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    host = cluster.node("gpu", "--expose", f"llm={backend(answer).address}", "--vram", "8GiB")
    entry = cluster.entry(host, "--otlp-endpoint", collector.url)
    eventually(lambda: entry.online() == {"gpu", "laptop"}, within=20)
    body = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
    request = urllib.request.Request(
        f"{entry.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "traceparent": TRACEPARENT},
    )

    def served() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=20) as answered:
                return bool(answered.status == 200)
        except urllib.error.HTTPError:
            return False  # the model is not known yet

    eventually(served, within=45, every=0.3)
    eventually(lambda: any("meshnode.tier" in attributes(s) for s in collector.spans), within=45)
    span = next(s for s in collector.spans if "meshnode.tier" in attributes(s))
    assert set(collector.paths) == {"/v1/traces"}
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    told = attributes(span)
    assert told["meshnode.peer"] == "gpu"
    assert told["meshnode.service"] == "llm"
    assert told["meshnode.tier"] == "only"
    assert told["meshnode.outcome"] == "complete"
    assert told["meshnode.candidates"] == 1
    assert span.end_time_unix_nano > span.start_time_unix_nano
    # The engine is told of this node's span, not of the client's.
    passed = re.search(rb"traceparent: 00-(\w+)-(\w+)-01\r\n", heads[-1])
    assert passed is not None
    assert passed[1].decode() == TRACE
    assert passed[2].decode() == span.span_id.hex()
    assert heads[-1].lower().count(b"traceparent") == 1
    assert SECRET.encode() not in collector.raw


def test_a_collector_that_is_away_costs_no_request(
    cluster: Cluster, backend: Callable[..., Backend]
) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    host = cluster.node("gpu", "--expose", f"llm={backend(answer).address}")
    entry = cluster.entry(host, "--proxy-mode", "tcp", "--otlp-endpoint", "http://127.0.0.1:9")
    eventually(lambda: entry.online() == {"gpu", "laptop"}, within=20)
    for _ in range(5):
        with urllib.request.urlopen(f"{entry.base_url}/models", timeout=20) as answered:
            assert answered.read() == b"ok"


def test_a_node_that_traces_nothing_loads_nothing_of_it() -> None:
    code = (
        "import sys, meshnode.node, meshnode.cli.up;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://user:pass@host"])
def test_what_is_no_endpoint_is_refused(cluster: Cluster, endpoint: str) -> None:
    result = cluster.run(
        "up", "--state-dir", str(cluster.folder / "s"), "--otlp-endpoint", endpoint,
        MESHNODE_TOKEN=cluster.token,
    )  # fmt: skip
    assert result.returncode == 2
    assert "--otlp-endpoint" in result.stderr
