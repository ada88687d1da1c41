from __future__ import annotations

import json
import re
from functools import partial

import httpx
import pytest
import structlog.testing
import trio
from prometheus_client import CollectorRegistry, Gauge

from meshnode.core.explain_request import MAX_BYTES
from meshnode.errors import ListenFailed, NoCandidate, NoSuchPeer, PeerUnreachable, UnknownModel
from meshnode.http import body, server
from meshnode.http.control_api import build_app
from meshnode.http.guard import Access, make_local_key
from meshnode.http.server import bind, bind_unix, serve_forever
from meshnode.metrics import Metrics

LOCAL = "key-of-this-run"
SHOWN = {"Authorization": f"Bearer {LOCAL}"}


class SomeNode:
    ready = True

    def status(self):
        return {"peer_id": "12D3me"}

    def peers(self):
        return {"self": "12D3me", "peers": [{"peer_id": "12D3me"}] * 20_000}

    def decisions(self):
        return {"decisions": []}

    def explain(self, service, target):
        if service == "none":
            raise NoCandidate("nobody offers none")
        if service == "bug":
            raise ZeroDivisionError("oops")
        return {"service_id": service, "target": target}

    def explain_model(self, asked):
        if asked.model == "nobody's":
            raise UnknownModel("nobody has it", model=asked.model)
        return {
            "model": asked.model,
            "service_id": asked.service_id,
            "target": asked.target,
            "prompt": asked.prompt,
        }

    async def ping(self, peer):
        if peer == "nobody":
            raise NoSuchPeer("no node is called 'nobody'; see meshnode peers")
        if peer == "gone":
            raise PeerUnreachable("gone did not answer within 4 s")
        return {"peer_id": peer, "rtt_ms": 0.5}

    def drain(self):
        self.drains = True
        return {"state": "draining", "served_here": 1, "sent_elsewhere": 0, "grace_s": 30.0}

    def readiness(self):
        return self.ready, [] if self.ready else ["no peer yet"]

    def metrics(self):
        registry = CollectorRegistry()
        Gauge("meshnode_peers", "h", ["state"], registry=registry).labels("up").set(3)
        return registry


async def serve(nursery, node, **more) -> int:
    sock = bind("127.0.0.1", 0, setting="api")
    port = sock.getsockname()[1]
    await nursery.start(serve_forever, build_app(node, access=Access(**more)), sock)
    return port


@pytest.fixture
async def api(nursery):
    port = await serve(nursery, SomeNode(), local_key=LOCAL)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        with trio.fail_after(20):
            yield client


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/api/status", "/api/decisions"])
async def test_each_page_is_json_with_a_schema_version(api, path):
    answer = await api.get(path)
    assert answer.status_code == 200
    assert answer.json()["schema_version"] == 1
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


async def test_a_node_that_is_not_ready_says_what_is_missing(nursery):
    node = SomeNode()
    node.ready = False
    port = await serve(nursery, node)
    with trio.fail_after(10):
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}/readyz")
    assert answer.status_code == 503
    assert answer.json()["missing"] == ["no peer yet"]


async def test_metrics_are_prometheus_text(api):
    answer = await api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'meshnode_peers{state="up"} 3.0' in answer.text


async def test_explain_takes_a_model(api):
    answer = await api.get("/api/explain", params={"model": "llama3:8b", "target": "gpu1"})
    assert answer.json()["model"] == "llama3:8b"
    assert answer.json()["target"] == "gpu1"


async def test_explain_takes_service_and_target(api):
    answer = await api.get("/api/explain", params={"service": "llm", "target": "gpu1"})
    assert answer.json() == {"schema_version": 1, "service_id": "llm", "target": "gpu1"}


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_explain_takes_a_prompt_in_a_body_from_whoever_has_a_key(api):
    asked = {"model": "m", "messages": MESSAGES, "service": "llm"}
    assert (await api.post("/api/explain", json=asked)).status_code == 401
    answer = await api.post("/api/explain", json=asked, headers=SHOWN)
    assert answer.json() == {
        "schema_version": 1,
        "model": "m",
        "service_id": "llm",
        "target": None,
        "prompt": "\x1euser\x1fhi",
    }


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b'{"prompt":"x"}', 400, "invalid_request", "model"),
        (b'{"model":"m","prompt":"x","temperature":1}', 400, "invalid_request", "temperature"),
        (b'{"model":"nobody\'s","prompt":"x"}', 503, "no_candidate", None),
    ],
)
async def test_a_body_that_asks_nothing_is_told_why(api, body, status, code, param):
    answer = await api.post("/api/explain", content=body, headers=SHOWN)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


async def test_a_prompt_takes_no_parameters_in_the_url(api):
    answer = await api.post("/api/explain?model=m", content=b"{}", headers=SHOWN)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_a_mebibyte_is_read_and_a_longer_one_refused_in_words(api, chunked):
    def made(size: int):
        text = json.dumps({"model": "m", "prompt": ""}).replace('""', '"%s"').encode()
        data = text % (b"x" * (size - len(text) + 2))
        assert len(data) == size

        async def pieces():
            for at in range(0, size, 65536):
                yield data[at : at + 65536]

        return pieces() if chunked else data

    whole = await api.post("/api/explain", content=made(MAX_BYTES), headers=SHOWN)
    assert whole.status_code == 200
    for size in (MAX_BYTES + 1, 4 * MAX_BYTES):
        answer = await api.post("/api/explain", content=made(size), headers=SHOWN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


async def test_a_body_that_stops_coming_is_given_up(api, monkeypatch):
    monkeypatch.setattr(body, "BODY_TIMEOUT", 0.1)

    async def stops():
        yield b'{"model":'
        await trio.sleep(5)

    answer = await api.post("/api/explain", content=stops(), headers=SHOWN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param"),
    [
        ("GET", "/nothing", 404, "not_found", None),
        ("GET", "/healthz/", 404, "not_found", None),
        ("POST", "/api/status", 405, "method_not_allowed", None),
        ("GET", "/api/explain?colour=red", 400, "unknown_parameter", "colour"),
        ("GET", "/api/explain?service=" + "x" * 300, 400, "too_long", "service"),
        ("GET", "/api/explain?service=none", 503, "no_candidate", None),
        ("GET", "/api/explain?service=bug", 500, "internal_error", None),
        ("GET", "/api/ping", 400, "missing_parameter", "peer"),
        ("GET", "/api/ping?peer=nobody", 404, "no_such_peer", "peer"),
        ("GET", "/api/ping?peer=gone", 504, "peer_unreachable", None),
        ("GET", "/api/ping?count=9", 400, "unknown_parameter", "count"),
    ],
)
async def test_every_error_is_json(api, method, path, status, code, param):
    answer = await api.request(method, path, headers=SHOWN)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert (error["code"], error["param"]) == (code, param)
    assert "oops" not in answer.text


def faults(metrics: Metrics, code: str) -> float:
    return metrics.protocol_faults.labels(protocol="control_api", code=code)._value.get()


async def test_a_bug_is_answered_logged_and_counted_and_other_errors_are_not(nursery):
    metrics = Metrics()
    sock = bind("127.0.0.1", 0, setting="api")
    app = build_app(SomeNode(), metrics=metrics)
    with structlog.testing.capture_logs() as logs, trio.fail_after(10):
        await nursery.start(partial(serve_forever, app, sock, metrics=metrics))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}") as ask:
            assert (await ask.get("/api/explain?service=none")).status_code == 503
            assert (await ask.get("/nothing")).status_code == 404
            # An alert on what a counter rises by needs it to be there before.
            counted = {"protocol": "control_api", "code": "request_failed"}
            name = "meshnode_protocol_faults_total"
            assert metrics.registry.get_sample_value(name, counted) == 0
            answer = await ask.get("/api/explain?service=bug")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the node failed to answer; its log says why"
    assert faults(metrics, "request_failed") == 1
    assert faults(metrics, "connection_failed") == 0
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert (line["event"], line["path"]) == ("control_api_failed", "/api/explain")


async def test_a_connection_that_fails_over_a_bug_is_counted_and_the_next_is_served(
    nursery, monkeypatch
):
    class Broken:
        def __init__(self, *args):
            pass

        def __await__(self):
            raise ZeroDivisionError("oops")

    metrics = Metrics()
    sock = bind("127.0.0.1", 0, setting="api")
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/healthz"
    with structlog.testing.capture_logs() as logs, trio.fail_after(10):
        app = build_app(SomeNode())
        await nursery.start(partial(serve_forever, app, sock, metrics=metrics))
        with monkeypatch.context() as broken:
            broken.setattr(server, "TCPServer", Broken)
            async with httpx.AsyncClient() as ask:
                with pytest.raises(httpx.RemoteProtocolError):
                    await ask.get(url)
        async with httpx.AsyncClient() as ask:
            assert (await ask.get(url)).status_code == 200
    assert faults(metrics, "connection_failed") == 1
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert line["event"] == "control_api_connection_failed"
    assert "oops" in line["error"]


async def test_a_method_that_is_not_allowed_names_those_that_are(api):
    assert "GET" in (await api.delete("/api/peers", headers=SHOWN)).headers["allow"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.7", ""])
async def test_a_page_that_rebinds_its_name_to_loopback_is_turned_away(api, host):
    answer = await api.get("/api/peers", headers={"Host": host})
    assert answer.status_code in (400, 403)
    assert "12D3me" not in answer.text


@pytest.mark.parametrize("host", ["localhost:4280", "LOCALHOST", "[::1]:4280", "127.0.0.1"])
async def test_loopback_names_are_served(api, host):
    assert (await api.get("/healthz", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer secret-é", 401),
        ("Basic secret-secret-secret", 401),
        ("Bearer secret-secret-secret", 200),
        ("bearer  secret-secret-secret", 200),
    ],
)
async def test_with_a_key_nothing_is_told_without_it(nursery, header, status):
    port = await serve(nursery, SomeNode(), api_key="secret-secret-secret")
    headers = [(b"authorization", header.encode("latin-1"))] if header else []
    with trio.fail_after(10):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/api/status", headers=headers)).status_code == status
            assert (await client.get("/healthz", headers=headers)).status_code == 200


async def test_with_a_key_an_address_is_a_good_host_but_a_name_is_not(nursery):
    port = await serve(nursery, SomeNode(), api_key="k" * 16, allowed_hosts=["gpu1.lan"])
    with trio.fail_after(10):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for host, status in [("192.168.1.7", 200), ("gpu1.lan", 200), ("evil.example", 403)]:
                answer = await client.get("/healthz", headers={"Host": host})
                assert answer.status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer guessed"}, 401),
        ({"Authorization": "Bearer"}, 401),
        (SHOWN, 405),  # let in, and there is nothing to change here
        (SHOWN | {"Sec-Fetch-Site": "cross-site"}, 403),
        (SHOWN | {"Sec-Fetch-Site": "same-site"}, 403),
        (SHOWN | {"Sec-Fetch-Site": "same-origin"}, 405),
    ],
)
async def test_what_changes_the_node_wants_a_key_even_on_loopback(api, headers, status):
    assert (await api.post("/api/peers", headers=headers)).status_code == status


async def test_without_any_key_nothing_can_be_changed_and_no_empty_key_fits(nursery):
    port = await serve(nursery, SomeNode())
    with trio.fail_after(10):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for header in ("Bearer", "Bearer None", "bearer x"):
                answer = await client.post("/api/peers", headers={"Authorization": header})
                assert answer.status_code == 401


async def test_the_key_of_this_run_also_opens_what_the_operators_key_closes(nursery):
    port = await serve(nursery, SomeNode(), api_key="operators-own-key", local_key=LOCAL)
    with trio.fail_after(10):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/api/peers", headers=SHOWN)).status_code == 200


def test_the_key_of_a_run_is_new_each_time_and_only_its_users(tmp_path):
    (tmp_path / "api.key").write_text("old")
    (tmp_path / "api.key").chmod(0o644)
    first = make_local_key(tmp_path)
    second = make_local_key(tmp_path)
    assert first != second
    assert (tmp_path / "api.key").read_text() == second + "\n"
    assert (tmp_path / "api.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["api.key"]


async def test_the_page_and_its_parts_are_served_without_the_key_and_nothing_else_is(nursery):
    port = await serve(nursery, SomeNode(), api_key="k" * 16)
    with trio.fail_after(10):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            page = await client.get("/")
            assert page.status_code == 200
            for part in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
                assert (await client.get(part)).status_code == 200, part
            assert "default-src 'self'" in page.headers["content-security-policy"]
            assert "unsafe" not in page.headers["content-security-policy"]
            for path in ("/dashboard/../api/peers", "/dashboard/%2e%2e/api/peers", "/metrics"):
                assert (await client.get(path)).status_code in (401, 404), path


async def test_an_unchanged_part_of_the_page_is_not_sent_again(api):
    first = await api.get("/dashboard/app.js")
    again = await api.get("/dashboard/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_no_answer_may_be_framed_sniffed_or_cached(api):
    for path in ("/", "/api/peers", "/nothing", "/metrics"):
        headers = (await api.get(path)).headers
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] in ("no-store", "no-cache")


async def test_what_is_no_http_does_not_end_the_server(api):
    async with await trio.open_tcp_stream("127.0.0.1", api.base_url.port) as stream:
        await stream.send_all(b"\x16\x03\x01\x00garbage\r\n\r\n")
        async for _ in stream:
            pass
    assert (await api.get("/healthz")).status_code == 200


async def test_a_port_in_use_is_named_with_its_setting():
    with bind("127.0.0.1", 0, setting="api") as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ListenFailed, match=f"api=127.0.0.1:{port} .*in use.*another port"):
            bind("127.0.0.1", port, setting="api")


async def test_an_address_of_another_machine_can_not_be_bound():
    with pytest.raises(ListenFailed, match=r"proxy=192\.0\.2\.1:80 can't be listened on"):
        bind("192.0.2.1", 80, setting="proxy")


async def test_it_stops_within_a_second_though_clients_idle_or_never_read(nursery):
    sock = bind("127.0.0.1", 0, setting="api")
    port = sock.getsockname()[1]
    with trio.fail_after(20):
        async with trio.open_nursery() as serving:
            await serving.start(serve_forever, build_app(SomeNode()), sock)
            idle = await trio.open_tcp_stream("127.0.0.1", port)
            async with idle, httpx.AsyncClient() as kept:
                await kept.get(f"http://127.0.0.1:{port}/healthz")
                deaf = trio.socket.socket()
                deaf.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
                await deaf.connect(("127.0.0.1", port))
                for _ in range(20):
                    await deaf.send(b"GET /api/peers HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await deaf.recv(1)
                started = trio.current_time()
                serving.cancel_scope.cancel()
        assert trio.current_time() - started < 1.0
        deaf.close()
        with pytest.raises(OSError, match=f"127.0.0.1:{port}|refused"):
            await trio.open_tcp_stream("127.0.0.1", port)


async def test_a_drain_wants_a_post_and_a_key_and_no_other_sites_page_can_begin_it(nursery):
    node = SomeNode()
    port = await serve(nursery, node, local_key="k" * 32)
    key = {"Authorization": "Bearer " + "k" * 32}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        with trio.fail_after(20):
            assert (await client.get("/api/drain")).status_code == 405
            assert (await client.post("/api/drain")).status_code == 401
            forged = await client.post("/api/drain", headers=key | {"Sec-Fetch-Site": "cross-site"})
            assert forged.status_code == 403
            assert not hasattr(node, "drains")
            answer = await client.post("/api/drain", headers=key)
            assert (answer.status_code, answer.json()["state"]) == (202, "draining")
            assert node.drains


async def test_a_unix_socket_is_its_users_alone_and_wants_no_key(nursery, tmp_path):
    path = tmp_path / "api.sock"
    sock = bind_unix(str(path), setting="api")
    assert path.stat().st_mode & 0o777 == 0o600
    app = build_app(SomeNode(), access=Access(local_key=LOCAL, is_unix=True))
    await nursery.start(serve_forever, app, sock)
    with trio.fail_after(10):
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://anything") as client:
            assert (await client.get("/api/status")).json()["peer_id"] == "12D3me"
            assert (await client.post("/api/status")).status_code == 405  # let in


def test_what_a_killed_node_left_of_its_socket_is_cleared_and_a_living_ones_is_not(tmp_path):
    path = str(tmp_path / "api.sock")
    bind_unix(path, setting="api").close()  # and nobody unlinks it
    with bind_unix(path, setting="api"), pytest.raises(ListenFailed, match="another program"):
        bind_unix(path, setting="api")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ListenFailed, match="something else than a socket"):
        bind_unix(str(tmp_path / "file"), setting="api")
    assert (tmp_path / "file").read_text() == "mine"
