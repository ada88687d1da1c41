"""The gateway with real processes: other clients than OpenAI's, and clients that go away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median

import anthropic
import ollama
import openai
import pytest

from support.cluster import Backend, Cluster, Node, eventually

MakeBackend = Callable[[Callable[[socket.socket], None]], Backend]
TEXT = ("Hello", " from", " the", " mesh")


def read_request(connection: socket.socket) -> tuple[str, dict[str, object]] | None:
    """The next request's path and JSON, or None at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    at = head.lower().find(b"content-length: ")
    length = int(head[at + 16 :].split(b"\r\n")[0]) if at >= 0 else 0
    while len(body) < length:
        body += connection.recv(65536)
    return head.split()[1].decode(), json.loads(body) if body else {}


def answer(connection: socket.socket, body: object) -> None:
    data = json.dumps(body).encode()
    connection.sendall(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (len(data), data)
    )


def stream(connection: socket.socket, kind: str, pieces: list[str], *, cut: bool = False) -> None:
    connection.sendall(
        f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    )
    for piece in pieces:
        connection.sendall(b"%x\r\n%b\r\n" % (len(piece.encode()), piece.encode()))
        time.sleep(0.01)
    if cut:
        connection.close()
        return
    connection.sendall(b"0\r\n\r\n")


def message(*text: str) -> dict[str, object]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "".join(text)}] if text else [],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 4},
    }


def anthropic_events() -> list[str]:
    def event(kind: str, **more: object) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n"

    block = {"type": "text", "text": ""}
    return [
        event("message_start", message=message()),
        event("content_block_start", index=0, content_block=block),
        *(
            event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
            for word in TEXT
        ),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4}),
        event("message_stop"),
    ]


def ollama_lines() -> list[str]:
    said = [{"role": "assistant", "content": word} for word in TEXT]
    lines = [{"model": "m", "message": one, "done": False} for one in said]
    last = {"model": "m", "message": {"role": "assistant", "content": ""}, "done": True}
    return [json.dumps(line) + "\n" for line in (*lines, last)]


def speak_their_languages(connection: socket.socket) -> None:
    """Serve Anthropic's messages and Ollama's chat; a model named "cut" breaks off."""
    while (request := read_request(connection)) is not None:
        path, asked = request
        cut = asked.get("model") == "cut"
        if path.startswith("/v1/messages"):
            if asked.get("stream"):
                events = anthropic_events()
                stream(connection, "text/event-stream", events[:4] if cut else events, cut=cut)
            else:
                answer(connection, message(*TEXT))
        elif asked.get("stream") is False:
            said = {"role": "assistant", "content": "".join(TEXT)}
            answer(connection, {"model": "m", "message": said, "done": True})
        else:
            lines = ollama_lines()
            stream(connection, "application/x-ndjson", lines[:2] if cut else lines, cut=cut)
        if cut:
            return


@pytest.fixture
def entry(cluster: Cluster, backend: MakeBackend) -> Node:
    service = backend(speak_their_languages)
    host = cluster.node("host", "--expose", f"llm={service.address}", "--health", "llm=tcp")
    entry = cluster.entry(host)
    eventually(lambda: "host" in entry.online(), within=15)
    return entry


SAID = [{"role": "user", "content": "hello"}]


def test_the_clients_of_anthropic_and_ollama_work_unchanged(entry: Node) -> None:
    url = f"http://{entry.ready['proxy']}"
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        whole = client.messages.create(model="m", max_tokens=9, messages=SAID)
        assert whole.content[0].text == "".join(TEXT)
        with client.messages.stream(model="m", max_tokens=9, messages=SAID) as events:
            assert list(events.text_stream) == list(TEXT)
        with (
            pytest.raises(anthropic.APIError),
            client.messages.stream(model="cut", max_tokens=9, messages=SAID) as events,
        ):
            list(events.text_stream)
    client = ollama.Client(host=url)
    assert client.chat(model="m", messages=SAID).message.content == "".join(TEXT)
    pieces = [one.message.content for one in client.chat(model="m", messages=SAID, stream=True)]
    assert "".join(pieces) == "".join(TEXT)
    with pytest.raises(ollama.ResponseError, match="cut short"):
        list(client.chat(model="cut", messages=SAID, stream=True))


def leave(entry: Node, *, streamed: bool, when: Callable[[bytes], bool]) -> float:
    """Ask for a long answer, go away once ``when`` says so of what came; return the time then."""
    body = json.dumps({"model": "demo-model", "messages": SAID, "stream": streamed}).encode()
    with socket.create_connection(entry.proxy, timeout=20) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        received = b""
        client.settimeout(0.01)

        def is_time() -> bool:
            nonlocal received
            with suppress(TimeoutError):
                received += client.recv(65536)
            return when(received)

        eventually(is_time, within=20, every=0.001)
        return time.monotonic()


def test_a_client_that_leaves_stops_the_engine_in_every_window(cluster: Cluster) -> None:
    pace = ("--tokens", "2000", "--tokens-per-second", "50", "--first-token-delay", "0.5")
    engine = cluster.engine("slow", *pace)
    host = cluster.node("host", "--expose", f"llm={engine.address}")
    entry = cluster.entry(host)
    eventually(lambda: any(row["services"] for row in entry.peers()), within=15)
    generated = 0  # tokens before the request

    def is_asked(received: bytes) -> bool:
        assert received == b""
        return engine.stats()["in_flight"] == 1

    def is_generating(received: bytes) -> bool:
        assert received == b"", "an answer that is no stream comes whole"
        return engine.stats()["tokens"] > generated + 5

    windows = {
        "before the answer's head": (True, is_asked),
        "in mid-stream": (True, lambda received: received.count(b"data: ") > 3),
        "in an answer that is no stream": (False, is_generating),
    }
    cancelled = 0
    for window, (streamed, when) in windows.items():
        taken = []
        for _ in range(3):
            generated = engine.stats()["tokens"]
            left_at = leave(entry, streamed=streamed, when=when)
            cancelled += 1
            stats = eventually(
                lambda: (now := engine.stats())["cancelled"] == cancelled and now,  # noqa: B023
                within=5,
                every=0.005,
            )
            taken.append(time.monotonic() - left_at)
            assert (stats["in_flight"], stats["served"]) == (0, 0)
        # The limit is 0.1 s, which scripts/bench gateway measures; this machine may be busy.
        assert median(taken) < 1, (window, taken)
    eventually(lambda: all(row["in_flight"] == 0 for row in entry.peers()), within=10)


def test_an_answer_that_breaks_off_is_an_error_to_the_openai_client(cluster: Cluster) -> None:
    engine = cluster.engine("slow", "--tokens", "2000", "--tokens-per-second", "50")
    host = cluster.node("host", "--expose", f"llm={engine.address}")
    entry = cluster.entry(host)
    eventually(lambda: "host" in entry.online(), within=15)
    client = openai.OpenAI(base_url=entry.base_url, api_key="x", max_retries=0, timeout=30)
    with client:
        chunks = iter(
            client.chat.completions.create(model="demo-model", messages=SAID, stream=True)
        )
        for _ in range(3):
            next(chunks)
        engine.kill()
        with pytest.raises(openai.APIError, match="cut short"):
            list(chunks)
