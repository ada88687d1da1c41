from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import trio

from meshnode.cli.running import announce_ready, run_until_signalled
from meshnode.config import resolve
from meshnode.errors import TokenRefused

FACTS = {
    "peer_id": "12D3KooWx",
    "addrs": ["/ip4/127.0.0.1/tcp/4201/p2p/12D3KooWx", "/ip4/192.0.2.7/tcp/4201/p2p/12D3KooWx"],
    "proxy": None,
    "api": "127.0.0.1:4280",
    "more": "left out",
}
# A program that logs, warns as a library does, and then takes its time to end.
PROGRAM = """
import logging, sys, trio, structlog
from meshnode.cli.logs import set_up_logs
from meshnode.cli.running import run_until_signalled
set_up_logs("info", sys.argv[1])
async def run():
    structlog.get_logger("x").info("peer joined", peer_id="12D3")
    structlog.get_logger("x").debug("not shown")
    logging.getLogger("libp2p.x").warning("odd %s", "thing")
    logging.getLogger("libp2p.x").info("not shown")
    try:
        1 / 0
    except ZeroDivisionError:
        structlog.get_logger("x").exception("failed")
    print("up", flush=True)
    try:
        await trio.sleep_forever()
    finally:
        if "hang" in sys.argv:
            print("hanging", flush=True)
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()
sys.exit(trio.run(run_until_signalled, run))
"""


def start(*argv: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert process.stdout.readline() == "up\n"
    return process


def config(**flags):
    given = {"token_file": "mesh.token", "name": "gpu1", **flags}
    return resolve(given, {}, read_text=lambda path: "mesh1secret")


def test_the_ready_line_is_one_json_object_with_just_its_keys(capsys):
    announce_ready(config(log_format="json"), FACTS)
    out, err = capsys.readouterr()
    assert out == (
        '{"event":"ready","schema_version":1,"peer_id":"12D3KooWx","addrs":'
        '["/ip4/127.0.0.1/tcp/4201/p2p/12D3KooWx","/ip4/192.0.2.7/tcp/4201/p2p/12D3KooWx"],'
        '"proxy":null,"api":"127.0.0.1:4280"}\n'
    )
    assert err == ""


def test_people_are_told_how_to_join_from_another_host_without_the_token(capsys):
    announce_ready(config(proxy="127.0.0.1:8080"), {**FACTS, "proxy": "127.0.0.1:8080"})
    out, err = capsys.readouterr()
    assert out == ""
    join = "meshnode up --token-file mesh.token --bootstrap /ip4/192.0.2.7/tcp/4201/p2p/12D3KooWx"
    assert join in err
    assert "http://127.0.0.1:8080/v1" in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
async def test_a_signal_cancels_and_gives_the_exit_code(number, code):
    cleaned_up = []

    async def run():
        os.kill(os.getpid(), number)
        try:
            await trio.sleep_forever()
        finally:
            cleaned_up.append(True)

    with trio.fail_after(5):
        assert await run_until_signalled(run) == code
    assert cleaned_up


async def test_a_run_that_ends_by_itself_gives_0():
    with trio.fail_after(5):
        assert await run_until_signalled(trio.lowlevel.checkpoint) == 0


async def test_what_ends_a_run_comes_out():
    async def run():
        raise TokenRefused("no")

    with trio.fail_after(5), pytest.raises(ExceptionGroup) as caught:
        await run_until_signalled(run)
    assert caught.group_contains(TokenRefused)


def test_a_second_signal_ends_a_hanging_process_at_once():
    with start("json", "hang") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


DRAINING = """
import math, sys, trio
from meshnode.cli.logs import set_up_logs
from meshnode.cli.running import Reload, run_until_signalled
set_up_logs("info", "json")
async def main():
    drain, reload = trio.Event(), Reload()
    async def run():
        print("up", flush=True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell_reloads)
                await drain.wait()
                print("draining", flush=True)
                if "stuck" in sys.argv:
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
        finally:
            print("left", flush=True)
    async def tell_reloads():
        while True:
            await reload.wished(within=math.inf)
            print("reloading", flush=True)
    return await run_until_signalled(run, drain, reload)
sys.exit(trio.run(main))
"""


@pytest.fixture
def draining():
    children = []

    def begin(*argv, **env):
        child = subprocess.Popen(
            [sys.executable, "-c", DRAINING, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**{k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"}, **env},
        )
        children.append(child)
        assert child.stdout.readline() == "up\n"
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def test_sigterm_drains_and_the_node_ends_by_itself_with_0(draining):
    child = draining()
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=10)
    assert (out, child.returncode) == ("draining\nleft\n", 0)


def test_a_second_sigterm_leaves_at_once_and_says_that_requests_were_cut(draining):
    child = draining("stuck")
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "draining\n"
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=10)
    assert (out, child.returncode) == ("left\n", 128 + signal.SIGTERM)


def test_ctrl_c_leaves_at_once_also_while_draining(draining):
    child = draining("stuck")
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "draining\n"
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=10)
    assert (out, child.returncode) == ("left\n", 130)


def test_a_hangup_ends_a_node_of_a_terminal_and_reloads_one_of_a_service_manager(
    draining, tmp_path
):
    of_terminal = draining()
    of_terminal.send_signal(signal.SIGHUP)
    out, _ = of_terminal.communicate(timeout=10)
    assert (out, of_terminal.returncode) == ("left\n", 0)
    managed = draining(NOTIFY_SOCKET=str(tmp_path / "nobody-listens"))
    managed.send_signal(signal.SIGHUP)
    assert managed.stdout.readline() == "reloading\n"
    managed.send_signal(signal.SIGTERM)
    out, _ = managed.communicate(timeout=10)
    assert (out, managed.returncode) == ("draining\nleft\n", 0)


def test_every_json_log_line_is_one_object():
    with start("json") as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["event"] for line in lines] == ["peer joined", "odd thing", "failed", "stopping"]
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    assert lines[0]["peer_id"] == "12D3"
    assert lines[1]["logger"] == "libp2p.x"
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_pretty_lines_have_no_colour_without_a_terminal():
    with start("pretty") as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "peer joined" in err
    assert "not shown" not in err
    assert "\x1b" not in err
