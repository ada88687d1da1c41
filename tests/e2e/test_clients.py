"""The official clients, unchanged, through the gateway: real processes, models on several hosts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anthropic
import ollama
import openai
import pytest

from support.cluster import Cluster, Node, eventually

HELLO = [{"role": "user", "content": "hello"}]
# A fresh mesh of three nodes and two engines takes some seconds on a busy machine.
PATIENCE = 20  # seconds


# Two hosts: each has a model of its own, and one that both have.
MODELS = ["alpha", "beta", "both"]
KEY = "alices-key-01234567"


@dataclass(frozen=True)
class Mesh:
    """Two hosts before two engines, and two laptops: one open to its user, one asks for keys."""

    hosts: dict[str, Node]  # by the model that only it has
    entry: Node
    keyed: Node


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    # One for all tests here, as starting it takes longer than all that is asked of it.
    folder = tmp_path_factory.mktemp("clients")
    keys = folder / "keys.toml"
    keys.write_text(f'[alice]\nkey = "{KEY}"\nmodels = ["alpha"]\nrpm = 600\n')
    cluster = Cluster(folder)
    try:
        yield start_mesh(cluster, keys)
    finally:
        cluster.close()


def start_mesh(cluster: Cluster, keys: Path) -> Mesh:
    vram = {"alpha": "8GiB", "beta": "24GiB"}
    engines = {
        model: cluster.start_engine(
            f"has-{model}", "--model", model, "--model", "both", "--tokens-per-second", "0"
        )
        for model in vram
    }
    hosts: dict[str, Node] = {}
    for model, engine in engines.items():
        args = ("--vram", vram[model], "--expose", f"llm={engine.wait_ready().address}")
        hosts[model] = cluster.start_node(
            f"host-{model}", *args, bootstrap=hosts["alpha"] if hosts else None
        )
        if len(hosts) == 1:
            hosts[model].wait_ready()
    proxy = ("--proxy", "127.0.0.1:0")
    entry = cluster.start_node("laptop", *proxy, bootstrap=hosts["alpha"])
    asking = (*proxy, "--client-keys-file", str(keys))
    keyed = cluster.start_node("keyed", *asking, bootstrap=hosts["alpha"])
    for node in (hosts["beta"], entry, keyed):
        node.wait_ready()
    for node in (entry, keyed):
        eventually(partial(knows_all, node), within=PATIENCE)
    return Mesh(hosts, entry, keyed)


def knows_all(node: Node) -> bool:
    return models_of(node) >= set(MODELS) and node.online() >= {"host-alpha", "host-beta"}


def models_of(node: Node) -> set[str]:
    rows = (service for peer in node.peers() for service in peer["services"])
    return {model for service in rows for model in service["models"]}


def root(node: Node) -> str:
    return node.base_url.removesuffix("/v1")


def test_the_openai_client_gets_each_model_from_who_has_it(mesh: Mesh) -> None:
    entry = mesh.entry
    with openai.OpenAI(base_url=entry.base_url, api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == MODELS
        for model in ("alpha", "beta"):
            whole = client.chat.completions.create(model=model, messages=HELLO)
            assert f"has-{model}" in str(whole.choices[0].message.content)
            stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert f"has-{model}" in text
            legacy = client.completions.create(model=model, prompt="once")
            assert f"has-{model}" in legacy.choices[0].text
            assert client.embeddings.create(model=model, input=["x"]).data[0].embedding
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="alhpa", messages=HELLO)
        assert caught.value.code == "model_not_found" and "alpha" in str(caught.value)
    decision = next(d for d in entry.decisions() if d["model"] == "beta")
    assert [row["name"] for row in decision["candidates"]] == ["host-beta"]


def test_the_anthropic_client_streams_and_does_not(mesh: Mesh) -> None:
    entry = mesh.entry
    with anthropic.Anthropic(base_url=root(entry), api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == MODELS
        for model in ("alpha", "beta"):
            message = client.messages.create(model=model, max_tokens=50, messages=HELLO)
            assert f"has-{model}" in message.content[0].text
            with client.messages.stream(model=model, max_tokens=50, messages=HELLO) as stream:
                assert f"has-{model}" in "".join(stream.text_stream)
        with pytest.raises(anthropic.NotFoundError, match="alpha"):
            client.messages.create(model="alhpa", max_tokens=5, messages=HELLO)


def test_the_ollama_client_lists_chats_generates_and_embeds(mesh: Mesh) -> None:
    entry = mesh.entry
    with ollama.Client(host=root(entry)) as client:
        assert [model.model for model in client.list().models] == MODELS
        for model in ("alpha", "beta"):
            assert f"has-{model}" in str(client.chat(model=model, messages=HELLO).message.content)
            parts = client.chat(model=model, messages=HELLO, stream=True)
            assert f"has-{model}" in "".join(str(part.message.content) for part in parts)
            assert f"has-{model}" in client.generate(model=model, prompt="once").response
            pieces = client.generate(model=model, prompt="once", stream=True)
            assert f"has-{model}" in "".join(piece.response for piece in pieces)
            assert client.embed(model=model, input="x").embeddings[0]
            assert client.show(model).modelfile == f"FROM {model}"
        with pytest.raises(ollama.ResponseError, match="alpha") as caught:
            client.chat(model="alhpa", messages=HELLO)
        assert caught.value.status_code == 404


def test_the_next_turn_of_a_conversation_goes_where_the_last_one_went(mesh: Mesh) -> None:
    turns = [{"role": "user", "content": "a long beginning " * 100}]
    with openai.OpenAI(base_url=mesh.entry.base_url, api_key="unused", max_retries=0) as client:
        for _ in range(3):
            reply = client.chat.completions.create(model="both", messages=turns)
            turns += [{"role": "assistant", "content": str(reply.choices[0].message.content)}]
            turns += [{"role": "user", "content": "and then?"}]
    third, second, first = mesh.entry.decisions()[:3]
    assert first["picked"] == second["picked"] == third["picked"] == mesh.hosts["beta"].peer_id
    assert (second["tier"], third["tier"]) == ("prefix", "prefix")
    assert first["match_ratio"] == 0 and second["match_ratio"] > 0.5


def test_a_client_with_a_key_gets_in_and_one_without_does_not(mesh: Mesh) -> None:
    url = mesh.keyed.base_url
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as alice:
        assert [model.id for model in alice.models.list()] == ["alpha"]
        reply = alice.chat.completions.create(model="alpha", messages=HELLO)
        assert "has-alpha" in str(reply.choices[0].message.content)
        with pytest.raises(openai.PermissionDeniedError):
            alice.chat.completions.create(model="beta", messages=HELLO)
    stranger = openai.OpenAI(base_url=url, api_key="stranger", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    anthropics = anthropic.Anthropic(base_url=root(mesh.keyed), api_key=KEY, max_retries=0)
    with anthropics as client:
        message = client.messages.create(model="alpha", max_tokens=50, messages=HELLO)
        assert "has-alpha" in message.content[0].text
    assert KEY not in "\n".join(map(str, mesh.keyed.log()))
