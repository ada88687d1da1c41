"""Full, failing and lying peers before a client's eyes: it is served, or told why, and at once."""

from __future__ import annotations

import socket
import struct
from collections import Counter

import pytest
import trio

from meshnode.core.circuit import FAILURES_IN_A_ROW
from meshnode.http.unavailable import looks_like_http, refuse
from meshnode.net.federation_entry import EntrySettings
from meshnode.net.local_services import LocalService

LIMIT = 20.0  # seconds, for one test
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
HTTP = EntrySettings(may_repeat=looks_like_http)


def llm(port, **options):
    return [LocalService("llm", "127.0.0.1", port, **options)]


def abort(client):
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


async def read_request(stream):
    received = b""
    while not received.endswith(b"{}"):
        data = await stream.receive_some()
        if not data:
            raise trio.BrokenResourceError
        received += data


def answers(name):
    async def answer(stream):
        await read_request(stream)
        answer.served += 1
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + name)

    answer.served = 0
    return answer


def when(event, name):
    async def answer(stream):
        await read_request(stream)
        answer.begun += 1
        answer.open += 1
        answer.most = max(answer.most, answer.open)
        try:
            await event.wait()
        finally:
            answer.open -= 1
        await stream.send_all(name)

    answer.begun = answer.open = answer.most = 0
    return answer


async def cut(stream):
    await stream.receive_some()
    abort(stream)


async def end_empty(stream):
    await read_request(stream)


async def stall(stream):
    await read_request(stream)
    await trio.sleep_forever()


async def ask(connect, request=REQUEST):
    async with await connect() as client:
        await client.send_all(request)
        received = b""
        async for data in client:
            received += data
        return received


async def settle(node):
    while node.router.own_total or node.router.decisions()[0].outcome is None:  # noqa: ASYNC110
        await trio.sleep(0.001)


# Full peers


async def test_when_all_peers_are_full_requests_wait_and_are_served_as_places_come_free(
    any_node, link, backend, proxy, nursery, wait_until
):
    gate = trio.Event()
    with trio.fail_after(LIMIT):
        front = any_node("front")
        handlers = [when(gate, b"a"), when(gate, b"b")]
        peers = [
            any_node(name, services=llm(await backend(handler), max_in_flight=2))
            for name, handler in zip("ab", handlers, strict=True)
        ]
        await link(front, *peers)
        connect = await proxy(front, HTTP)
        served = []

        async def client():
            served.append(await ask(connect))

        for _ in range(10):
            nursery.start_soon(client)
        await wait_until(lambda: len(front.queue) == 6, within=5)
        assert front.counted("queue_length") == 6
        await wait_until(lambda: sum(handler.open for handler in handlers) == 4, within=5)
        gate.set()
        await wait_until(lambda: len(served) == 10, within=10)

        assert set(served) == {b"a", b"b"}
        assert [handler.most for handler in handlers] == [2, 2]
        assert front.refused == []
        assert front.counted("queue_length") == 0
        assert front.counted("queue_wait_seconds_count", outcome="served") == 6


async def test_a_request_that_waited_too_long_gets_a_503_that_says_when_to_come_back(
    make_node, link, backend, proxy, nursery
):
    with trio.fail_after(LIMIT):
        front = make_node("front", queue={"timeout": 0.5})
        peer = make_node("peer", services=llm(await backend(stall), max_in_flight=1))
        await link(front, peer)
        connect = await proxy(front, HTTP, refuse)
        first = await connect()
        await first.send_all(REQUEST)
        while not front.router.own_total:  # noqa: ASYNC110
            await trio.sleep(0.01)

        answer = await ask(connect)

        head, _, page = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert b"\r\nRetry-After: 1" in head
        assert b"no peer had room within 0.5 s" in head
        assert page.endswith(b"</html>")
        assert front.counted("queue_wait_seconds_count", outcome="timeout") == 1
        abort(first)


async def test_more_than_may_wait_are_told_at_once(make_node, link, backend, proxy, nursery):
    with trio.fail_after(LIMIT):
        front = make_node("front", queue={"length": 0})
        peer = make_node("peer", services=llm(await backend(stall), max_in_flight=1))
        await link(front, peer)
        connect = await proxy(front, HTTP, refuse)
        first = await connect()
        await first.send_all(REQUEST)
        while not front.router.own_total:  # noqa: ASYNC110
            await trio.sleep(0.01)
        answer = await ask(connect)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"0 requests wait already, and no more may" in answer
        abort(first)


@pytest.mark.parametrize("leave", ["resets", "hangs up"])
async def test_a_waiting_client_that_goes_away_is_taken_out_at_once(
    make_node, link, backend, proxy, wait_until, leave
):
    gate = trio.Event()
    with trio.fail_after(LIMIT):
        front = make_node("front")
        handler = when(gate, b"x")
        await link(front, make_node("peer", services=llm(await backend(handler), max_in_flight=1)))
        connect = await proxy(front, HTTP)
        first, waiting = await connect(), await connect()
        await first.send_all(REQUEST)
        await wait_until(lambda: handler.open == 1, within=5)
        await waiting.send_all(REQUEST)
        await wait_until(lambda: len(front.queue) == 1, within=5)

        if leave == "resets":
            abort(waiting)
        else:
            await waiting.aclose()

        assert await wait_until(lambda: len(front.queue) == 0, within=5) < 1
        assert front.counted("queue_wait_seconds_count", outcome="gone") == 1
        gate.set()
        async with first:
            assert await first.receive_some() == b"x"
        await wait_until(lambda: front.router.own_total == 0, within=5)
        assert front.counted("tunnels_total", role="entry", outcome="client_gone") == 1


async def test_a_waiting_client_of_another_protocol_may_half_close(
    make_node, link, backend, proxy, wait_until
):
    async def say(stream):
        async for _ in stream:
            pass
        await stream.send_all(b"said")

    with trio.fail_after(LIMIT):
        front = make_node("front")
        peer = make_node("peer", services=llm(await backend(say), max_in_flight=1))
        await link(front, peer)
        connect = await proxy(front, HTTP)
        async with await connect() as first, await connect() as second:
            await first.send_all(b"\x00\x01")
            await wait_until(lambda: front.router.own_total == 1, within=5)
            await second.send_all(b"\x02" * 100_000)  # more than is kept while it waits
            await second.send_eof()
            await wait_until(lambda: len(front.queue) == 1, within=5)
            await first.send_eof()
            assert await first.receive_some() == b"said"
            assert await second.receive_some() == b"said"


async def test_a_peer_that_is_busy_beyond_what_is_known_is_passed_over_for_a_second(
    make_node, link, backend, proxy
):
    good = answers(b"good")
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(answers(b"bad!"))))
        await link(front, bad, make_node("good", services=llm(await backend(good))))
        connect = await proxy(front, HTTP)
        bad.services.admit = lambda service_id: "busy"
        for _ in range(3):
            assert (await ask(connect)).endswith(b"good")
            await settle(front)
        assert front.counted("retries_total", reason="busy") == 1
        circuit = front.router.circuit(bad.peer_id, "llm")
        assert circuit.failures == 0


# Failing before the first byte of an answer


@pytest.mark.parametrize(("fail", "reason"), [(cut, "cut"), (end_empty, "empty")])
async def test_a_peer_that_fails_before_its_answer_begins_costs_an_http_client_nothing(
    any_node, link, backend, proxy, fail, reason
):
    with trio.fail_after(LIMIT):
        front = any_node("front")
        bad = any_node("bad", vram=99, services=llm(await backend(fail)))
        await link(front, bad, any_node("good", services=llm(await backend(answers(b"good")))))
        connect = await proxy(front, HTTP)
        assert (await ask(connect)).endswith(b"good")
        await settle(front)
        served, given_up = front.router.decisions()
        assert (given_up.picked, given_up.outcome) == (bad.peer_id, reason)
        assert (served.outcome, served.attempt, served.is_retry) == ("complete", 2, True)
        assert front.counted("retries_total", reason=reason) == 1
        assert front.router.circuit(bad.peer_id, "llm").failures == 1


async def test_a_peer_killed_before_its_answer_begins_costs_an_http_client_nothing(
    any_node, link, backend, proxy, nursery, wait_until
):
    gate = trio.Event()
    with trio.fail_after(LIMIT):
        front = any_node("front")
        handler = when(gate, b"bad!")
        bad = any_node("bad", vram=99, services=llm(await backend(handler)))
        await link(front, bad, any_node("good", services=llm(await backend(answers(b"good")))))
        connect = await proxy(front, HTTP)
        served = []

        async def client():
            served.append(await ask(connect))

        nursery.start_soon(client)
        await wait_until(lambda: handler.open == 1, within=5)
        bad.kill()
        await wait_until(lambda: len(served) == 1, within=5)
        assert served[0].endswith(b"good")


async def test_peers_that_die_one_after_another_with_the_request_are_not_its_fault(
    make_node, network, link, backend, proxy, nursery, wait_until
):
    gate = trio.Event()
    served = []
    with trio.fail_after(LIMIT):
        front = make_node("front")
        handler = when(gate, b"bad!")
        port = await backend(handler)
        dying = [make_node(f"dying{vram}", vram=vram, services=llm(port)) for vram in (9, 8, 7, 6)]
        good = make_node("good", vram=1, services=llm(await backend(answers(b"good"))))
        await link(front, *dying, good)
        connect = await proxy(front, HTTP)

        async def client():
            served.append(await ask(connect))

        nursery.start_soon(client)
        for number, peer in enumerate(dying, start=1):
            await wait_until(lambda number=number: handler.begun == number, within=5)
            network.sever(front.mesh, peer.mesh)
        await wait_until(lambda: len(served) == 1, within=5)
        assert served[0].endswith(b"good")
        assert front.counted("retries_total", reason="lost") == 4


async def test_what_is_no_http_is_never_sent_twice(make_node, link, backend, proxy):
    good = answers(b"good")
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(cut)))
        await link(front, bad, make_node("good", services=llm(await backend(good))))
        connect = await proxy(front, HTTP)
        with pytest.raises(trio.BrokenResourceError):
            await ask(connect, b"\x00transfer 100 to Bob{}")
        assert good.served == 0


async def test_a_request_longer_than_what_is_kept_is_cut_and_not_sent_in_part(
    make_node, link, backend, proxy
):
    async def read_all_and_cut(stream):
        received = 0
        while received < 100_000:
            received += len(await stream.receive_some())
        abort(stream)

    good = answers(b"good")
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(read_all_and_cut)))
        await link(front, bad, make_node("good", services=llm(await backend(good))))
        connect = await proxy(front, HTTP)
        with pytest.raises(trio.BrokenResourceError):
            await ask(connect, REQUEST[:-2] + bytes(200_000))
        assert good.served == 0


async def test_after_the_first_byte_of_an_answer_nothing_is_repeated(
    make_node, link, backend, proxy
):
    async def begin_and_cut(stream):
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n")
        await trio.sleep(0.1)
        abort(stream)

    good = answers(b"good")
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(begin_and_cut)))
        await link(front, bad, make_node("good", services=llm(await backend(good))))
        connect = await proxy(front, HTTP)
        with pytest.raises(trio.BrokenResourceError):
            await ask(connect)
        await settle(front)
        assert good.served == 0
        assert front.router.circuit(bad.peer_id, "llm").last_failure == "cut"


async def test_when_three_peers_failed_an_http_client_is_told_how(make_node, link, backend, proxy):
    with trio.fail_after(LIMIT):
        front = make_node("front")
        port = await backend(end_empty)
        await link(front, *[make_node(name, services=llm(port)) for name in "abcd"])
        answer = await ask(await proxy(front, HTTP, refuse))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"none served this request: empty, empty, empty" in answer


# Retries never become a storm


async def test_retries_beyond_a_fifth_wait_for_each_other_and_none_is_lost(
    make_node, link, backend, proxy, nursery, wait_until
):
    gate, most = trio.Event(), Counter()

    async def hold_then_cut(stream):
        await read_request(stream)
        await gate.wait()
        abort(stream)

    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(hold_then_cut)))
        await link(front, bad, make_node("good", services=llm(await backend(answers(b"good")))))
        connect = await proxy(front, HTTP)
        budget = front.router._book.retries
        begin = budget.begin

        def count():
            begin()
            most["open"] = max(most["open"], budget.open)
            most["allowed"] = max(most["allowed"], budget.allowed(front.router.own_total))

        budget.begin = count
        served = []

        async def client():
            served.append(await ask(connect))

        for _ in range(60):
            nursery.start_soon(client)
        await wait_until(lambda: front.router.own_total >= 30, within=5)
        gate.set()
        await wait_until(lambda: len(served) == 60, within=10)
        assert {answer[-4:] for answer in served} == {b"good"}
        assert 0 < most["open"] <= most["allowed"] <= 12
        assert budget.open == 0


async def test_when_the_budget_stays_spent_the_client_gets_the_reason(
    make_node, link, backend, proxy, monkeypatch
):
    monkeypatch.setattr("meshnode.net.lease_queue.RETRY_WAIT", 0.2)
    with trio.fail_after(LIMIT):
        front = make_node("front")
        bad = make_node("bad", vram=99, services=llm(await backend(cut)))
        await link(front, bad, make_node("good", services=llm(await backend(answers(b"good")))))
        for _ in range(3):
            front.router._book.retries.begin()  # three others, whose outcome is not known yet
        answer = await ask(await proxy(front, HTTP, refuse))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"are being retried already" in answer


# Claims are not believed for long


@pytest.mark.parametrize("lie", [cut, end_empty], ids=["fails", "ends empty"])
async def test_a_liar_is_put_aside_after_five_requests_none_of_which_is_lost(
    any_node, link, backend, proxy, lie
):
    asked = Counter()

    async def liar(stream):
        asked["liar"] += 1
        await lie(stream)

    with trio.fail_after(LIMIT):
        front = any_node("front")
        claims = any_node("claims", vram=10**12, services=llm(await backend(liar)))
        honest = answers(b"good")
        await link(front, claims, any_node("honest", vram=1, services=llm(await backend(honest))))
        connect = await proxy(front, HTTP)
        for _ in range(12):
            assert (await ask(connect)).endswith(b"good")
            await settle(front)
        assert asked["liar"] == FAILURES_IN_A_ROW
        assert honest.served == 12
        assert front.counted("ejections_total", reason="failures") == 1
        decision = front.router.explain(now=trio.current_time(), service_id="llm")
        (row,) = [row for row in decision.candidates if row.peer_id == claims.peer_id]
        assert row.excluded.startswith("ejected for ")
        assert "5 failures in a row" in row.excluded


async def test_a_liar_that_stalls_is_put_aside_and_its_requests_are_served_by_others(
    any_node, link, backend, proxy, nursery, wait_until
):
    asked = Counter()

    async def liar(stream):
        asked["liar"] += 1
        await stall(stream)

    settings = EntrySettings(may_repeat=looks_like_http, first_byte_timeout=0.1)
    with trio.fail_after(LIMIT):
        front = any_node("front")
        claims = any_node("claims", vram=10**12, services=llm(await backend(liar)))
        honest = answers(b"good")
        await link(front, claims, any_node("honest", vram=1, services=llm(await backend(honest))))
        connect = await proxy(front, settings)
        served = []

        async def client():
            served.append(await ask(connect))

        for _ in range(3):  # the honest one proves itself beside the liar's first requests
            await client()
        for _ in range(20):
            nursery.start_soon(client)
        await wait_until(lambda: len(served) == 23, within=10)
        for _ in range(5):
            await client()
        assert {answer[-4:] for answer in served} == {b"good"}
        assert asked["liar"] == FAILURES_IN_A_ROW
        assert front.counted("retries_total", reason="stalled") == FAILURES_IN_A_ROW


async def test_a_slow_newcomer_is_waited_for_where_nobody_else_could_serve(
    make_node, link, backend, proxy, nursery
):
    gate = trio.Event()
    settings = EntrySettings(may_repeat=looks_like_http, first_byte_timeout=0.05)
    with trio.fail_after(LIMIT):
        front = make_node("front")
        await link(front, make_node("slow", services=llm(await backend(when(gate, b"late")))))
        connect = await proxy(front, settings)
        async with await connect() as client:
            await client.send_all(REQUEST)
            await trio.sleep(0.5)
            gate.set()
            assert await client.receive_some() == b"late"


async def test_a_newcomer_gets_one_request_at_a_time_beside_a_proven_peer(
    any_node, link, backend, proxy, nursery, wait_until
):
    gate = trio.Event()
    with trio.fail_after(LIMIT):
        front = any_node("front")
        proven_gate = trio.Event()
        proven_gate.set()
        old = any_node("old", vram=1, services=llm(await backend(when(proven_gate, b"old"))))
        await link(front, old)
        connect = await proxy(front, HTTP)
        for _ in range(3):
            assert await ask(connect) == b"old"
        newcomer = when(gate, b"new")
        new = any_node("new", vram=99, services=llm(await backend(newcomer)))
        await link(new)
        await new.mesh.dial(front.mesh.addrs[0], timeout=5)
        await wait_until(lambda: "new" in front.online(), within=10)

        served = []

        async def client():
            served.append(await ask(connect))

        for _ in range(8):
            nursery.start_soon(client)
        await wait_until(lambda: len(served) == 7, within=5)
        assert (newcomer.most, set(served)) == (1, {b"old"})
        gate.set()
        await wait_until(lambda: len(served) == 8, within=5)
        await settle(front)
        for _ in range(2):
            await client()
            await settle(front)
        assert served.count(b"new") == 3
