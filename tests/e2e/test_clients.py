"""The official clients, unchanged, through the gateway: real processes, models on several hosts."""

from __future__ import annotations

import anthropic
import ollama
import openai
import pytest

from support.cluster import Cluster, Node, eventually

HELLO = [{"role": "user", "content": "hello"}]
# A fresh mesh of three nodes and two engines takes some seconds on a busy machine.
PATIENCE = 20  # seconds


@pytest.fixture
def entry(cluster: Cluster) -> Node:
    """A laptop's node before two hosts: one has alpha, the other beta."""
    return before_two_hosts(cluster)


def before_two_hosts(cluster: Cluster, *args: str) -> Node:
    hosts: list[Node] = []
    for model in ("alpha", "beta"):
        engine = cluster.engine(f"has-{model}", "--model", model, "--tokens-per-second", "0")
        service = f"llm={engine.address}"
        first = hosts[0] if hosts else None
        hosts.append(cluster.node(f"host-{model}", "--expose", service, bootstrap=first))
    node = cluster.entry(hosts[0], *args)
    eventually(lambda: models_of(node) >= {"alpha", "beta"}, within=PATIENCE)
    return node


def models_of(node: Node) -> set[str]:
    rows = (service for peer in node.peers() for service in peer["services"])
    return {model for service in rows for model in service["models"]}


def root(node: Node) -> str:
    return node.base_url.removesuffix("/v1")


def test_the_openai_client_gets_each_model_from_who_has_it(entry: Node) -> None:
    with openai.OpenAI(base_url=entry.base_url, api_key="unused", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["alpha", "beta"]
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


def test_the_next_turn_of_a_conversation_goes_where_the_last_one_went(cluster: Cluster) -> None:
    hosts = cluster.hosts(8, 24)
    entry = cluster.entry(hosts[0])
    eventually(lambda: entry.online() >= {"host8", "host24"}, within=PATIENCE)
    turns = [{"role": "user", "content": "a long beginning " * 100}]
    with openai.OpenAI(base_url=entry.base_url, api_key="unused", max_retries=0) as client:
        for _ in range(3):
            reply = client.chat.completions.create(model="demo-model", messages=turns)
            turns += [{"role": "assistant", "content": str(reply.choices[0].message.content)}]
            turns += [{"role": "user", "content": "and then?"}]
    third, second, first = entry.decisions()[:3]
    assert first["picked"] == second["picked"] == third["picked"] == hosts[1].peer_id
    assert (second["tier"], third["tier"]) == ("prefix", "prefix")
    assert first["match_ratio"] == 0 and second["match_ratio"] > 0.5


def test_the_engine_answers_anthropics_and_ollamas_clients(cluster: Cluster) -> None:
    url = f"http://{cluster.engine('e', '--tokens-per-second', '0').address}"
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=20) as client:
        message = client.messages.create(model="demo-model", max_tokens=9, messages=HELLO)
        assert message.content[0].text.startswith("This is e")
        with client.messages.stream(model="demo-model", max_tokens=9, messages=HELLO) as stream:
            assert "".join(stream.text_stream).startswith("This is e")
    with ollama.Client(host=url, timeout=20) as local:
        parts = local.chat(model="demo-model", messages=HELLO, stream=True)
        assert "".join(str(part.message.content) for part in parts).startswith("This is e")
        assert local.generate(model="demo-model", prompt="x").response.startswith("This is e")
        assert local.embed(model="demo-model", input="x").embeddings[0]
