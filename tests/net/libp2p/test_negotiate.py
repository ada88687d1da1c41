"""Choosing a protocol, over a pair of streams in memory."""

from __future__ import annotations

import pytest
import trio

from meshnode.errors import PeerRefused, StreamReset, WireError
from meshnode.net.libp2p.negotiate import Responder, confirm, proposal, propose

HEADER = b"\x13/multistream/1.0.0\n"


class Half:
    """One end of a memory stream, which also counts what it was asked to send."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self.sent: list[bytes] = []

    async def receive_some(self, max_bytes: int) -> bytes:
        return bytes(await self.stream.receive_some(max_bytes))

    async def send_all(self, data: bytes) -> None:
        self.sent.append(data)
        await self.stream.send_all(data)


def pair() -> tuple[Half, Half]:
    one, two = trio.testing.memory_stream_pair()
    return Half(one), Half(two)


async def test_both_lines_leave_in_one_write():
    dialler, listener = pair()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Responder(listener).settle_for, "/a/1")
            assert await propose(dialler, ("/a/1",)) == "/a/1"
    assert dialler.sent == [HEADER + b"\x05/a/1\n"]


async def test_the_second_choice_is_taken_where_the_first_is_not_served():
    dialler, listener = pair()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Responder(listener).settle_for, "/a/1")
            assert await propose(dialler, ("/a/2", "/a/1")) == "/a/1"


async def test_what_follows_the_choice_is_left_on_the_stream():
    dialler, listener = pair()
    with trio.fail_after(1):
        await dialler.send_all(HEADER + b"\x05/a/1\nfirst bytes")
        await Responder(listener).settle_for("/a/1")
        assert await listener.receive_some(100) == b"first bytes"


async def test_a_protocol_name_of_more_than_127_bytes_is_understood():
    name = "/" + "x" * 300
    dialler, listener = pair()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Responder(listener).settle_for, name)
            assert await propose(dialler, (name,)) == name


async def test_a_peer_that_serves_none_of_them_refused():
    dialler, listener = pair()
    with trio.fail_after(1):
        await listener.send_all(HEADER + b"\x03na\n" * 2)
        with pytest.raises(PeerRefused, match="/a/1 or /a/2"):
            await propose(dialler, ("/a/1", "/a/2"))


@pytest.mark.parametrize(
    "answer",
    [b"\x04\xff\xfe\xfd\n", HEADER + b"\x05/b/1\n", b"\xff\xff\x7f", b"\x00", b"\x02xx"],
)
async def test_an_answer_that_is_none_is_the_peers_fault(answer):
    dialler, listener = pair()
    with trio.fail_after(1):
        await listener.send_all(answer)
        with pytest.raises(WireError) as caught:
            await propose(dialler, ("/a/1",))
    assert caught.value.code == "bad_multistream"


@pytest.mark.parametrize("said", [b"", b"\x13/multi", HEADER])
async def test_an_end_in_the_middle_is_a_cut(said):
    dialler, listener = pair()
    with trio.fail_after(1):
        await listener.send_all(said)
        await listener.stream.send_eof()
        with pytest.raises(StreamReset):
            await propose(dialler, ("/a/1",))


async def test_a_dialler_that_only_asks_around_is_let_go():
    dialler, listener = pair()
    with trio.fail_after(1):
        await dialler.send_all(HEADER + b"\x03ls\n" * 20)
        with pytest.raises(WireError, match="more than 16"):
            await Responder(listener).settle_for("/a/1")


# A proposal that is confirmed later.


@pytest.mark.parametrize("name", ["/a/1", "/a", "/" + "x" * 300])
async def test_a_proposal_is_confirmed_and_what_follows_is_left_on_the_stream(name):
    dialler, listener = pair()
    with trio.fail_after(1):
        await dialler.send_all(proposal(name) + b"asked")
        await Responder(listener).settle_for(name)
        assert await listener.receive_some(100) == b"asked"
        await listener.send_all(b"answered")
        await confirm(dialler, name)
        assert await dialler.receive_some(100) == b"answered"


@pytest.mark.parametrize("name", ["/a/1", "/a", "/" + "x" * 300])
async def test_a_proposal_that_is_declined_is_a_refusal(name):
    dialler, listener = pair()
    with trio.fail_after(1):
        await listener.send_all(HEADER + b"\x03na\n")
        with pytest.raises(PeerRefused, match="does not serve"):
            await confirm(dialler, name)


@pytest.mark.parametrize(
    "answer",
    [
        b"\x13/multistream/2.0.0\n\x05/a/1\n",
        HEADER + b"\x05/b/1\n",
        HEADER + b"\x06/a/1\n\n",
        HEADER + b"\x03no\n",
        b"x" * 100,
    ],
)
async def test_a_confirmation_that_is_none_is_the_peers_fault(answer):
    dialler, listener = pair()
    with trio.fail_after(1):
        await listener.send_all(answer)
        with pytest.raises(WireError) as fault:
            await confirm(dialler, "/a/1")
        assert fault.value.code == "bad_multistream"


async def test_a_stream_that_ends_in_its_confirmation_was_cut():
    dialler, listener = pair()
    with trio.fail_after(1):
        await listener.send_all(HEADER + b"\x05/a")
        await listener.stream.send_stream.aclose()
        with pytest.raises(StreamReset):
            await confirm(dialler, "/a/1")
