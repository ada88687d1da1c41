"""What routing reads of a request: the model, the canonical prompt, and what is refused."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.canonical_prompt import PROMPT_LIMIT
from meshnode.core.form_body import FORM_HEAD_BYTES
from meshnode.core.json_body import MAX_STRUCTURE
from meshnode.core.openai_request import (
    RoutedRequest,
    api_of,
    is_form,
    parse_request,
    routes_by_body,
)
from meshnode.errors import ParseError

JSON = "application/json"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def parse(path: str, body: Any, content_type: str = JSON) -> RoutedRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request("POST", path, content_type, raw)


def refusal(path: str, body: Any, content_type: str = JSON) -> str:
    with pytest.raises(ParseError) as caught:
        parse(path, body, content_type)
    return str(caught.value)


# Which requests


@pytest.mark.parametrize(
    ("path", "api"),
    [
        (CHAT, "openai"),
        ("/v1/chat/completions?beta=true", "openai"),
        ("/v1/chat/completions/", "openai"),
        ("/chat/completions", "openai"),
        ("/v1/completions", "openai"),
        ("/v1/embeddings", "openai"),
        ("/v1/responses", "openai"),
        ("/v1/rerank", "openai"),
        ("/v1/images/generations", "openai"),
        ("/v1/audio/speech", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/api/chat", "ollama"),
        ("/api/generate", "ollama"),
        ("/api/embed", "ollama"),
        ("/api/embeddings", "ollama"),
        ("/api/show", "ollama"),
    ],
)
def test_every_api_names_its_model_in_the_body(path: str, api: str) -> None:
    assert routes_by_body("POST", path, JSON)
    assert not routes_by_body("GET", path, JSON)
    request = parse(path, {"model": "llama3:8b", "messages": HELLO, "input": "x", "prompt": "y"})
    assert (request.api, request.model) == (api, "llama3:8b")


def test_other_requests_need_no_body_to_be_routed() -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/files"), ("GET", "/api/tags")):
        assert not routes_by_body(method, path, JSON)
    assert parse_request("POST", "/v1/files", JSON, b"") == RoutedRequest("openai")
    assert parse_request("GET", "/", "", b"") == RoutedRequest("other")
    assert (api_of("/api/pull"), api_of("/v1/files"), api_of("/ui")) == (
        "ollama",
        "openai",
        "other",
    )


def test_what_curl_sends_by_itself_is_read_as_json() -> None:
    form = "application/x-www-form-urlencoded"
    assert routes_by_body("POST", "/api/generate", form) and not is_form(form)
    assert parse("/api/generate", {"model": "m"}, form).model == "m"


def test_a_realtime_connection_names_its_model_in_the_query() -> None:
    request = parse_request("GET", "/v1/realtime?model=gpt%3A1", "", b"")
    assert request == RoutedRequest("openai", model="gpt:1")
    with pytest.raises(ParseError, match="more than once"):
        parse_request("GET", "/v1/realtime?model=a&model=b", "", b"")


def test_ollama_streams_unless_told_not_to_and_openai_the_other_way_round() -> None:
    assert parse("/api/chat", {"model": "m"}).stream
    assert not parse("/api/chat", {"model": "m", "stream": False}).stream
    assert not parse(CHAT, {"model": "m"}).stream
    assert parse(CHAT, {"model": "m", "stream": True}).stream
    assert not parse(CHAT, {"model": "m", "stream": "yes"}).stream  # the engine says so


def test_ollama_takes_an_older_name_of_the_model_and_any_case_of_letters() -> None:
    assert parse("/api/show", {"name": "llama3"}).model == "llama3"
    assert parse("/api/show", {"name": "old", "model": "new"}).model == "new"
    assert parse("/api/chat", {"Model": "llama3"}).model == "llama3"


# What is the engine's to judge


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": None},
        {"model": ""},
        {"messages": "none"},
        {"messages": [1, None, {"role": 5, "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": [1, None, {"type": []}]}], "tools": "x"},
        {"temperature": 1e308, "max_tokens": -(10**300)},
        {"images": [None], "messages": [{"images": {"a": 1}}]},
    ],
)
def test_what_only_the_engine_can_judge_is_passed_on_without_a_model(body: Any) -> None:
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/api/generate"):
        assert parse(path, body).model is None


def test_half_a_surrogate_pair_in_a_prompt_is_no_matter_but_in_a_model_it_is() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"\\ud800hi"}]}'
    assert parse(CHAT, body).prompt == "\x1euser\x1f?hi"
    assert "not printable" in refusal(CHAT, b'{"model":"\\ud800"}')


# What is refused


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b'{"model":"m"', "no JSON"),
        (b'{"model":"m"} trailing', "no JSON"),
        (b'\xef\xbb\xbf{"model":"m"}', "no JSON"),
        (b'{"model":"\xff"}', "not UTF-8"),
        ('{"model":"m"}'.encode("utf-16"), "not UTF-8"),
        (b'{"model":5}', "model is no text"),
        (b'{"model":["m"]}', "model is no text"),
        (b'{"model":"a","model":"b"}', "more than once"),
        (b'{"model":"a","Model":"b"}', "more than once"),
        (b'{"model":"a","\\u006dodel":"b"}', "more than once"),
        (b'{"model":"a","mod\\u0065l":"b"}', "more than once"),
        (b'{"model":"a\\nb"}', "not printable"),
        (b'{"model":"' + b"m" * 300 + b'"}', "longer than 256"),
        (b'{"n":' + b"9" * 5000 + b"}", "4300"),
    ],
)
def test_a_body_that_can_not_be_routed_or_is_ambiguous_is_refused(body: bytes, says: str) -> None:
    assert says in refusal(CHAT, body)


def test_the_same_key_twice_below_the_top_is_the_engines_business() -> None:
    body = b'{"model":"m","tools":[{"model":"a","model":"b"}]}'
    assert parse(CHAT, body).model == "m"


def test_bodies_made_to_cost_much_are_refused_before_they_do() -> None:
    assert "nests too deep" in refusal(CHAT, b"[" * 500_000)
    assert "nests too deep" in refusal(CHAT, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    assert "more than 1,000,000 values" in refusal(CHAT, b"[]," * MAX_STRUCTURE)
    # Parsed, these 30 MB would take a gigabyte.
    assert "more than" in refusal(CHAT, b'{"a":[' + b"[]," * 10_000_000)


def test_random_bytes_are_refused_and_never_crash() -> None:
    rng = random.Random(5)
    seed = bytearray(json.dumps({"model": "m", "messages": HELLO, "tools": [{"a": [1]}]}).encode())
    for _ in range(2000):
        body = bytearray(seed)
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        with suppress(ParseError):
            parse(CHAT, bytes(body))


# The canonical prompt


def test_the_order_of_keys_and_the_settings_leave_the_prompt_alone() -> None:
    one = parse(CHAT, {"temperature": 1, "model": "m", "messages": HELLO})
    two = parse(CHAT, {"messages": [{"content": "hello", "role": "user"}], "model": "m"})
    assert one.prompt == two.prompt == "\x1euser\x1fhello"


def test_tools_and_system_stand_before_the_turns_wherever_the_json_has_them() -> None:
    tool = {"name": "clock", "schema": {"b": 1, "a": 2}}
    body = {"messages": HELLO, "system": "be kind", "tools": [tool], "model": "m"}
    assert parse("/v1/messages", body).prompt == (
        '\x1etools\x1f{"name":"clock","schema":{"a":2,"b":1}}\x1esystem\x1fbe kind\x1euser\x1fhello'
    )


def test_text_parts_and_plain_text_are_one_prompt() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert parse(CHAT, {"messages": parts}).prompt == parse(CHAT, {"messages": HELLO}).prompt


def test_an_image_stands_as_a_short_digest_and_other_images_differ() -> None:
    def prompt(url: str) -> str:
        part = {"type": "image_url", "image_url": {"url": url}}
        return parse(CHAT, {"messages": [{"role": "user", "content": [part]}]}).prompt

    assert prompt("data:" + "A" * 1_000_000).startswith("\x1euser\x1f[image_url ")
    assert len(prompt("data:" + "A" * 1_000_000)) < 60
    assert prompt("data:a") != prompt("data:b")


def test_each_api_has_its_own_way_to_say_the_prompt() -> None:
    def prompt(path: str, **body: Any) -> str:
        return parse(path, body).prompt

    assert prompt("/v1/completions", prompt="once") == "once"
    assert prompt("/v1/completions", prompt=["a", "b"]) == "ab"
    assert prompt("/v1/completions", prompt=[1, 22]) == "1,22,"
    assert prompt("/v1/responses", instructions="i", input="x") == "\x1esystem\x1fi\x1euser\x1fx"
    assert prompt("/v1/responses", input=HELLO) == "\x1euser\x1fhello"
    assert prompt("/api/chat", messages=HELLO) == "\x1euser\x1fhello"
    assert prompt("/api/generate", system="s", prompt="p") == "\x1esystem\x1fs\x1euser\x1fp"
    assert prompt("/v1/embeddings", input="x") == prompt("/api/show") == ""


TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(max_size=40)},
        optional={"tool_calls": st.just([{"id": "1", "function": {"name": "f"}}])},
    ),
    max_size=6,
)


@given(turns=TURNS, more=TURNS)
def test_a_longer_conversation_only_appends_to_the_prompt(
    turns: list[dict[str, Any]], more: list[dict[str, Any]]
) -> None:
    short = parse(CHAT, {"messages": turns}).prompt
    assert parse(CHAT, {"messages": turns + more}).prompt.startswith(short)


def test_no_more_of_a_prompt_is_built_than_a_chain_covers() -> None:
    long = parse(CHAT, {"messages": [{"role": "user", "content": "x" * 5_000_000}] * 3}).prompt
    assert len(long) == PROMPT_LIMIT


# Forms


def form(*parts: tuple[str, bytes], boundary: str = "xyz", whole: bool = True) -> bytes:
    body = b""
    for disposition, content in parts:
        head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
        body += head.encode() + content + b"\r\n"
    return body + (f"--{boundary}--\r\n".encode() if whole else b"")


MULTIPART = "multipart/form-data; boundary=xyz"
TRANSCRIBE = "/v1/audio/transcriptions"
SOUND = ('name="file"; filename="a.wav"', b"RIFF" * 1000)
MODEL = ('name="model"', b"whisper-1")


def test_the_model_of_an_upload_is_found_before_the_file_has_come() -> None:
    assert routes_by_body("POST", TRANSCRIBE, MULTIPART) and is_form(MULTIPART)
    head = form(('name="language"', b"de"), MODEL, SOUND)[:400]
    assert parse(TRANSCRIBE, head, MULTIPART) == RoutedRequest("openai", "whisper-1")
    quoted = 'Multipart/Form-Data; charset=utf-8; boundary="x y"'
    assert parse(TRANSCRIBE, form(MODEL, SOUND, boundary="x y"), quoted).model == "whisper-1"


def test_a_model_behind_the_file_or_cut_short_is_not_known() -> None:
    assert parse(TRANSCRIBE, form(SOUND, MODEL), MULTIPART).model is None
    assert parse(TRANSCRIBE, form(MODEL, whole=False), MULTIPART).model is None
    assert parse(TRANSCRIBE, form(('name="modelx"', b"y")), MULTIPART).model is None
    assert parse(TRANSCRIBE, b"", MULTIPART).model is None


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        (form(MODEL), "multipart/form-data", "no boundary"),
        (form(MODEL, MODEL, SOUND), MULTIPART, "more than once"),
        (form(('name="model"', b"\xff"), SOUND), MULTIPART, "not UTF-8"),
        (form(('name="model"', b"m" * 2000), SOUND), MULTIPART, "longer than"),
        (form(('name="model"', b"a\r\nb"), SOUND), MULTIPART, "not printable"),
    ],
)
def test_a_form_that_is_ambiguous_or_broken_is_refused(
    body: bytes, content_type: str, says: str
) -> None:
    assert says in refusal(TRANSCRIBE, body, content_type)


def test_a_form_of_nothing_but_boundaries_costs_little() -> None:
    body = (b"--xyz\r\n\r\n\r\n" * 10_000)[:FORM_HEAD_BYTES]
    assert parse(TRANSCRIBE, body, MULTIPART).model is None
