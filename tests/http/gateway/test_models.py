"""Requests go to who has their model; the lists of models are those of the whole mesh."""

from __future__ import annotations

import json

import pytest
import trio

from meshnode.values import AUTO
from support.gateway_mesh import chat, exchange, get, post, until

LIMIT = 20.0  # seconds, for one test


def having(name: str, *models: str):
    """An engine that lists its models, and answers everything else with its name."""

    async def serve(connection):
        while (request := await connection.request()) is not None:
            rows = [{"id": model, "object": "model"} for model in models]
            body = name.encode()
            if b" /v1/models " in request[0]:
                body = json.dumps({"object": "list", "data": rows}).encode()
            elif not request[0].startswith(b"POST"):
                await connection.send(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                continue
            await connection.send(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )

    return serve


@pytest.fixture
async def models(mesh):
    """Two peers: ``one`` has a and b, ``two`` has b and c."""
    await mesh.open()
    await mesh.served_by(having("one", "a", "b"), "one", vram=1, check=AUTO)
    await mesh.served_by(having("two", "b", "c"), "two", vram=9, check=AUTO)

    def known():
        online = mesh.front.ledger.online(trio.current_time())
        return {m for entry in online for s in entry.node.services for m in s.models}

    await until(lambda: known() == {"a", "b", "c"})
    return mesh


def json_of(answer: bytes):
    assert answer.startswith(b"HTTP/1.1 "), answer
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def asks_for(model: str, path: str = "/v1/chat/completions") -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return post(path, json.dumps(body).encode())


@pytest.mark.parametrize(("model", "name"), [("a", b"one"), ("b", b"two"), ("c", b"two")])
async def test_a_request_goes_to_who_has_its_model(models, model, name):
    with trio.fail_after(LIMIT):
        for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/embeddings"):
            assert (await exchange(models, asks_for(model, path))).endswith(name)


async def test_an_engine_that_does_not_tell_what_is_loaded_loses_to_none_that_does(mesh):
    def ollama(name: str, *loaded: str):
        pages = {"/api/tags": ["m", "cold"], "/api/ps": loaded, "/v1/models": ["m", "cold"]}

        async def serve(connection):
            while (request := await connection.request()) is not None:
                path = request[0].split()[1].decode()
                names = pages.get(path, ())
                key = "data" if path == "/v1/models" else "models"
                body = json.dumps({key: [{"id": n, "name": n} for n in names]}).encode()
                body = body if path in pages else name.encode()
                await connection.send(
                    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                )

        return serve

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(ollama("tells", "m"), "tells", vram=5, check=AUTO)
        await mesh.served_by(having("silent", "m", "cold"), "silent", vram=9, check=AUTO)

        def known():
            online = mesh.front.ledger.online(trio.current_time())
            return sorted(s.loaded for entry in online for s in entry.node.services)

        await until(lambda: known() == [("m",), ("m", "cold")])
        # Both count as having it loaded, so that free memory decides.
        assert (await exchange(mesh, asks_for("m"))).endswith(b"silent")
        reason = b"x-meshnode-reason: "
        assert reason + b"loaded" in await exchange(mesh, asks_for("cold", "/v1/embeddings"))


async def test_a_model_that_nobody_has_is_a_404_that_names_near_ones(models):
    with trio.fail_after(LIMIT):
        error = json_of(await exchange(models, chat()))["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        ollama = json_of(await exchange(models, asks_for("bb", "/api/chat")))
        assert "bb" in ollama["error"]


async def test_the_lists_of_models_are_those_of_the_whole_mesh(models):
    with trio.fail_after(LIMIT):
        listed = json_of(await exchange(models, get("/v1/models")))
        assert [row["id"] for row in listed["data"]] == ["a", "b", "c"]
        assert listed["data"][1]["meshnode"]["peers_total"] == 2
        tags = json_of(await exchange(models, get("/api/tags")))
        assert [row["name"] for row in tags["models"]] == ["a", "b", "c"]
        assert json_of(await exchange(models, get("/v1/models/c")))["id"] == "c"
        head = await exchange(models, get("/v1/models").replace(b"GET", b"HEAD"))
        assert head.endswith(b"\r\n\r\n")
        anthropic = get("/v1/models", b"anthropic-version: 2023-06-01")
        assert json_of(await exchange(models, anthropic))["first_id"] == "a"


async def test_a_body_that_names_its_model_twice_is_refused(models):
    with trio.fail_after(LIMIT):
        answer = await exchange(models, post("/v1/chat/completions", b'{"model":"a","model":"b"}'))
        assert answer.startswith(b"HTTP/1.1 400 ")
