"""The dialler's side of a tunnel, against a script of what the server sends."""

from __future__ import annotations

import pytest
import trio

from meshnode.core.tunnel import (
    DONE,
    END,
    TunnelReply,
    TunnelRequest,
    encode_chunk,
    encode_header,
    encode_reply,
    encode_request,
)
from meshnode.errors import StreamReset
from meshnode.net.tunnel_stream import TunnelRefused, TunnelStream

ASK = encode_header(encode_request(TunnelRequest(service_id="llm")))
OK = encode_header(encode_reply(TunnelReply(status="ok", in_flight=3, available_vram=7)))
BUSY = encode_header(encode_reply(TunnelReply(status="busy")))


class Wire:
    """A stream that receives what it is told, and notes what is sent and how it ends."""

    peer_id, protocol_id = "peer", "/test"

    def __init__(self, *received):
        self.received = list(received)
        self.log = []

    async def receive_some(self, max_bytes=65536):
        await trio.lowlevel.checkpoint()
        step = self.received.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def send_all(self, data):
        self.log.append(data)

    async def send_soon(self, data):
        self.log.append(data)

    async def send_eof(self):
        self.log.append("eof")

    async def aclose(self):
        self.log.append("close")

    def reset(self):
        self.log.append("reset")


async def asked(*received):
    wire = Wire(*received)
    tunnel = TunnelStream(wire)
    await tunnel.ask("llm")
    return wire, tunnel


async def receive_all(stream):
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


async def test_a_request_leaves_in_one_piece_with_its_first_bytes():
    wire = Wire(OK)
    tunnel = TunnelStream(wire)
    await tunnel.ask("llm", b"hello")
    await tunnel.send_all(b" and more")
    await tunnel.send_all(b"")
    await tunnel.wait_accepted()
    assert wire.log == [ASK + encode_chunk(b"hello"), encode_chunk(b" and more")]


async def test_half_closing_leaves_the_stream_open_and_closing_ends_it():
    wire, tunnel = await asked(OK)
    await tunnel.send_eof()
    await tunnel.send_eof()
    await tunnel.aclose()
    assert wire.log == [ASK, END, "close"]


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_an_answer_is_read_however_it_arrives(step):
    data = OK + encode_chunk(b"hello") + encode_chunk(b"world") + END
    _, tunnel = await asked(*[data[i : i + step] for i in range(0, len(data), step)])
    received = b""
    while piece := await tunnel.receive_some(2):
        assert len(piece) <= 2
        received += piece
    assert received == b"helloworld"
    assert await tunnel.receive_some() == b""


async def test_the_numbers_of_a_reply_are_told_also_when_it_refuses():
    told = []
    wire = Wire(BUSY, OK)
    tunnel = TunnelStream(wire, told.append)
    await tunnel.ask("llm")
    with pytest.raises(TunnelRefused) as refused:
        await tunnel.receive_some()
    assert refused.value.status == "busy"
    assert await tunnel.done()
    await tunnel.ask("llm")
    await tunnel.wait_accepted()
    assert [reply.status for reply in told] == ["busy", "ok"]
    assert wire.log == [ASK, DONE, ASK]


async def test_one_request_after_another_uses_the_same_tunnel():
    wire, tunnel = await asked(OK + encode_chunk(b"one"), OK + encode_chunk(b"two"))
    assert await tunnel.receive_some() == b"one"
    assert await tunnel.done()
    await tunnel.ask("llm")
    assert await tunnel.receive_some() == b"two"
    assert wire.log == [ASK, DONE, ASK]


async def test_a_tunnel_with_more_than_was_read_is_never_used_again():
    wire, tunnel = await asked(OK + encode_chunk(b"answer and what nobody asked for"))
    assert await tunnel.receive_some(6) == b"answer"
    assert not await tunnel.done()
    assert wire.log == [ASK, "reset"]


async def test_bytes_that_come_between_two_requests_are_not_the_next_answer():
    wire, tunnel = await asked(OK + encode_chunk(b"one"), encode_chunk(b"poison") + OK)
    assert await tunnel.receive_some() == b"one"
    assert await tunnel.done()
    await tunnel.ask("llm")
    with pytest.raises(StreamReset, match="outside of a request"):
        await tunnel.receive_some()
    assert wire.log[-1] == "reset"


@pytest.mark.parametrize(
    "received",
    [
        [OK + encode_chunk(b"half"), b""],
        [OK + b"\x00", b""],
        [OK, b""],
        [b""],
        [OK + b"\xff\xf0"],
        [OK + encode_chunk(b"x")[:2], StreamReset("cut")],
    ],
)
async def test_an_answer_without_its_end_was_cut(received):
    _, tunnel = await asked(*received)
    with pytest.raises(StreamReset):
        await receive_all(tunnel)
