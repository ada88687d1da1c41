from __future__ import annotations

import io
import json
import os
import socket
import sys
from collections.abc import Callable

import pytest
import trio
from prometheus_client import CollectorRegistry

from meshnode.cli import run
from meshnode.errors import NoCandidate, NoSuchPeer, PeerUnreachable
from meshnode.http.control_api import build_app
from meshnode.http.guard import Access
from meshnode.http.server import bind, serve_forever

ME, OTHER = "12D3KooWme000000000000000000000000000000000000000aaaa", "12D3KooWother0000000bbbb"


class SomeNode:
    def status(self):
        return {
            "name": "gpu1",
            "peer_id": ME,
            "state": "up",
            "ready": False,
            "missing": ["not joined"],
            "available_vram": None,
            "peers_online": 1,
        }

    def peers(self):
        row = {
            "peer_id": OTHER,
            "name": "evil\x1b[31m [bold]name",
            "state": "up",
            "online": True,
            "last_seen_s": 400.0,
            "available_vram": 24 * 2**30,
            "total_vram": None,
            "in_flight": 3,
            "services": [{"service_id": "llm", "models": ["a", "b", "c", "d"], "healthy": False}],
            "rtt_ms": 1.234,
        }
        return {"self": ME, "peers": [{"peer_id": ME, "name": "gpu1"}, row]}

    def decisions(self):
        return {"decisions": []}

    def explain(self, service, target):
        if service == "none":
            raise NoCandidate("nobody offers none")
        rows = [
            {"peer_id": OTHER, "name": "gpu2", "in_flight": 0, "available_vram": 2**30},
            {"peer_id": ME, "name": "gpu1", "in_flight": 9, "excluded": "unhealthy"},
        ]
        picked = None if service == "random" else OTHER
        tier = "random" if service == "random" else "in_flight"
        return {"service_id": service, "picked": picked, "tier": tier, "candidates": rows}

    def explain_model(self, asked):
        rows = [
            {
                "peer_id": OTHER,
                "name": "gpu2",
                "service_id": "vllm",
                "loaded": True,
                "match_ratio": 0.75,
            },
            {"peer_id": ME, "name": "gpu1", "service_id": "ollama", "loaded": False},
        ]
        told = {"model": asked.model, "picked": OTHER, "tier": "loaded", "candidates": rows}
        if asked.prompt:
            rows[1]["match_ratio"] = 0.9
            told |= {"prompt": asked.prompt, "forced_off": ME, "pressure": 3}
        return told

    async def ping(self, peer):
        if peer == "nobody":
            raise NoSuchPeer("no node is called 'nobody'; see meshnode peers")
        if peer == "gone":
            raise PeerUnreachable("gone did not answer within 4 s")
        return {"peer_id": OTHER, "name": peer, "rtt_ms": 1.5}

    def readiness(self):
        return True, []

    def metrics(self):
        return CollectorRegistry()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for key in list(os.environ):
        if key.startswith("MESHNODE_"):
            monkeypatch.delenv(key)


@pytest.fixture
async def api(nursery):
    sock = bind("127.0.0.1", 0, setting="api")
    app = build_app(SomeNode(), access=Access(local_key="key-of-this-run"))
    await nursery.start(serve_forever, app, sock)
    return f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def file(tmp_path) -> Callable[[str | bytes], str]:
    """Write a prompt; the node's key stands in a state folder beside it."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "prompt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture(autouse=True)
def state_dir(tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("state")
    (folder / "api.key").write_text("key-of-this-run\n")
    monkeypatch.setenv("MESHNODE_STATE_DIR", str(folder))


async def meshnode(*argv: str) -> int:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(run, argv)


@pytest.mark.parametrize("verb", ["status", "peers", "explain", "top"])
async def test_every_query_prints_json_with_its_schema_version(api, verb, capsys):
    assert await meshnode(verb, "--api", api, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema_version"] == 1
    assert err == ""


async def test_status_says_what_is_missing(api, capsys):
    assert await meshnode("status", "--api", api) == 0
    out = capsys.readouterr().out
    assert "not ready: not joined" in out
    assert "- free of -" in out


async def test_the_table_of_peers_is_one_line_each_and_shows_no_peers_escape_codes(api, capsys):
    assert await meshnode("peers", "--api", api) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3
    assert "\x1b" not in out
    for word in ("gpu1 (here)", "[bold]name", "24.0 GiB", "7 m", "llm (down)", "a, b, c +1"):
        assert word in out
    assert "1.2 ms" in out


async def test_explain_names_the_pick_and_the_tier(api, capsys):
    assert await meshnode("explain", "--service", "llm", "--api", api) == 0
    out = capsys.readouterr().out
    assert "gpu2; decided by: fewest requests in flight" in out
    assert "unhealthy" in out


async def test_explain_by_model_shows_where_it_is_loaded_and_what_is_cached(api, capsys):
    assert await meshnode("explain", "--model", "llama3", "--api", api) == 0
    out = capsys.readouterr().out
    assert "gpu2; decided by: the model is loaded there" in out
    for word in ("SERVICE", "LOADED", "CACHED", "vllm", "yes", "75%", "ollama", "no"):
        assert word in out


CHAT = [{"role": "user", "content": "hi"}]
READ = "\x1euser\x1fhi"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Once upon", "Once upon"),
        ('{"a recipe": 1}', '{"a recipe": 1}'),
        ("{", "{"),
        ("[1]", "[1]"),
        (json.dumps({"messages": CHAT}), READ),
        (json.dumps({"messages": CHAT, "model": "theirs", "stream": True, "tools": None}), READ),
        (json.dumps({"input": "hi", "max_output_tokens": 9}), READ),
    ],
)
async def test_a_prompt_file_is_a_request_or_plain_text(api, file, text, read, capsys):
    args = ("--model", "m", "--api", api, "--json")
    assert await meshnode("explain", "--prompt-file", file(text), *args) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["prompt"]) == ("m", read)


async def test_a_prompt_file_may_name_the_model_itself(api, file, capsys):
    path = file(json.dumps({"messages": CHAT, "model": "theirs"}))
    assert await meshnode("explain", "--prompt-file", path, "--api", api, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "theirs"


async def test_a_prompt_is_read_from_standard_input(api, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    args = ("--model", "m", "--api", api, "--json")
    assert await meshnode("explain", "--prompt-file", "-", *args) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Grüße"


async def test_explain_says_whose_warm_cache_is_passed_over_for_load(api, file, capsys):
    args = ("--model", "m", "--api", api)
    assert await meshnode("explain", "--prompt-file", file("Once"), *args) == 0
    assert capsys.readouterr().out.endswith(
        "gpu1 is warm for 90% of it, but too busy; within the last minute load drove 3 requests "
        "off their warm caches\n"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Once", "names no model; say which: --model NAME"),
        (b"\xff", "is not UTF-8 (byte 0)"),
        (b"x" * (2**20 + 1), "has more than 1,048,576 bytes"),
        (None, "can't be read: No such file"),
        (json.dumps({"model": "m", "prompt": ["x"]}), "refuses: prompt is text"),
    ],
)
async def test_a_prompt_file_that_can_not_be_asked_with_says_why(api, file, text, words, capsys):
    path = "/nowhere/file" if text is None else file(text)
    assert await meshnode("explain", "--prompt-file", path, "--api", api) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and words in err


async def test_a_prompt_without_a_key_says_where_one_is(api, file, tmp_path, capsys):
    args = ("--model", "m", "--api", api, "--state-dir", str(tmp_path))
    assert await meshnode("explain", "--prompt-file", file("x"), *args) == 2
    assert "--api-key-file" in capsys.readouterr().err


async def test_explain_under_the_random_policy_picks_nobody_beforehand(api, capsys):
    assert await meshnode("explain", "--service", "random", "--api", api) == 0
    assert "the dice" in capsys.readouterr().out


async def test_a_service_that_nobody_offers_ends_with_4(api, capsys):
    assert await meshnode("explain", "--service", "none", "--api", api) == 4
    assert capsys.readouterr().err == "error: nobody offers none\n"


async def test_ping_prints_each_round_trip_and_a_summary(api, capsys):
    assert await meshnode("ping", "gpu2", "--count", "2", "--interval", "0", "--api", api) == 0
    out, err = capsys.readouterr()
    assert out == f"gpu2 {OTHER}: 1.500 ms\n" * 2
    assert "2 of 2 came back; min 1.500, median 1.500, max 1.500 ms" in err


async def test_ping_in_json_is_one_line_for_each_round_trip(api, capsys):
    assert await meshnode("ping", "gpu2", "-c", "2", "--interval", "0", "--api", api, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["rtt_ms"] for line in lines] == [1.5, 1.5]


async def test_a_ping_of_nobody_is_not_tried_again_and_ends_with_1(api, capsys):
    with trio.fail_after(30):  # four round trips would be a minute apart
        assert await meshnode("ping", "nobody", "--interval", "60", "--api", api) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: no node is called 'nobody'; see meshnode peers\n"


async def test_a_ping_of_a_peer_that_is_gone_is_tried_as_often_as_asked_and_ends_with_1(
    api, capsys
):
    assert await meshnode("ping", "gone", "-c", "2", "--interval", "0", "--api", api) == 1
    out, err = capsys.readouterr()
    assert out == "gone: gone did not answer within 4 s\n" * 2
    assert "none of 2 round trips to gone came back" in err


async def test_top_piped_is_shown_once(api, capsys):
    assert await meshnode("top", "--api", api) == 0
    out = capsys.readouterr().out
    assert "gpu1: up, 1 online" in out
    assert "24.0 GiB" in out and "PICKED; WHY" in out


async def test_the_environment_says_where_to_ask(api, monkeypatch, capsys):
    monkeypatch.setenv("MESHNODE_API", api)
    assert await meshnode("status", "--json") == 0


@pytest.mark.parametrize("verb", ["status", "peers", "explain", "top"])
def test_without_a_node_it_ends_with_3_and_says_what_to_do(verb, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert run([verb, "--api", f"127.0.0.1:{port}"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert f"no node answers at 127.0.0.1:{port}" in err
    assert "meshnode up" in err


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\nhello", b""])
async def test_something_else_that_listens_there_is_no_node(nursery, answer, capsys):
    async def serve(stream):
        await stream.send_all(answer)
        await stream.send_eof()
        async for _ in stream:
            pass

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    port = listeners[0].socket.getsockname()[1]
    assert await meshnode("peers", "--api", f"127.0.0.1:{port}") == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"127.0.0.1:{port}" in err


@pytest.mark.parametrize("api", ["nonsense", "127.0.0.1:0", "http://127.0.0.1:4280"])
def test_an_address_that_is_none_ends_with_2(api, capsys):
    assert run(["peers", "--api", api]) == 2
    assert f"api={api} from flag --api" in capsys.readouterr().err


async def test_the_api_key_is_sent_where_it_is_wanted(nursery, tmp_path, capsys):
    sock = bind("127.0.0.1", 0, setting="api")
    await nursery.start(serve_forever, build_app(SomeNode(), access=Access(api_key="k" * 20)), sock)
    api = f"127.0.0.1:{sock.getsockname()[1]}"
    assert await meshnode("peers", "--api", api) == 2
    assert "--api-key-file" in capsys.readouterr().err
    (tmp_path / "key").write_text("k" * 20 + "\n")
    assert await meshnode("peers", "--api", api, "--api-key-file", str(tmp_path / "key")) == 0


def test_gpus_shows_what_would_be_announced(capsys):
    assert run(["gpus", "--vram", "24GiB", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["gpus"]
    assert (row["available"], row["announced"]) == (24 * 2**30, True)
    assert run(["gpus", "--vram", "24GiB"]) == 0
    assert "24.0 GiB" in capsys.readouterr().out
    assert run(["gpus", "--vram", "much"]) == 2
