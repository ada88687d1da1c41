"""The gateway before an engine that is not ours: llama.cpp's server, with a model of 160 KB.

It is no part of the locks, as it is compiled for a quarter of an hour. To run these tests:
``.venv/bin/python -m pip install 'llama-cpp-python[server]'``.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from support.cluster import Cluster, Node, Process, eventually
from support.tiny_gguf import write_tiny_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "uvicorn")),
        reason="llama.cpp's server is not installed: pip install 'llama-cpp-python[server]'",
    ),
]

HELLO = [{"role": "user", "content": "hello there"}]
PATIENCE = 40  # seconds; the server imports for some, more on a busy machine
# Tokens; the server makes a few hundred a second here, so an answer would take minutes.
ENDLESS = 30_000


class LlamaCpp(Process):
    """llama.cpp's server in a process of its own."""

    @property
    def address(self) -> str | None:
        """Where it listens, once it does."""
        found = (re.search(r"running on http://(\S+)", line) for line in list(self.err))
        return next((match[1] for match in found if match), None)

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@pytest.fixture
def llama(cluster: Cluster, tmp_path: Path) -> LlamaCpp:
    model = tmp_path / "tiny.gguf"
    write_tiny_gguf(model, context=32_768)
    argv = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--model_alias"]
    argv += ["tiny", "--host", "127.0.0.1", "--port", "0", "--n_ctx", "32768", "--n_threads", "1"]
    # As a rule a new request ends the one before it; here only its client may.
    argv += ["--interrupt_requests", "false"]
    server = LlamaCpp(argv, cluster.env())
    cluster.processes.append(server)
    assert eventually(lambda: server.address, within=PATIENCE)
    return server


@pytest.fixture
def host(cluster: Cluster, llama: LlamaCpp) -> Node:
    """The node on llama.cpp's machine."""
    return cluster.node("llama", "--vram", "24GiB", "--expose", f"llm={llama.address}")


@pytest.fixture
def client(cluster: Cluster, host: Node) -> Iterator[openai.OpenAI]:
    """A client of another node's gateway, once that node knows the model."""
    entry = cluster.entry(host)
    with openai.OpenAI(base_url=entry.base_url, api_key="x", max_retries=0, timeout=60) as client:
        eventually(lambda: [model.id for model in client.models.list()], within=PATIENCE)
        yield client


def test_the_openai_client_is_served_by_llama_cpp(host: Node, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, seed=1)
    assert whole.usage is not None and whole.usage.completion_tokens == 20
    assert re.fullmatch(r"[a-z ]{15,20}", whole.choices[0].message.content or "")
    legacy = client.completions.create(model="tiny", prompt="once", max_tokens=20, seed=1)
    assert re.fullmatch(r"[a-z ]{15,20}", legacy.choices[0].text)

    asked = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=20, seed=1, stream=True
    )
    assert asked.headers["x-meshnode-peer"] == host.peer_id
    chunks = [chunk for chunk in asked.parse() if chunk.choices]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(chunks) > 20 and text.strip() == (whole.choices[0].message.content or "").strip()
    assert chunks[-1].choices[0].finish_reason == "length"

    with pytest.raises(openai.NotFoundError, match="tiny") as unknown:
        client.chat.completions.create(model="tyni", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    recognised = [line for line in host.log() if line["event"] == "service_recognised"]
    assert [line["kind"] for line in recognised] == ["openai"]


def test_a_client_that_leaves_frees_llama_cpp(
    host: Node, llama: LlamaCpp, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=ENDLESS, stream=True
    )
    for _, chunk in zip(range(10), stream, strict=False):
        assert chunk.choices[0].finish_reason is None
    assert host.in_flight() == 1
    stream.close()
    # It makes one answer at a time, and that one would have taken minutes.
    brief = client.with_options(timeout=20).chat.completions
    assert brief.create(model="tiny", messages=HELLO, max_tokens=5).usage is not None
    eventually(lambda: host.in_flight() == 0, within=5)
    before, began = llama.cpu_seconds(), time.monotonic()
    time.sleep(1)  # of its idleness
    assert llama.cpu_seconds() - before < 0.5 * (time.monotonic() - began)


def test_when_llama_cpp_dies_another_engine_with_its_model_serves(
    cluster: Cluster, host: Node, llama: LlamaCpp, client: openai.OpenAI
) -> None:
    begun = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=ENDLESS, stream=True
    )
    with begun:
        next(begun)
        # It has the model, but another one in memory; so llama.cpp, warm for the prompt, is asked
        # first for as long as it is thought to be well.
        models = ("--model", "tiny", "--model", "other", "--loaded", "other")
        spare = cluster.engine("spare", *models, "--tokens-per-second", "0")
        service = f"llm={spare.address}"
        second = cluster.node("spare", "--vram", "8GiB", "--expose", service, bootstrap=host)
        both = {host.peer_id, second.peer_id}
        eventually(lambda: who_has_it(client) == both, within=PATIENCE)
        llama.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            for _ in begun:
                pass  # what was begun is cut, and says so
    for _ in range(5):
        answer = client.chat.completions.create(model="tiny", messages=HELLO)
        assert "This is spare" in str(answer.choices[0].message.content)
    eventually(lambda: who_has_it(client) == {second.peer_id}, within=PATIENCE)


def who_has_it(client: openai.OpenAI) -> set[str]:
    """Peer IDs of those that have the model and are well."""
    extra = client.models.retrieve("tiny").model_extra
    assert extra is not None
    return {peer["peer_id"] for peer in extra["meshnode"]["peers"] if peer["ready"]}
