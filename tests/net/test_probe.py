"""What engines are recognised as, and what is learnt from them, on real sockets."""

from __future__ import annotations

import socket
from functools import partial

import pytest
import trio

from meshnode.errors import ProbeFailed
from meshnode.net import probe as probes
from meshnode.net.probe import Probe
from meshnode.testing.engine import EngineOptions, serve_engine
from meshnode.values import AUTO, HealthCheck, HostPort
from support.pages import LLAMACPP, LOCALAI, OLLAMA, VLLM, serve_pages

LIMIT = 15.0
SOME_WARM = {
    "/v1/models": {
        "data": [
            {"id": "warm", "status": {"value": "loaded"}},
            {"id": "cold", "status": {"value": "unloaded"}},
        ]
    }
}


@pytest.fixture
def engine(nursery):
    return partial(serve_pages, nursery)


@pytest.mark.parametrize(
    ("pages", "kind", "models", "loaded", "load"),
    [
        (VLLM, "vllm", ("Qwen/Qwen3-8B",), ("Qwen/Qwen3-8B",), 4),
        (LLAMACPP, "llamacpp", ("gemma.gguf",), ("gemma.gguf",), 1),
        (OLLAMA, "ollama", ("a:1b", "b:8b"), ("b:8b",), None),
        (
            {k: OLLAMA[k] for k in ("/api/tags", "/api/ps")},
            "ollama",
            ("a:1b", "b:8b"),
            ("b:8b",),
            None,
        ),
        (LOCALAI, "openai", ("hermes",), ("hermes",), None),
        (SOME_WARM, "openai", ("warm", "cold"), ("warm",), None),
        ({"/health": b"fine"}, "http:/health", (), (), None),
        ({}, "tcp", (), (), None),
        ({"/v1/models": (401, b"no key")}, "tcp", (), (), None),
        ({"/v1/models": b"garbage", "/health": (404, b"")}, "tcp", (), (), None),
    ],
)
async def test_each_engine_is_recognised_and_read(engine, pages, kind, models, loaded, load):
    with trio.fail_after(LIMIT):
        _, address = await engine(pages)
        probe = Probe(address, AUTO)
        for _ in range(2):  # the second look knows what it is
            view = await probe.look()
            assert (str(view.check), view.load) == (kind, load)
            assert (view.catalogue.models, view.catalogue.loaded) == (models, loaded)


async def test_the_built_in_engine_tells_what_is_loaded(nursery):
    with trio.fail_after(LIMIT):
        options = EngineOptions(models=("small", "big"), loaded=("big",))
        host, port = await nursery.start(lambda **kw: serve_engine(options, **kw))
        view = await Probe(HostPort(host, port), AUTO).look()
        assert (view.catalogue.models, view.catalogue.loaded) == (("small", "big"), ("big",))


async def test_llamacpp_is_not_well_while_it_loads_its_model_and_recognised_after(engine):
    loading = (503, {"error": {"code": 503, "message": "Loading model"}})
    with trio.fail_after(LIMIT):
        served, address = await engine(dict.fromkeys(LLAMACPP, loading))
        probe = Probe(address, AUTO)
        with pytest.raises(ProbeFailed, match="answers 503") as caught:
            await probe.look()
        assert caught.value.is_certain
        served.pages = dict(LLAMACPP)
        assert (await probe.look()).check.kind == "llamacpp"


async def test_a_dead_engine_behind_a_live_server_is_not_well(engine):
    with trio.fail_after(LIMIT):
        served, address = await engine(VLLM)
        probe = Probe(address, AUTO)
        await probe.look()
        served.pages["/health"] = (503, b"")
        with pytest.raises(ProbeFailed) as caught:
            await probe.look()
        assert caught.value.is_certain


@pytest.mark.parametrize("odd", [(404, b""), (501, b"{}"), b"garbage", b"[1, 2", "hang"])
async def test_an_engine_that_keeps_no_count_is_well_all_the_same(engine, monkeypatch, odd):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT", 0.2)
    with trio.fail_after(LIMIT):
        _, address = await engine(VLLM | {"/metrics": odd})
        view = await Probe(address, HealthCheck("vllm")).look()
        assert (view.load, view.catalogue.models) == (None, ("Qwen/Qwen3-8B",))
        _, address = await engine(LLAMACPP | {"/slots": odd})
        assert (await Probe(address, HealthCheck("llamacpp")).look()).load in (None, 0)


async def test_a_key_that_only_clients_have_hides_the_models_not_the_health(engine):
    with trio.fail_after(LIMIT):
        _, address = await engine(VLLM | {"/v1/models": (401, b"")})
        view = await Probe(address, HealthCheck("vllm")).look()
        assert (view.catalogue.models, view.load) == ((), 4)


async def test_a_path_that_was_named_is_all_that_is_asked(engine):
    with trio.fail_after(LIMIT):
        served, address = await engine({"/ready?full=1": b"yes"})
        probe = Probe(address, HealthCheck("http", "/ready?full=1"))
        await probe.look()
        assert served.asked == ["/ready?full=1"]
        served.pages.clear()
        with pytest.raises(ProbeFailed, match="answers 404"):
            await probe.look()


async def test_a_plain_tcp_service_is_bothered_with_http_three_times_at_most(nursery, monkeypatch):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT", 0.05)
    heard = []

    async def silent(stream):
        async with stream:
            heard.append(await stream.receive_some())
            await trio.sleep_forever()

    with trio.fail_after(LIMIT):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, silent, listeners)
        address = HostPort("127.0.0.1", listeners[0].socket.getsockname()[1])
        probe = Probe(address, AUTO)
        for _ in range(10):
            assert (await probe.look()).check.kind == "tcp"
        assert len(heard) == 3


async def test_what_comes_back_may_be_another_engine(engine):
    with trio.fail_after(LIMIT):
        served, address = await engine(OLLAMA)
        probe = Probe(address, AUTO)
        assert (await probe.look()).check.kind == "ollama"
        probe.forget()
        served.pages = dict(VLLM)
        assert (await probe.look()).check.kind == "vllm"


async def test_a_hung_engine_keeps_its_kind_so_that_it_stays_unwell(engine, monkeypatch):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT", 0.1)
    with trio.fail_after(LIMIT):
        served, address = await engine(OLLAMA)
        probe = Probe(address, AUTO)
        await probe.look()
        served.pages = dict.fromkeys(OLLAMA, "hang")
        for _ in range(5):
            with pytest.raises(ProbeFailed):
                await probe.look()
        assert probe.speaks_http


async def test_an_engine_that_is_gone_is_certainly_not_well():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with trio.fail_after(LIMIT), pytest.raises(ProbeFailed) as caught:
            await Probe(HostPort("127.0.0.1", taken.getsockname()[1]), AUTO).look()
    assert caught.value.is_certain
