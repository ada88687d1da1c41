"""A TCP connection as a ByteStream: what the kernel says of resets, and what is made of it."""

from __future__ import annotations

import socket
import struct

import pytest
import trio

from meshnode.errors import StreamReset
from meshnode.net.tcp_stream import TcpStream


async def test_a_reset_that_was_noticed_while_sending_is_no_clean_end_to_the_reader():
    with trio.fail_after(5):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ours = TcpStream(await trio.open_tcp_stream(*listener.socket.getsockname()))
        theirs = await listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.socket.close()
        await trio.lowlevel.wait_readable(ours._fd())  # the reset is here
        with pytest.raises(StreamReset):
            await ours.send_all(b"more")
        with pytest.raises(StreamReset):
            await ours.receive_some()
        ours.reset()
        await listener.aclose()
