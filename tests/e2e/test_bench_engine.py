"""The engine that scripts/bench measures with: it outlives every client, or it measures itself."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_http.py"
BODY = b'{"model": "bench", "messages": []}'
STREAM = b'{"model": "bench", "messages": [], "stream": true, "max_tokens": 3}'


def chat(body: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@pytest.fixture
def engine() -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    argv = [sys.executable, str(SCRIPT), "engine"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            host, _, port = json.loads(process.stdout.readline())["address"].rpartition(":")
            yield process, (host, int(port))
        finally:
            process.kill()


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_client_that_resets_before_its_request_is_read_ends_nothing_but_itself(
    engine: tuple[subprocess.Popen[str], tuple[str, int]], body: bytes
) -> None:
    process, address = engine
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(chat(BODY))
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")  # so it is accepted, and known
        process.send_signal(signal.SIGSTOP)
        client.sendall(chat(body))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    process.send_signal(signal.SIGCONT)
    with socket.create_connection(address, timeout=5) as other:
        other.sendall(chat(BODY))
        assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert process.poll() is None
