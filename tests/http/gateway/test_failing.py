"""What fails: peers before their first byte, engines in mid-answer, clients at any time."""

from __future__ import annotations

import json
import socket

import pytest
import trio

from meshnode.http.gateway.settings import GatewaySettings
from meshnode.http.gateway.watch import GoneWatch
from support.gateway_mesh import (
    CHAT,
    abort,
    answering,
    chat,
    exchange,
    get,
    post,
    read_to_end,
    until,
)

LIMIT = 20.0  # seconds, for one test


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


async def hang(connection):
    await connection.request()
    await connection.until_gone()


async def close_without_a_word(connection):
    await connection.request()


async def cut_without_a_word(connection):
    if await connection.request() is not None:
        connection.cut()


async def speak_something_else(connection):
    if await connection.request() is not None:
        await connection.send(b"220 mail.example ESMTP\r\n\r\n")


LOADING = answering(b'{"error":"loading model"}', b"503 Service Unavailable")
NO_MODEL = answering(b'{"error":{"code":"model_not_found"}}', b"404 Not Found")
NO_MODEL_OLLAMA = answering(b'{"error":"model \\"m\\" not found"}', b"404 Not Found")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (LOADING, "status_503"),
        (answering(b"", b"502 Bad Gateway"), "status_502"),
        (answering(b"", b"504 Gateway Timeout"), "status_504"),
        (NO_MODEL, "model_not_found"),
        (NO_MODEL_OLLAMA, "model_not_found"),
        (close_without_a_word, "closed_early"),
        (cut_without_a_word, "reset"),
        (speak_something_else, "bad_answer"),
    ],
)
async def test_a_peer_that_can_not_serve_costs_the_client_nothing(mesh, bad, reason):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(bad, "bad", vram=9)
        good = await mesh.served_by(answering(b"good"), "good", vram=1)
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"good")
        assert good.requests[0][1] == CHAT
        assert mesh.counted("retries_total", reason=reason) == 1
        await until(lambda: mesh.front.router.own_total == 0)
        served, given_up = mesh.front.router.decisions()
        assert (given_up.outcome, served.outcome) == (reason, "complete")
        assert (served.attempt, served.retries) == (2, 1)
        assert mesh.front.router.own_total == 0


def head_and_then(ending):
    """An engine that says 200 as soon as it is asked, and has nothing to say then."""

    async def serve(connection):
        if await connection.request() is not None:
            await connection.send(b"HTTP/1.1 200 OK\r\n" + EVENTS + b"\r\n\r\n")
            await ending(connection)

    return serve


async def cut_at_once(connection):
    connection.cut()


async def end_at_once(connection):
    pass


@pytest.mark.parametrize(
    ("ending", "reason"), [(cut_at_once, "reset"), (end_at_once, "bad_answer")]
)
async def test_a_head_alone_is_no_beginning_and_another_peer_is_asked(mesh, ending, reason):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(head_and_then(ending), "bad", vram=9)
        await mesh.served_by(answering(b"good"), "good", vram=1)
        answer = await exchange(mesh, chat())
        assert answer.endswith(b"good")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert mesh.counted("retries_total", reason=reason) == 1


async def test_an_engine_that_sends_a_head_and_hangs_is_a_504(mesh):
    async def hang_on(connection):
        await connection.until_gone()

    with trio.fail_after(LIMIT):
        await mesh.open(settings=GatewaySettings(first_byte_timeout=0.3))
        engine = await mesh.served_by(head_and_then(hang_on))
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 504 ")
        await engine.gone.wait()
        assert mesh.front.router.own_total == 0


async def test_the_head_of_what_can_not_be_repeated_is_passed_on_at_once(mesh):
    async def hang_on(connection):
        await connection.until_gone()

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(head_and_then(hang_on))
        async with await mesh.connect() as client:
            await client.send_all(post("/api/pull", b'{"model":"m"}'))
            assert (await client.receive_some()).startswith(b"HTTP/1.1 200 OK")


async def test_an_answer_without_a_byte_of_body_is_an_answer(mesh):
    async def end_it(connection):
        await trio.sleep(0.05)
        await connection.send(b"0\r\n\r\n")

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(head_and_then(end_it))
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"\r\n\r\n0\r\n\r\n")


async def test_a_refusing_backend_and_a_draining_peer_cost_the_client_nothing(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.peer("refusing", closed_port(), vram=9)
        await mesh.served_by(answering(b"drained"), "draining", vram=8)
        await mesh.served_by(answering(b"good"), "good", vram=1)
        mesh.peers["draining"].services.draining = True
        assert (await exchange(mesh, post("/v1/files", b"once"))).endswith(b"good")


async def test_a_request_that_may_have_been_done_is_not_done_twice(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        bad = await mesh.served_by(close_without_a_word, "bad", vram=9)
        good = await mesh.served_by(answering(b"good"), "good", vram=1)
        answer = await exchange(mesh, post("/api/pull", b'{"model":"m"}'))
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b"may have been served" in answer
        assert len(bad.requests) == 1
        assert good.requests == []


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/api/pull"])
async def test_an_engine_that_closes_idle_connections_loses_no_request(mesh, target):
    async def answer_once(connection):
        if await connection.request() is not None:
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answer_once)
        async with await mesh.connect() as client:
            for number in range(50):
                await client.send_all(post(target, CHAT, close=False))
                answer = b""
                while not answer.endswith(b"ok"):
                    answer += await client.receive_some()
                assert answer.startswith(b"HTTP/1.1 200 OK")
                if number % 2:
                    await trio.sleep(0.002)
        assert len(engine.requests) == 50


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429, 500])
async def test_what_the_client_did_wrong_is_not_tried_elsewhere(mesh, status):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(answering(b"no", b"%d Whatever" % status), "one", vram=9)
        other = await mesh.served_by(answering(b"yes"), "other", vram=1)
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 %d Whatever\r\n" % status)
        assert answer.endswith(b"no")
        assert other.requests == []


async def test_an_engines_refusal_is_passed_on_where_nobody_else_can_serve(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(LOADING)
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert answer.endswith(b'{"error":"loading model"}')


async def test_three_peers_are_tried_and_no_more(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        for number in range(5):
            await mesh.served_by(close_without_a_word, f"bad{number}")
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert mesh.counted("retries_total", reason="closed_early") == 3
        assert b"3 of the peers were tried" in answer


async def test_peers_that_die_one_after_another_with_the_request_are_not_its_fault(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()

        def dying(name):
            async def serve(connection):
                if await connection.request() is not None:
                    mesh.lose(name)

            return serve

        for number in range(4):
            await mesh.served_by(dying(f"dying{number}"), f"dying{number}", vram=9)
        await mesh.served_by(answering(b"yes"), "good", vram=1)
        answer = await exchange(mesh, chat())
        assert answer.endswith(b"yes")
        # The stream died before the peer's word on it, or after.
        lost = [mesh.counted("retries_total", reason=word) for word in ("lost", "unreachable")]
        assert sum(lost) == 4


def busy_first(peer, times=1):
    """Let a peer have no room for its first requests, though nobody knew."""
    admit, asked = peer.services.admit, []

    def busy(service_id):
        asked.append(service_id)
        return "busy" if len(asked) <= times else admit(service_id)

    peer.services.admit = busy


async def test_a_request_waits_for_peers_that_are_all_busy(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        for number in range(4):
            await mesh.served_by(answering(b"yes"), f"busy{number}")
        for peer in mesh.peers.values():
            busy_first(peer)
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert mesh.counted("retries_total", reason="busy") == 4
        assert mesh.counted("queue_wait_seconds_count", outcome="served") == 1
        (last, *_) = mesh.front.router.decisions()
        assert (last.attempt, last.retries) == (5, 4)


async def test_peers_that_stay_busy_are_a_503_that_says_when_to_come_back(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(answering(b"yes"))
        busy_first(mesh.peers["peer"], times=100)
        answer = await exchange(mesh, chat())  # the queue's timeout is 1 s here
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in answer
        assert b"no peer had room within 1.0 s" in answer


async def test_who_passes_a_peer_over_does_not_stand_before_others(mesh):
    """The first to wait can't be served by the one peer that has room; the second can."""
    with trio.fail_after(LIMIT):
        await mesh.open()
        held, asked = trio.Event(), []

        async def hold_or_fail(connection):
            if (request := await connection.request()) is None:
                return  # a look at its health
            asked.append(request)
            if len(asked) == 1:
                return  # without an answer
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes")

        async def hold(connection):
            await connection.request()
            await held.wait()
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nheld")

        full = await mesh.served_by(hold, "full", vram=9, limit=1)
        answers = []

        async def client():
            answers.append(await exchange(mesh, chat()))

        async with trio.open_nursery() as clients:
            clients.start_soon(client)
            await full.asked.wait()
            await mesh.served_by(hold_or_fail, "other", vram=1)
            clients.start_soon(client)
            await until(lambda: len(mesh.front.queue) == 1)
            clients.start_soon(client)
            await until(lambda: len(answers) == 1)
            assert answers[0].endswith(b"yes")
            held.set()
        assert sorted(answer[-4:] for answer in answers) == [b"\nyes", b"held", b"held"]


async def test_an_engine_that_does_not_begin_in_time_is_a_504_and_is_stopped(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open(settings=GatewaySettings(first_byte_timeout=0.2))
        engine = await mesh.served_by(hang)
        answer = await exchange(mesh, chat())
        assert answer.startswith(b"HTTP/1.1 504 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
        await engine.gone.wait()
        await until(lambda: mesh.front.router.decisions()[0].outcome == "timeout")


async def test_a_kept_answer_that_is_longer_than_it_says_spoils_no_other(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        poison = b"okHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"
        await mesh.served_by(answering(poison, framing=b"content-length: 2"))
        for _ in range(10):
            answer = await exchange(mesh, get())
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert answer.endswith(b"\r\n\r\nok")


# Cut in mid-answer


def begins(head: bytes, body: bytes):
    async def serve(connection):
        if await connection.request() is None:
            return
        await connection.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body)
        await trio.sleep(0.05)
        connection.cut()

    return serve


CHUNKED = b"\r\ntransfer-encoding: chunked"
EVENTS = b"content-type: text/event-stream; charset=utf-8" + CHUNKED


async def test_a_cut_stream_of_events_says_so_and_does_not_look_whole(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(begins(EVENTS, b"a\r\ndata: one\n\r\n"))
        answer = await exchange(mesh, chat())
        assert b"data: one\n" in answer
        event = answer.rpartition(b"data: ")[2].partition(b"\n\n")[0]
        assert json.loads(event)["error"]["code"] == "upstream_cut"
        assert b"[DONE]" not in answer
        assert not answer.endswith(b"0\r\n\r\n")
        await until(lambda: mesh.front.router.decisions()[0].outcome == "upstream_cut")


async def test_a_cut_stream_of_anthropics_has_an_event_of_its_name(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(begins(EVENTS, b"a\r\ndata: one\n\r\n"))
        answer = await exchange(mesh, post("/v1/messages", CHAT))
        assert b'event: error\ndata: {"type":"error","error":{"type":"api_error"' in answer
        assert not answer.endswith(b"0\r\n\r\n")


async def test_a_cut_stream_of_ollamas_has_a_line_that_says_so(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        head = b"content-type: application/x-ndjson" + CHUNKED
        await mesh.served_by(begins(head, b"3\r\n{}\n\r\n"))
        answer = await exchange(mesh, post("/api/chat", CHAT))
        assert b'\n{"error":"the answer was cut short' in answer
        assert not answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "head",
    [b"content-length: 100", b"content-type: application/json" + CHUNKED],
    ids=["length", "chunks"],
)
async def test_any_other_cut_answer_resets_the_client(mesh, head):
    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(begins(head, b"4\r\nhalf\r\n"))
        async with await mesh.connect() as client:
            await client.send_all(chat())
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(client)


async def test_an_answer_shorter_than_its_length_resets_the_client(mesh):
    async def serve(connection):
        if await connection.request() is not None:
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        async with await mesh.connect() as client:
            await client.send_all(chat())
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(client)


async def test_an_answer_that_stops_is_cut_after_the_idle_limit(mesh):
    async def serve(connection):
        if await connection.request() is not None:
            await connection.send(b"HTTP/1.1 200 OK\r\n" + EVENTS + b"\r\n\r\n1\r\nx\r\n")
            await connection.until_gone()

    with trio.fail_after(LIMIT):
        await mesh.open(settings=GatewaySettings(idle_timeout=0.3))
        engine = await mesh.served_by(serve)
        answer = await exchange(mesh, chat())
        assert b"nothing moved for 0.3 s" in answer
        await engine.gone.wait()
        await until(lambda: mesh.front.router.decisions()[0].outcome == "idle")


# The client goes away


async def stream_forever(connection):
    if await connection.request() is None:
        return
    await connection.send(b"HTTP/1.1 200 OK\r\n" + EVENTS + b"\r\n\r\n")
    async with trio.open_nursery() as nursery:

        async def speak():
            while True:
                await connection.send(b"9\r\ndata: x\n\n\r\n")
                await trio.sleep(0.005)

        nursery.start_soon(speak)
        await connection.until_gone()
        nursery.cancel_scope.cancel()


async def half_of_an_answer(connection):
    if await connection.request() is not None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await connection.until_gone()


@pytest.mark.parametrize("leave", ["close", "abort"])
@pytest.mark.parametrize(
    ("serve", "begins_with"),
    [(hang, b""), (stream_forever, b"data: x"), (half_of_an_answer, b"half")],
    ids=["before headers", "in mid-stream", "in a plain answer"],
)
async def test_a_client_that_leaves_frees_the_engine_at_once(mesh, serve, begins_with, leave):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(serve)
        client = await mesh.connect()
        await client.send_all(chat())
        await engine.asked.wait()
        received = b""
        while begins_with not in received:
            received += await client.receive_some()
        left_at = trio.current_time()
        if leave == "abort":
            abort(client)
        else:
            await client.aclose()
        await engine.gone.wait()
        # The limit is 0.1 s; this machine may be busy with other things.
        assert engine.gone_at - left_at < 1
        await until(lambda: mesh.front.router.own_total == 0)
        await until(lambda: mesh.peers["peer"].services.total_in_flight == 0)
        assert mesh.front.router.decisions()[0].outcome == "client_gone"
        assert mesh.counted("requests_total", outcome="client_gone") == 1
        assert mesh.counted("retries_total", reason="reset") == 0


async def test_a_client_that_leaves_during_its_upload_frees_the_engine(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        got = trio.Event()

        async def take(connection):
            while True:
                await connection.more()
                got.set()
                connection.counted = True

        engine = await mesh.served_by(take)
        client = await mesh.connect()
        await client.send_all(post("/v1/files", bytes(1_000_000))[:-500_000])
        await got.wait()
        await client.aclose()
        await engine.gone.wait()
        await until(lambda: mesh.front.router.own_total == 0)


async def test_where_the_kernel_can_not_tell_clients_are_looked_at(nursery):
    watch = GoneWatch(use_epoll=False)
    nursery.start_soon(watch.watch_forever)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(LIMIT):
        client = await trio.open_tcp_stream(*listeners[0].socket.getsockname()[:2])
        served = await listeners[0].accept()

        class Watched:
            is_busy = True
            gone = trio.Event()

            def on_gone(self):
                self.gone.set()

        watched = Watched()
        watch.add(served.socket.fileno(), watched)
        await client.send_all(b"x")
        await trio.sleep(0.1)
        assert not watched.gone.is_set()
        assert await served.receive_some() == b"x"
        await client.aclose()
        await watched.gone.wait()
        watch.remove(served.socket.fileno(), watched)
        await served.aclose()
        await listeners[0].aclose()
    nursery.cancel_scope.cancel()


async def test_a_gateway_that_closes_finishes_what_runs_and_lets_quiet_clients_go(mesh):
    go_on = trio.Event()

    async def serve(connection):
        while (request := await connection.request()) is not None:
            if b"/slow" in request[0]:
                await go_on.wait()
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    with trio.fail_after(LIMIT):
        await mesh.open()
        await mesh.served_by(serve)
        quiet, busy = await mesh.connect(), await mesh.connect()
        await quiet.send_all(get(close=False))
        assert (await quiet.receive_some()).endswith(b"ok")
        await busy.send_all(get("/slow", close=False))
        await until(lambda: mesh.front.router.own_total == 1)

        mesh.served.close()

        assert await read_to_end(quiet) == b""
        go_on.set()
        answer = await read_to_end(busy)
        assert answer.endswith(b"ok")
        assert b"\r\nconnection: close\r\n" in answer
        await busy.aclose()
        await quiet.aclose()
        await mesh.ended.wait()
