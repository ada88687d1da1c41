"""The built-in engine, spoken to by the official OpenAI client."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import httpx
import openai
import pytest
import trio

from meshnode.testing.engine import Engine, EngineOptions, answer_words, serve_engine

GPU_24 = ("--name", "gpu-24", "--vram-gib", "24", "--tokens-per-second", "0")
SAID = "This is gpu-24 with 24 GiB of VRAM, serving demo-model:"
ASK = [{"role": "user", "content": "who are you"}]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=10)


def stats(url: str) -> dict[str, int]:
    answer: dict[str, int] = httpx.get(f"{url}/stats").json()
    return answer


def test_an_answer_says_which_engine_gave_it(start_engine) -> None:
    with client(start_engine(*GPU_24)) as api:
        raw = api.chat.completions.with_raw_response.create(model="demo-model", messages=ASK)
        answer = raw.parse()
    assert raw.headers["x-engine"] == answer.system_fingerprint == "gpu-24"
    assert answer.choices[0].message.content == (
        f"{SAID} one two three four five six seven eight nine ten one two three four"
    )
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 24)


def test_a_stream_is_the_same_answer_a_token_at_a_time(start_engine) -> None:
    with client(start_engine(*GPU_24)) as api:
        whole = api.chat.completions.create(model="demo-model", messages=ASK)
        with api.chat.completions.create(
            model="demo-model", messages=ASK, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len(pieces) == 25  # the last says only why it ends
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24


def test_fewer_tokens_end_the_answer_for_its_length(start_engine) -> None:
    with client(start_engine(*GPU_24)) as api:
        answer = api.chat.completions.create(model="demo-model", messages=ASK, max_tokens=3)
        text = api.completions.create(model="demo-model", prompt="who", max_tokens=3)
        with api.completions.create(
            model="demo-model", prompt="who", max_tokens=3, stream=True
        ) as stream:
            streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert answer.choices[0].message.content == text.choices[0].text == streamed == "This is gpu-24"
    assert answer.choices[0].finish_reason == text.choices[0].finish_reason == "length"


def test_models_and_embeddings(start_engine) -> None:
    with client(start_engine("--model", "small", "--model", "large")) as api:
        assert [model.id for model in api.models.list()] == ["small", "large"]
        by_base64 = api.embeddings.create(model="small", input=["a", "b"]).data
        as_floats = api.embeddings.create(
            model="small", input=["a", "b"], encoding_format="float"
        ).data
    assert [row.embedding for row in by_base64] == [row.embedding for row in as_floats]
    assert by_base64[0].embedding != by_base64[1].embedding


def test_bad_requests_are_refused_in_openais_shape(start_engine) -> None:
    url = start_engine()
    with client(url) as api:
        with pytest.raises(openai.NotFoundError) as unknown:
            api.chat.completions.create(model="gpt-9", messages=ASK)
        with pytest.raises(openai.BadRequestError) as empty:
            api.chat.completions.create(model="demo-model", messages=[])
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "demo-model" in unknown.value.message
    assert (empty.value.code, empty.value.param) == ("invalid_body", "messages")

    for answer in (
        httpx.post(f"{url}/v1/chat/completions", content=b"{not json"),
        httpx.post(f"{url}/v1/chat/completions", content=b'"\xff"'),
        httpx.post(f"{url}/v1/chat/completions", content=b"[]"),
        httpx.get(f"{url}/v1/chat/completions"),
        httpx.get(f"{url}/v2/anything"),
    ):
        assert answer.status_code in (400, 404, 405)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
        assert answer.headers["x-engine"] == "engine"
    assert stats(url)["failed"] == 7


def test_an_engine_told_to_fail_fails_but_is_healthy(start_engine) -> None:
    url = start_engine("--fail-with", "500")
    with client(url) as api, pytest.raises(openai.InternalServerError) as caught:
        api.chat.completions.create(model="demo-model", messages=ASK)
    assert caught.value.type == "server_error"
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/api/tags").json()["models"][0]["name"] == "demo-model"


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_its_reader_goes_away(start_engine, stream: bool) -> None:
    url = start_engine("--tokens", "1000000", "--tokens-per-second", "100")
    body = json.dumps({"model": "demo-model", "messages": ASK, "stream": stream}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        while stats(url)["tokens"] < 3:
            pass  # each round is a request of its own
        assert stats(url)["in_flight"] == 1
    while stats(url)["in_flight"]:
        pass
    assert (stats(url)["cancelled"], stats(url)["served"]) == (1, 0)


async def test_requests_at_once_are_counted(nursery: trio.Nursery) -> None:
    engine = Engine(EngineOptions(name="here", tokens=12, tokens_per_second=50))
    body = {"model": "demo-model", "messages": ASK, "stream": True}
    texts: list[str] = []

    async def ask(api: httpx.AsyncClient) -> None:
        answer = await api.post("/v1/chat/completions", json=body)
        texts.append(answer.text)

    async def serve(*, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
        await serve_engine(engine.options, engine=engine, task_status=task_status)

    with trio.fail_after(20):
        host, port = await nursery.start(serve)
        async with (
            httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=10) as api,
            trio.open_nursery() as asking,
        ):
            for _ in range(8):
                asking.start_soon(ask, api)
        assert all(text.endswith("data: [DONE]\n\n") for text in texts)
        assert engine.stats.served == engine.stats.peak_in_flight == len(texts) == 8
        assert engine.stats.in_flight == engine.stats.cancelled == 0
        nursery.cancel_scope.cancel()


def test_a_client_that_stops_reading_does_not_keep_the_engine_from_ending(start_engine) -> None:
    url = start_engine("--tokens", "1000000", "--tokens-per-second", "0")
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    body = json.dumps({"model": "demo-model", "messages": ASK, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with connection:
        connection.sendall(head.encode() + body)
        generated, before = stats(url)["tokens"], -1
        while generated != before or not generated:  # until its buffers are full
            generated, before = stats(url)["tokens"], generated
        start_engine.stop()


def test_a_taken_port_is_one_line_and_not_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "meshnode.testing.engine", "--port", port],
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"127.0.0.1:{port}" in done.stderr


def test_an_answer_has_exactly_as_many_tokens_as_asked_for() -> None:
    options = EngineOptions(name="a b")
    for count in (1, 2, 11, 12, 13, 40):
        assert len(answer_words(options, "m", count)) == count
