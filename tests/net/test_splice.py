from __future__ import annotations

import pytest
import trio

from meshnode.errors import PeerUnreachable, StreamClosed, StreamReset
from meshnode.net.splice import SpliceOutcome, splice
from meshnode.net.tcp_stream import TcpStream, connect_tcp


class Script:
    """A stream that receives what it is told, and notes what is sent and how it ends."""

    peer_id, protocol_id = "peer", "/test"

    def __init__(self, *received):
        self.received = list(received)
        self.log = []

    async def receive_some(self, max_bytes=65536):
        await trio.lowlevel.checkpoint()
        if not self.received:
            await trio.sleep_forever()
        step = self.received.pop(0)
        if isinstance(step, Exception):
            raise step
        if isinstance(step, float):
            await trio.sleep(step)
            return await self.receive_some(max_bytes)
        return step

    async def send_all(self, data):
        await trio.lowlevel.checkpoint()
        self.log.append(data)

    async def send_eof(self):
        await trio.lowlevel.checkpoint()
        self.log.append("eof")

    async def aclose(self):
        await trio.lowlevel.checkpoint()
        self.log.append("close")

    def reset(self):
        self.log.append("reset")


async def join(client, upstream, idle_timeout=900.0):
    counts = {"up": 0, "down": 0}

    def up(size):
        counts["up"] += size

    def down(size):
        counts["down"] += size

    end = await splice(
        client, upstream, count_to_upstream=up, count_to_client=down, idle_timeout=idle_timeout
    )
    return end.outcome, counts


async def test_both_ends_of_file_are_passed_on_each_by_itself(autojump_clock):
    client = Script(b"question", b"")
    upstream = Script(1.0, b"ans", b"wer", b"")
    outcome, counts = await join(client, upstream)
    assert outcome is SpliceOutcome.COMPLETE
    assert upstream.log == [b"question", "eof", "close"]
    assert client.log == [b"ans", b"wer", "eof", "close"]
    assert counts == {"up": 8, "down": 6}


@pytest.mark.parametrize("error", [StreamReset("cut"), StreamClosed("closed")])
async def test_an_error_upstream_resets_both_and_is_never_an_end(autojump_clock, error):
    client, upstream = Script(b"question", b""), Script(1.0, b"ans", error)
    outcome, _ = await join(client, upstream)
    assert outcome is SpliceOutcome.UPSTREAM_CUT
    assert client.log == [b"ans", "reset"]
    assert upstream.log[-1] == "reset"


async def test_a_client_that_breaks_off_resets_upstream(autojump_clock):
    client, upstream = Script(b"question", 1.0, StreamReset("gone")), Script()
    outcome, _ = await join(client, upstream)
    assert outcome is SpliceOutcome.CLIENT_GONE
    assert upstream.log == [b"question", "reset"]


async def test_silence_for_too_long_resets_both_but_traffic_keeps_them(autojump_clock):
    client, upstream = Script(), Script(*[60.0, b"tick"] * 30)
    began = trio.current_time()
    outcome, counts = await join(client, upstream, idle_timeout=100.0)
    assert outcome is SpliceOutcome.IDLE
    assert counts["down"] == 120
    assert 1898 <= trio.current_time() - began <= 1901
    assert client.log[-1] == upstream.log[-1] == "reset"


async def test_a_cancelled_splice_resets_both(autojump_clock):
    client, upstream = Script(b"question", b""), Script()
    with trio.move_on_after(5) as scope:
        await join(client, upstream)
    assert scope.cancelled_caught
    assert client.log == ["reset"]
    assert upstream.log == [b"question", "eof", "reset"]


async def tcp_pair():
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        ours = await connect_tcp(*listener.socket.getsockname(), timeout=5)
        return ours, TcpStream(await listener.accept())


async def test_a_tcp_reset_is_a_reset_and_an_end_an_end():
    with trio.fail_after(10):
        ours, theirs = await tcp_pair()
        await ours.send_all(b"x")
        await ours.send_eof()
        await ours.send_eof()
        assert await theirs.receive_some() == b"x"
        assert await theirs.receive_some() == b""
        theirs.reset()
        theirs.reset()
        with pytest.raises(StreamReset):
            await ours.receive_some()
        with pytest.raises(StreamClosed):
            await theirs.receive_some()
        await theirs.aclose()
        await ours.aclose()


async def test_a_port_where_nothing_listens_is_unreachable():
    with trio.fail_after(10):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        await listeners[0].aclose()
        with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1"):
            await connect_tcp("127.0.0.1", port, timeout=5)
