"""How services of a host are looked after: real servers on loopback, with quick looks."""

from __future__ import annotations

import contextlib
import socket

import pytest
import trio

from meshnode.core import health
from meshnode.metrics import Metrics
from meshnode.net import local_services, probe
from meshnode.net.local_services import LocalService, LocalServices
from meshnode.values import AUTO, HealthCheck
from support.pages import LLAMACPP, LOCALAI, OLLAMA, VLLM, serve_pages, tags

LIMIT = 20.0


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(local_services, "_CONNECT_INTERVAL", 0.02)
    monkeypatch.setattr(local_services, "_LOOK_INTERVAL", 0.1)
    monkeypatch.setattr(probe, "PROBE_TIMEOUT", 0.2)


class Watched(LocalServices):
    """One service named llm, and what was told of it."""

    def __init__(self, port, check=AUTO, **options):
        self.changes = 0
        self.own_metrics = Metrics()
        service = LocalService("llm", "127.0.0.1", port, check=check, **options)
        super().__init__([service], metrics=self.own_metrics, on_change=self._count)

    def _count(self):
        self.changes += 1

    @property
    def llm(self):
        (service,) = self.announced()
        return service


@pytest.fixture
def watch(nursery):
    def watch(port, check=AUTO, **options):
        services = Watched(port, check, **options)
        nursery.start_soon(services.check_health_forever)
        return services

    return watch


@pytest.fixture
def engine(nursery):
    async def engine(pages):
        served, address = await serve_pages(nursery, pages)
        return served, address.port

    return engine


async def until(condition, within=10.0):
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


async def hold_open(stream):
    async with stream:
        await trio.sleep_forever()


async def test_a_service_that_refuses_is_told_of_and_so_is_its_return(watch, nursery):
    with trio.fail_after(LIMIT):
        port = free_port()
        services = watch(port)
        await until(lambda: not services.llm.healthy)
        assert services.changes >= 1
        assert "can't be reached" in services.unhealthy()["llm"]
        assert services.admit("llm") == "ok"  # only trying tells whether it is back

        before = services.changes
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, hold_open, listeners)
        await until(lambda: services.llm.healthy)
        assert services.changes > before
        assert services.unhealthy() == {}


async def test_a_request_that_is_refused_tells_at_once():
    services = Watched(free_port())  # nobody looks
    with trio.fail_after(LIMIT):
        with pytest.raises(local_services.PeerUnreachable):
            await services.connect("llm")
    assert not services.llm.healthy
    assert services.changes == 1
    registry = services.own_metrics.registry
    assert registry.get_sample_value("meshnode_service_healthy", {"service": "llm"}) == 0


async def test_models_and_those_loaded_are_announced_and_each_change_once(watch, engine):
    with trio.fail_after(LIMIT):
        served, port = await engine(OLLAMA)
        services = watch(port)
        await until(lambda: services.llm.models == ("a:1b", "b:8b"))
        assert services.llm.loaded == ("b:8b",)
        before = services.changes
        served.pages["/api/ps"] = tags("a:1b", "b:8b")
        await until(lambda: services.llm.loaded == ("a:1b", "b:8b"))
        assert services.changes == before + 1
        looks = len(served.asked)
        await until(lambda: len(served.asked) > looks + 5)
        assert services.changes == before + 1  # nothing new, nothing told


async def test_an_engine_that_says_it_is_not_well_gets_nothing_until_it_is(watch, engine):
    with trio.fail_after(LIMIT):
        served, port = await engine(VLLM)
        services = watch(port)
        await until(lambda: bool(services.llm.models))
        served.pages["/health"] = (503, b"")
        await until(lambda: not services.llm.healthy)
        assert services.admit("llm") == "unhealthy"
        assert "answers 503" in services.unhealthy()["llm"]
        # That it accepts connections is no sign of health.
        await trio.sleep(0.2)
        assert not services.llm.healthy
        served.pages["/health"] = b""
        await until(lambda: services.llm.healthy)
        assert services.admit("llm") == "ok"


async def test_an_idle_engine_that_hangs_is_found_out_by_its_second_silence(watch, engine):
    with trio.fail_after(LIMIT):
        served, port = await engine(OLLAMA)
        services = watch(port)
        await until(lambda: bool(services.llm.models))
        served.pages = dict.fromkeys(OLLAMA, "hang")
        await until(lambda: not services.llm.healthy)
        assert "not answered" in services.unhealthy()["llm"]


async def test_a_busy_engine_from_which_bytes_flow_is_not_declared_dead(
    watch, nursery, monkeypatch
):
    monkeypatch.setattr(health, "BUSY_GRACE", 0.5)
    # Its health page hangs while it generates; a request gets a byte now and then.
    hangs = False
    hung = 0

    async def engine(stream):
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await answer(stream)

    async def answer(stream):
        nonlocal hung
        request = await stream.receive_some()
        if request.startswith(b"GET /health"):
            if hangs:
                hung += 1
                await trio.sleep_forever()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await stream.receive_some()
        elif request:
            while True:
                await stream.send_all(b"token ")
                await trio.sleep(0.02)

    with trio.fail_after(LIMIT):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, engine, listeners)
        port = listeners[0].socket.getsockname()[1]
        services = watch(port, HealthCheck("http", "/health"))
        await until(lambda: services._slots["llm"].view is not None)
        hangs = True
        with services.claim("llm", "12D3KooWclient"):
            stream = await services.connect("llm")
            await stream.send_all(b"generate")
            while hung < 5:
                assert await stream.receive_some()
                assert services.llm.healthy
            # Bytes stop: now it only hangs.
            await until(lambda: not services.llm.healthy)
            stream.reset()


async def test_a_service_whose_health_is_off_is_not_looked_at_and_never_accused(watch):
    with trio.fail_after(LIMIT):
        services = watch(free_port(), HealthCheck("off"))
        with pytest.raises(local_services.PeerUnreachable):
            await services.connect("llm")
        await trio.sleep(0.1)
        assert services.llm.healthy


async def test_requests_that_came_around_the_mesh_count_and_ours_count_once(watch, engine):
    with trio.fail_after(LIMIT):
        served, port = await engine(VLLM)  # it says that it holds 4
        services = watch(port)
        await until(lambda: services.llm.in_flight == 4)
        with services.claim("llm", "a"), services.claim("llm", "b"):
            looks = len(served.asked)
            await until(lambda: len(served.asked) > looks + 6)
            assert services.llm.in_flight == 4  # two are ours
            assert services.in_flight_of_others("llm", "a") == 3
        served.pages["/metrics"] = b"vllm:num_requests_running 0\n"
        await until(lambda: services.llm.in_flight == 0)


async def test_a_limit_is_announced_and_kept(watch, engine):
    with trio.fail_after(LIMIT):
        _, port = await engine(LOCALAI)
        services = watch(port, max_in_flight=1)
        assert services.llm.max_in_flight == 1
        with services.claim("llm", "a"):
            assert services.admit("llm") == "busy"
        assert services.admit("llm") == "ok"


async def test_hostile_answers_neither_stall_nor_end_the_watch(watch, engine):
    with trio.fail_after(LIMIT):
        served, port = await engine(LLAMACPP)
        services = watch(port)
        await until(lambda: bool(services.llm.models))
        for odd in (b"\xff" * 900_000, b"[" * 200_000, b'{"data": [7, null, {"id": "\\ud800"}]}'):
            served.pages["/v1/models"] = odd
            looks = len(served.asked)
            await until(lambda looks=looks: len(served.asked) > looks + 3)
        served.pages["/v1/models"] = LLAMACPP["/v1/models"]
        await until(lambda: services.llm.healthy and services.llm.models == ("gemma.gguf",))


async def test_a_mesh_hears_within_a_second_that_a_service_is_down(
    make_node, start, wait_until, engine, nursery
):
    with trio.fail_after(LIMIT):
        front, host = make_node("front"), None
        served, port = await engine(VLLM)
        host = make_node("host", services=[LocalService("llm", "127.0.0.1", port)])
        await start(front, host)
        await host.mesh.dial(front.mesh.addrs[0], timeout=5)
        nursery.start_soon(host.services.check_health_forever)

        def heard():
            entry = front.ledger.get(host.peer_id)
            return entry.node.services[0] if entry else None

        host.services.on_change = host.announcer.changed
        await wait_until(lambda: heard() is not None and heard().models, within=5)
        assert heard().loaded == ("Qwen/Qwen3-8B",)
        served.pages["/health"] = (500, b"")
        await wait_until(lambda: not host.services.is_healthy("llm"), within=5, step=0.01)
        assert await wait_until(lambda: not heard().healthy, within=5, step=0.01) <= 1.1
