"""Starting and stopping: nothing is left behind, nothing is said, and death is noticed."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys

import pytest
import trio

from meshnode.errors import PeerUnreachable
from meshnode.net.libp2p.limits import Limits
from meshnode.net.mesh import LinkState, MeshStream


def port_answers(addr: str) -> bool:
    host, port = addr.split("/")[2], int(addr.split("/")[4])
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


async def test_a_stopped_node_frees_its_port_and_tells_its_peers_at_once(
    make_node, run_nodes, logged, caplog
):
    hub, others = make_node(), [make_node() for _ in range(6)]
    with trio.fail_after(10):
        async with run_nodes(*others):
            async with run_nodes(hub):
                for other in others:
                    await other.dial(hub.addrs[0], timeout=3)
                addr = hub.addrs[0]
                assert port_answers(addr)
                began = trio.current_time()
            assert trio.current_time() - began < 1
            assert not port_answers(addr)
            assert hub.addrs == ()
            assert hub.links() == ()
            while any(len(other.links()) != 5 for other in others):
                await trio.lowlevel.checkpoint()
    for other in others:
        downs = [e for e in other.events if e.state is LinkState.DOWN and e.peer_id == hub.peer_id]
        assert [event.reason for event in downs] == ["closed by the peer"]
    assert not logged
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


async def test_a_node_stops_within_its_limit_whatever_its_handlers_do(make_node, run_nodes):
    node, peer = make_node(limits=Limits(shutdown_timeout=0.5)), make_node()
    began = trio.Event()

    async def never_end(stream: MeshStream) -> None:
        began.set()
        await trio.sleep_forever()

    node.serve("/test/forever/1.0.0", never_end)
    with trio.fail_after(5):
        async with run_nodes(peer):
            async with run_nodes(node):
                await peer.dial(node.addrs[0], timeout=3)
                stream = await peer.open_stream(node.peer_id, "/test/forever/1.0.0", timeout=3)
                await began.wait()
                stopped = trio.current_time()
            assert trio.current_time() - stopped < 1
            stream.reset()


async def test_a_node_stopped_while_others_dial_it_stops_cleanly(make_node, run_nodes):
    others = [make_node() for _ in range(4)]
    with trio.fail_after(20):
        async with run_nodes(*others, linked=False):
            for number in range(10):
                hub = make_node()

                async def try_to_dial(other, addr) -> None:
                    with contextlib.suppress(PeerUnreachable):
                        await other.dial(addr, timeout=2)

                async with trio.open_nursery() as nursery, run_nodes(hub):
                    for other in others:
                        nursery.start_soon(try_to_dial, other, hub.addrs[0])
                    # Each time a little further into the dials.
                    with trio.move_on_after(number * 0.002):
                        await trio.sleep_forever()
                assert not hub._swarm.all_conns


async def test_a_node_cancelled_while_it_starts_leaves_its_port_free(make_node):
    node = make_node(listen=("/ip4/127.0.0.1/tcp/0",))
    with trio.fail_after(5):
        with trio.CancelScope() as scope:
            scope.cancel()
            await node.run_forever()
        async with trio.open_nursery() as nursery:
            other = make_node()
            await nursery.start(other.run_forever)
            nursery.cancel_scope.cancel()


PROGRAM = """
import logging, sys, trio
from meshnode.core.belonging import by_keys
from meshnode.metrics import Metrics
from meshnode.net.libp2p.host import Libp2pMesh
from meshnode.net.libp2p.identity import ephemeral_identity

async def main():
    mesh = Libp2pMesh(
        identity=ephemeral_identity(), listen=("/ip4/127.0.0.1/tcp/0",),
        membership=by_keys((b"k" * 32,)), metrics=Metrics(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.run_forever)
        print(mesh.addrs[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    print(logging.root.handlers, flush=True)

trio.run(main)
"""


@pytest.fixture
async def other_process():
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield process
    process.kill()
    await process.wait()


async def read_line(stream) -> str:
    text = b""
    while not text.endswith(b"\n"):
        text += await stream.receive_some()
    return text.decode().strip()


async def test_a_killed_peer_is_noticed_within_a_second(make_node, run_nodes, other_process):
    node = make_node()
    gone = trio.Event()
    node.watch_links(lambda event: gone.set() if event.state is LinkState.DOWN else None)
    with trio.fail_after(20):
        addr = await read_line(other_process.stdout)
        async with run_nodes(node):
            await node.dial(addr, timeout=5)
            other_process.send_signal(signal.SIGKILL)
            with trio.fail_after(1):
                await gone.wait()
            assert not node.links()


async def test_a_stopped_peer_does_not_answer_pings(make_node, run_nodes, other_process):
    node = make_node()
    with trio.fail_after(20):
        addr = await read_line(other_process.stdout)
        async with run_nodes(node):
            peer_id = await node.dial(addr, timeout=5)
            other_process.send_signal(signal.SIGSTOP)
            with pytest.raises(PeerUnreachable, match=r"within 0.2 s"):
                await node.ping(peer_id, timeout=0.2)
            await node.disconnect(peer_id, "ping timed out")
    assert node.events[-1].reason == "ping timed out"


async def test_a_program_of_its_own_says_nothing_and_keeps_its_logging(
    make_node, run_nodes, other_process
):
    node = make_node()
    with trio.fail_after(20):
        addr = await read_line(other_process.stdout)
        async with run_nodes(node):
            await node.dial(addr, timeout=5)
            await other_process.stdin.send_all(b"stop\n")
            assert await read_line(other_process.stdout) == "[]"
            assert await other_process.wait() == 0
            assert await other_process.stderr.receive_some() == b""
