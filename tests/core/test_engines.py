from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.engines import (
    Catalogue,
    has_status,
    parse_gauges,
    parse_ollama_models,
    parse_openai_models,
    parse_slots,
)
from meshnode.core.node_data import NodeData, ServiceData, encode
from meshnode.errors import ProbeFailed

VLLM_METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-8B"} 3.0
vllm:num_requests_running{engine="1",model_name="odd } name 9"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="Qwen/Qwen3-8B"} 2.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 40.0
"""
RUNNING = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def models(*rows: object) -> bytes:
    return json.dumps({"object": "list", "data": rows}).encode()


def tags(*names: object) -> bytes:
    return json.dumps({"models": [{"name": name, "size": 1} for name in names]}).encode()


def test_openai_models_are_named_with_their_owner() -> None:
    body = models({"id": "Qwen/Qwen3-8B", "owned_by": "vllm"}, {"id": "lora", "owned_by": "vllm"})
    assert parse_openai_models(body) == Catalogue(
        models=("Qwen/Qwen3-8B", "lora"), owners=frozenset({"vllm"})
    )


def test_the_router_of_llamacpp_tells_which_models_are_loaded() -> None:
    body = models(
        {"id": "a", "owned_by": "llamacpp", "status": {"value": "unloaded"}},
        {"id": "b", "owned_by": "llamacpp", "status": {"value": "loaded"}},
    )
    assert has_status(body)
    assert parse_openai_models(body).loaded == ("b",)
    assert not has_status(models({"id": "a", "owned_by": "llamacpp"}))


def test_ollama_names_its_models_and_an_empty_list_may_be_null() -> None:
    assert parse_ollama_models(tags("llama3.1:8b", "q:4"), "/api/tags").models == (
        "llama3.1:8b",
        "q:4",
    )
    assert parse_ollama_models(b'{"models":null}', "/api/ps").models == ()


def test_names_that_no_announcement_can_hold_are_left_out_and_counted() -> None:
    wrong = ["x" * 129, "", "red\x1b[31m", "half\ud800", "left\u202eright"]
    catalogue = parse_ollama_models(tags("good", *wrong, "good", 7, None), "/api/tags")
    assert (catalogue.models, catalogue.unnameable) == (("good",), 5)
    many = parse_ollama_models(tags(*(f"m{n}" for n in range(1000))), "/api/tags")
    assert (len(many.models), many.unnameable) == (256, 744)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"garbage", b"\xff\xfe", b"[]", b"{}", b"null", b"7", b'"data"'),
        *(b'{"data":{}}', b'{"data":7}', b'{"models":"a"}', b"[" * 100_000, b"1" * 5000),
    ],
)
def test_what_is_no_list_of_models_is_a_failed_look(body: bytes) -> None:
    for parse in (parse_openai_models, lambda b: parse_ollama_models(b, "/api/tags")):
        with pytest.raises(ProbeFailed) as caught:
            parse(body)
        assert not caught.value.is_certain


def test_slots_at_work_are_counted() -> None:
    slots = [{"id": 0, "is_processing": True}, {"id": 1, "is_processing": False}, 7, {"id": 2}]
    assert parse_slots(json.dumps(slots).encode()) == 1
    with pytest.raises(ProbeFailed):
        parse_slots(b'{"error":{"code":501}}')


def test_gauges_are_summed_over_their_labels_and_no_others() -> None:
    assert parse_gauges(VLLM_METRICS, RUNNING) == 6
    assert parse_gauges(b"llamacpp:requests_processing 2\n", ["llamacpp:requests_processing"]) == 2
    assert parse_gauges(VLLM_METRICS, ["other"]) is None


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "x", "", "1e999"])
def test_a_gauge_that_is_no_count_is_none(value: str) -> None:
    assert parse_gauges(f"g {value}\n".encode(), ["g"]) is None


def test_an_absurd_gauge_is_bounded() -> None:
    assert parse_gauges(b"g 1e300\n", ["g"]) == 1_000_000


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
rows = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": json_values,
            "name": json_values,
            "status": json_values,
            "owned_by": json_values,
        },
    )
)


@given(rows | json_values, st.sampled_from(["data", "models"]))
def test_whatever_an_engine_lists_can_be_announced(listed: object, key: str) -> None:
    body = json.dumps({key: listed}).encode()
    for parse in (parse_openai_models, lambda b: parse_ollama_models(b, "/api/tags")):
        try:
            found = parse(body)
        except ProbeFailed:
            continue
        assert set(found.loaded) <= set(found.models)
        service = ServiceData(service_id="s", models=found.models, loaded=found.loaded)
        encode(NodeData(id="a", seq=1, services=(service,)))


@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode()))
def test_no_metrics_are_too_odd_to_read(body: bytes) -> None:
    found = parse_gauges(body, ["g"])
    assert found is None or 0 <= found <= 1_000_000
