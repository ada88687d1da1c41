from __future__ import annotations

import os
import secrets
import socket

import pytest

from meshnode.cli import service_manager
from meshnode.cli.service_manager import READY, notify, reloading, status


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    """A service manager's socket, as systemd makes it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"@meshnode-{secrets.token_hex(8)}"
        if request.param == "path":
            name = str(tmp_path / "notify")
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_a_service_manager_is_told_in_one_datagram(manager):
    assert service_manager.is_listening()
    assert notify(READY, status("up as\n12D3, api on 127.0.0.1:4280"))
    assert manager.recv(4096) == b"READY=1\nSTATUS=up as 12D3, api on 127.0.0.1:4280"


def test_a_reload_says_when_it_began(manager):
    notify(*reloading())
    first, second = manager.recv(4096).decode().splitlines()
    assert first == "RELOADING=1"
    key, _, microseconds = second.partition("=")
    assert key == "MONOTONIC_USEC" and int(microseconds) > 0


def test_without_a_service_manager_nobody_is_told(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not service_manager.is_listening()
    assert not notify(READY)


@pytest.mark.parametrize("name", ["/nobody/listens", "@", "relative", "x" * 300])
def test_a_service_manager_that_cant_be_told_ends_nothing(monkeypatch, name):
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert not notify(READY)


def test_a_service_manager_that_does_not_read_holds_up_nobody(manager):
    before = len(os.listdir("/proc/self/fd"))
    sent = [notify(status("x" * 1000)) for _ in range(1000)]
    assert sent[0] and not sent[-1]
    assert len(os.listdir("/proc/self/fd")) == before
