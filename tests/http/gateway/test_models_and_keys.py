"""The gateway's list of the mesh's models, and what each key of a client gets."""

from __future__ import annotations

import json
from typing import Any

import trio

from meshnode.core.api_keys import ClientKeys, parse_client_keys
from meshnode.core.node_data import NodeData, ServiceData
from meshnode.http.gateway.settings import GatewaySettings
from support.gateway_mesh import answering, exchange, get, post

LIMIT = 20.0  # seconds, for one test
KEYS = {
    "alice": {"key": "alices-key-01234567"},
    "bob": {"key": "bobs-key-01234567", "models": ["phi3"], "rpm": 2},
}
ALICE = b"authorization: Bearer alices-key-01234567"
BOB = b"x-api-key: bobs-key-01234567"


def ask(model: str, *lines: bytes, path: str = "/v1/chat/completions") -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]})
    return post(path, body.encode(), b"content-type: application/json", *lines)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def opened(mesh, *, keys: bool = False) -> None:
    """Start a gateway that has heard of a member with two models, which nobody can reach."""
    settings = GatewaySettings(
        client_keys=ClientKeys(parse_client_keys(KEYS)) if keys else None,
    )
    await mesh.open(settings=settings)
    services = (ServiceData(service_id="llm", models=("llama3:8b", "phi3"), loaded=("phi3",)),)
    ghost = NodeData(id="ghost", name="gpu-box", seq=1, services=services)
    mesh.front.ledger.observe(ghost, now=trio.current_time())


async def test_the_models_of_the_mesh_are_listed_in_the_shape_of_each_api(mesh):
    with trio.fail_after(LIMIT):
        await opened(mesh)
        listed = body(await exchange(mesh, get("/v1/models")))
        assert [row["id"] for row in listed["data"]] == ["llama3:8b", "phi3"]
        assert listed["data"][1]["meshnode"]["peers"][0]["name"] == "gpu-box"
        tags = body(await exchange(mesh, get("/api/tags")))
        assert [row["model"] for row in tags["models"]] == ["llama3:8b", "phi3"]
        running = body(await exchange(mesh, get("/api/ps")))
        assert [row["model"] for row in running["models"]] == ["phi3"]
        shown = body(await exchange(mesh, get("/v1/models", b"anthropic-version: 2023-06-01")))
        assert shown["first_id"] == "llama3:8b" and shown["has_more"] is False
        assert body(await exchange(mesh, get("/v1/models/phi3:latest")))["id"] == "phi3"
        head = await exchange(mesh, get("/v1/models").replace(b"GET", b"HEAD", 1))
        assert status(head) == 200 and head.endswith(b"\r\n\r\n")


async def test_an_unknown_model_is_a_404_that_names_those_like_it_in_each_shape(mesh):
    with trio.fail_after(LIMIT):
        await opened(mesh)
        answer = await exchange(mesh, ask("llama3:7b"))
        error = body(answer)["error"]
        assert status(answer) == 404 and error["code"] == "model_not_found"
        assert "llama3:8b" in error["message"] and error["param"] == "model"
        ollama = await exchange(mesh, ask("llama3:7b", path="/api/chat"))
        assert status(ollama) == 404 and "llama3:8b" in body(ollama)["error"]
        anthropic = await exchange(mesh, ask("llama3:7b", path="/v1/messages"))
        assert body(anthropic)["error"]["type"] == "not_found_error"


async def test_without_a_key_or_with_a_wrong_one_nothing_is_answered(mesh):
    with trio.fail_after(LIMIT):
        await opened(mesh, keys=True)
        engine = await mesh.served_by(answering(b"hello"))
        for request in (ask("phi3"), get("/v1/models"), get("/anything")):
            refusal = await exchange(mesh, request)
            assert status(refusal) == 401 and body(refusal)["error"]["code"] == "api_key_required"
        wrong = await exchange(mesh, ask("phi3", b"authorization: Bearer no-such-key-at-all"))
        assert status(wrong) == 401 and body(wrong)["error"]["code"] == "invalid_api_key"
        assert b"no-such-key" not in wrong
        assert engine.requests == []


async def test_a_key_gets_in_and_never_reaches_the_engine(mesh):
    with trio.fail_after(LIMIT):
        await opened(mesh, keys=True)
        engine = await mesh.served_by(answering(b"hello"))
        for key in (ALICE, b"x-api-key: alices-key-01234567"):
            answer = await exchange(mesh, ask("some-model", key))
            assert (status(answer), answer[-5:]) == (200, b"hello"), answer
        assert len(engine.requests) == 2
        for head, _ in engine.requests:
            assert b"alices" not in head and b"authorization" not in head.lower()


async def test_without_keys_asked_for_the_engines_own_key_is_passed_on(mesh):
    with trio.fail_after(LIMIT):
        await opened(mesh)
        engine = await mesh.served_by(answering(b"hello"))
        await exchange(mesh, ask("some-model", b"authorization: Bearer the-engines-own"))
        assert b"authorization: Bearer the-engines-own" in engine.requests[0][0]


async def test_a_key_is_held_to_its_models_its_paths_and_its_rate(mesh):
    with trio.fail_after(LIMIT):
        await opened(mesh, keys=True)
        listed = body(await exchange(mesh, get("/v1/models", BOB)))
        assert [row["id"] for row in listed["data"]] == ["phi3"]
        other = await exchange(mesh, ask("llama3:8b", BOB))
        assert status(other) == 403 and body(other)["error"]["code"] == "model_not_allowed"
        pull = await exchange(mesh, post("/api/pull", b'{"model":"phi3"}', BOB))
        assert status(pull) == 403
        # Who said that it has it can't be reached; who does not say serves it then.
        await mesh.served_by(answering(b"hello"))
        served = [status(await exchange(mesh, ask("phi3", BOB))) for _ in range(2)]
        assert served == [200, 200]
        third = await exchange(mesh, ask("phi3", BOB))
        assert status(third) == 429 and body(third)["error"]["type"] == "rate_limit_error"
        assert b"\r\nretry-after: 30\r\n" in third or b"\r\nretry-after: 29\r\n" in third
