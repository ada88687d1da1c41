"""The list of all models of a mesh, as each kind of client reads it."""

from __future__ import annotations

from typing import Any

import pytest

from meshnode.core.ledger import Ledger, LedgerEntry
from meshnode.core.model_listing import (
    MAX_HOLDERS,
    anthropic_models,
    find_model,
    list_models,
    ollama_running,
    ollama_tags,
    openai_models,
)
from meshnode.core.node_data import NodeData, ServiceData


def entries(*nodes: NodeData) -> tuple[LedgerEntry, ...]:
    ledger = Ledger("self")
    for node in nodes:
        ledger.observe(node, now=0.0)
    return ledger.entries()


def node(peer_id: str, *models: str, **fields: Any) -> NodeData:
    service = ServiceData(service_id="llm", models=models, **fields)
    return NodeData(id=peer_id, name=f"host-{peer_id}", seq=1, services=(service,))


MESH = entries(
    node("a", "llama3:latest", "phi3", loaded=("phi3",)),
    node("b", "phi3", "Qwen/Qwen3-8B", healthy=False),
)


def test_the_list_is_the_union_and_tells_who_has_each() -> None:
    body: Any = openai_models(list_models(MESH, 1.0))
    assert [row["id"] for row in body["data"]] == ["Qwen/Qwen3-8B", "llama3:latest", "phi3"]
    assert body["data"][2]["meshnode"] == {
        "peers_total": 2,
        "peers": [
            {
                "peer_id": "a",
                "name": "host-a",
                "service_id": "llm",
                "loaded": True,
                "ready": True,
            },
            {
                "peer_id": "b",
                "name": "host-b",
                "service_id": "llm",
                "loaded": False,
                "ready": False,
            },
        ],
    }


def test_who_is_offline_has_nothing_and_of_one_service_others_are_left_out() -> None:
    assert list_models(MESH, 41.0) == []
    assert list_models(MESH, 1.0, service_id="tts") == []
    assert len(list_models(MESH, 1.0, service_id="llm")) == 3


def test_a_model_is_found_by_its_spelling_or_by_what_ollama_takes_for_it() -> None:
    models = list_models(MESH, 1.0)
    for name in ("llama3", "llama3:latest", "LLAMA3"):
        found = find_model(models, name)
        assert found is not None and found.name == "llama3:latest"
    assert find_model(models, "llama4") is None


def test_a_model_that_a_thousand_have_lists_some_and_counts_all() -> None:
    many = entries(*(node(f"p{number}", "phi3") for number in range(1000)))
    body: Any = ollama_tags(list_models(many, 1.0))
    assert body["models"][0]["meshnode"]["peers_total"] == 1000
    assert len(body["models"][0]["meshnode"]["peers"]) == MAX_HOLDERS


def test_only_what_is_in_memory_is_running() -> None:
    body: Any = ollama_running(list_models(MESH, 1.0))
    assert [row["name"] for row in body["models"]] == ["phi3"]


def test_the_official_clients_types_take_the_lists() -> None:
    anthropic = pytest.importorskip("anthropic")
    ollama = pytest.importorskip("ollama")
    openai = pytest.importorskip("openai")
    models = list_models(MESH, 1.0)
    listed: Any = openai_models(models)
    assert openai.types.Model.model_validate(listed["data"][0]).id == "Qwen/Qwen3-8B"
    shown: Any = anthropic_models(models)
    # The client itself checks nothing, so that newer servers don't break it.
    assert anthropic.types.ModelInfo.construct(**shown["data"][2]).id == "phi3"
    tags = ollama.ListResponse.model_validate(ollama_tags(models))
    assert tags.models[1].model == "llama3:latest"
    assert anthropic_models([])["first_id"] is None
