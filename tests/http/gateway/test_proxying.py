"""Requests through a gateway and an in-process mesh to engines on loopback."""

from __future__ import annotations

import trio

from support.gateway_mesh import answering, exchange, get, until

LIMIT = 20.0  # seconds, for one test


async def test_a_request_reaches_the_engine_and_its_answer_the_client(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"hello", b"200 OK", b"x-engine: e"))
        answer = await exchange(mesh, get("/v1/things?x=1", b"accept: */*"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nx-engine: e\r\n")
        assert body == b"hello"
        assert engine.requests[0][0].startswith(b"GET /v1/things?x=1 HTTP/1.1\r\nhost: localhost")
        assert b"\r\naccept: */*\r\n" in engine.requests[0][0]
        assert b"\r\nvia: 1.1 meshnode" in engine.requests[0][0]


async def test_a_hundred_requests_of_one_client_need_one_connection_to_the_engine(mesh):
    with trio.fail_after(LIMIT):
        await mesh.open()
        engine = await mesh.served_by(answering(b"hello"))
        async with await mesh.connect() as client:
            for _ in range(100):
                await client.send_all(get(close=False))
                answer = b""
                while not answer.endswith(b"hello"):
                    answer += await client.receive_some()
        assert engine.connections == 1
        assert len(engine.requests) == 100
        await until(lambda: mesh.counted("requests_total", outcome="complete") == 100)
        await until(lambda: mesh.front.router.own_total == 0)
        await until(lambda: mesh.peers["peer"].services.total_in_flight == 0)
