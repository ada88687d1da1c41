"""What people watch: a screen that follows the mesh, and round trips to a peer."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading

from support.cluster import Cluster, eventually


class Screen:
    """A terminal of 40 lines on which a program runs; everything it wrote is kept."""

    def __init__(self, cluster: Cluster, *argv: str) -> None:
        self._ours, theirs = pty.openpty()
        env = cluster.env(TERM="xterm", LINES="40", COLUMNS="200")
        command = [sys.executable, "-m", "meshnode", *argv]
        self.child = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._written = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                self._written += os.read(self._ours, 65536)
            except OSError:
                return

    def last_frame(self) -> str:
        """What was drawn since the cursor last went home."""
        return self._written.decode(errors="replace").rpartition("\x1b[H")[2]

    def close(self) -> None:
        self.child.kill()
        self.child.wait(10)
        os.close(self._ours)


def test_top_follows_the_mesh_and_outlives_the_node(cluster):
    host, other = cluster.hosts(8, 16)
    eventually(lambda: {"host8", "host16"} <= host.online(), within=20)
    screen = Screen(cluster, "top", "--interval", "0.2", "--api", host.ready["api"])
    try:
        eventually(lambda: "2 online" in screen.last_frame(), within=20)
        assert "16.0 GiB" in screen.last_frame()
        other.kill()
        eventually(lambda: "offline" in screen.last_frame(), within=20)
        host.kill()
        eventually(lambda: "not answering" in screen.last_frame(), within=20)
        screen.child.send_signal(signal.SIGINT)
        assert screen.child.wait(10) == 130
    finally:
        screen.close()


def test_ping_reaches_a_peer_by_name_and_names_one_that_is_gone(cluster):
    host, other = cluster.hosts(8, 16)
    eventually(lambda: {"host8", "host16"} <= host.online(), within=20)
    asked = ("ping", "host16", "--json", "--interval", "0.05", "--api", host.ready["api"])
    done = cluster.run(*asked)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(answers) == 4
    assert {answer["peer_id"] for answer in answers} == {other.peer_id}
    assert all(0 < answer["rtt_ms"] < 4000 for answer in answers)
    other.kill()
    done = cluster.run(*asked, "-c", "1")
    assert done.returncode == 1
    assert "error" in json.loads(done.stdout.splitlines()[0])
    for wrong, why in (("nobody", "no node is called 'nobody'"), ("host8", "is this node itself")):
        done = cluster.run("ping", wrong, "--interval", "60", "--api", host.ready["api"])
        assert (done.returncode, done.stdout) == (1, "")
        assert why in done.stderr and "meshnode peers" in done.stderr
