"""A stream whose protocol is agreed on with its first bytes, against a script of the peer's."""

from __future__ import annotations

import pytest
import trio

from meshnode.errors import PeerRefused, PeerUnreachable, StreamClosed, StreamReset
from meshnode.net.libp2p.negotiate import proposal
from meshnode.net.libp2p.stream import BegunStream

NAME = "/a/1"
HEADER = b"\x13/multistream/1.0.0\n"


class Muxed:
    """A muxed stream that receives what it is told, and notes what is done with it."""

    def __init__(self, received=b"", end=None):
        self.received = received
        self.end = end  # raised behind what is received
        self.log = []

    async def receive_some(self, max_bytes=65536):
        await trio.lowlevel.checkpoint()
        if not self.received and self.end is not None:
            raise self.end
        data, self.received = self.received[:max_bytes], self.received[max_bytes:]
        return data

    async def send_all(self, data):
        self.log.append(data)

    async def send_soon(self, data):
        self.log.append(b"soon " + data)

    async def send_eof(self):
        self.log.append("eof")

    async def aclose(self):
        self.log.append("close")

    def abort(self):
        self.log.append("abort")


async def test_the_proposal_leaves_once_with_the_first_bytes():
    muxed = Muxed()
    stream = BegunStream(muxed, "peer", NAME)
    await stream.send_all(b"one")
    await stream.send_all(b"two")
    await stream.send_soon(b"three")
    assert muxed.log == [proposal(NAME) + b"one", b"two", b"soon three"]


@pytest.mark.parametrize("first", ["send_soon", "send_eof", "receive_some"])
async def test_the_proposal_leaves_at_once_whatever_is_done_first(first):
    muxed = Muxed(proposal(NAME) + b"answer")
    stream = BegunStream(muxed, "peer", NAME)
    await getattr(stream, first)(*([b"one"] if first == "send_soon" else []))
    assert muxed.log[0] == proposal(NAME) + (b"one" if first == "send_soon" else b"")


async def test_the_first_read_takes_the_peers_word_and_the_next_ones_do_not():
    stream = BegunStream(Muxed(proposal(NAME) + b"answer" + proposal(NAME)), "peer", NAME)
    await stream.send_all(b"one")
    assert await stream.receive_some(6) == b"answer"
    assert await stream.receive_some() == proposal(NAME)


async def test_a_peer_that_declines_refuses_the_first_read():
    muxed = Muxed(HEADER + b"\x03na\n")
    stream = BegunStream(muxed, "peer", NAME)
    await stream.send_all(b"one")
    with pytest.raises(PeerRefused, match=NAME):
        await stream.receive_some()
    assert muxed.log[-1] == "abort"


@pytest.mark.parametrize(
    ("received", "end"),
    [
        (b"", StreamReset("cut")),  # before its word
        (HEADER, StreamReset("cut")),  # in the middle of it
        (HEADER, None),  # a clean end there is none
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", None),
    ],
)
async def test_a_peer_that_never_agrees_can_not_be_reached(received, end):
    muxed = Muxed(received, end)
    stream = BegunStream(muxed, "peer", NAME)
    await stream.send_all(b"one")
    with pytest.raises(PeerUnreachable):
        await stream.receive_some()
    assert muxed.log[-1] == "abort"


async def test_closing_it_here_while_its_word_is_awaited_is_no_fault_of_the_peer():
    stream = BegunStream(Muxed(b"", StreamClosed("closed here")), "peer", NAME)
    with pytest.raises(StreamClosed):
        await stream.receive_some()
