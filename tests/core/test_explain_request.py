"""What somebody asks of a prompt that nobody sends: as the gateway would read it, or refused."""

from __future__ import annotations

import json

import pytest

from meshnode.core.explain_request import MAX_NAME, ExplainRequest, parse_explain
from meshnode.core.openai_request import parse_request
from meshnode.errors import ParseError

TOOLS = [{"type": "function", "function": {"name": "look"}}]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"text": "yes"}]}]


def parsed(**fields: object) -> ExplainRequest:
    return parse_explain(json.dumps({"model": "m"} | fields).encode())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "once"}),
        ("/v1/chat/completions", {"messages": TURNS, "tools": TOOLS}),
        ("/v1/chat/completions", {"messages": TURNS, "functions": [{"name": "look"}]}),
        ("/api/chat", {"messages": TURNS}),
        ("/v1/messages", {"messages": TURNS, "system": "be brief", "tools": TOOLS}),
        ("/v1/messages", {"messages": TURNS, "system": [{"type": "text", "text": "be brief"}]}),
        ("/v1/responses", {"input": "hi", "instructions": "be brief"}),
        ("/v1/responses", {"input": TURNS, "tools": TOOLS}),
    ],
)
def test_a_prompt_is_the_one_that_the_gateway_reads_from_the_same_fields(
    path: str, fields: dict[str, object]
) -> None:
    body = json.dumps({"model": "m", "temperature": 0.5} | fields).encode()
    routed = parse_request("POST", path, "application/json", body)
    assert routed.prompt
    assert parsed(**fields) == ExplainRequest("m", routed.prompt)


def test_service_and_target_are_taken_along() -> None:
    assert parsed(prompt="", service="llm", target="gpu1") == ExplainRequest("m", "", "llm", "gpu1")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, None, "one of prompt, messages or input; it has none"),
        ({"prompt": "x", "messages": []}, None, "it has prompt and messages"),
        ({"prompt": "x", "stream": True}, "stream", "beside prompt there is only"),
        ({"prompt": "x", "system": "y"}, "system", "beside prompt"),
        ({"messages": [], "instructions": "y"}, "instructions", "beside messages"),
        ({"prompt": ["x"]}, "prompt", "prompt is text"),
        ({"messages": "x"}, "messages", "messages is a list of objects"),
        ({"messages": ["x"]}, "messages", "messages is a list of objects"),
        ({"input": 1}, "input", "text or a list of objects"),
        ({"prompt": "x", "model": ""}, "model", "1 to 256 characters"),
        ({"prompt": "x", "model": "m" * 257}, "model", "1 to 256 characters"),
        ({"prompt": "x", "model": 1}, "model", "1 to 256 characters"),
        ({"prompt": "x", "service": None}, "service", "1 to 256 characters"),
        ({"prompt": "x", "target": "t" * (MAX_NAME + 1)}, "target", "1 to 256"),
        ({"prompt": "x", "target": "\ud800"}, "target", "half a surrogate pair"),
    ],
)
def test_what_is_not_understood_is_refused_and_the_field_named(
    fields: dict[str, object], param: str | None, words: str
) -> None:
    with pytest.raises(ParseError) as refused:
        parsed(**fields)
    assert refused.value.param == param
    assert words in str(refused.value)


def test_a_body_without_a_model_says_so() -> None:
    with pytest.raises(ParseError) as refused:
        parse_explain(b'{"prompt":"x"}')
    assert refused.value.param == "model"
