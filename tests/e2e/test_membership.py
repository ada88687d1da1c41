"""Joining with real processes: the right token, a wrong one, none; a mesh without bootstrap."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from time import monotonic

import pytest

from support.cluster import Cluster, eventually

NAMES = [f"n{number}" for number in range(12)]


def test_a_wrong_token_ends_the_joiner_with_5_within_3_s_and_both_sides_name_it(
    cluster: Cluster,
) -> None:
    host = cluster.node("host")
    stranger = cluster.start_node("stranger", bootstrap=host, token=cluster.new_token())
    # An interpreter needs a second or so to start, which is not the mesh's.
    assert stranger.wait(15) == 5
    assert any("token" in line for line in stranger.err), list(stranger.err)
    eventually(lambda: any("token" in line for line in host.err), within=5)
    assert host.child.poll() is None
    assert host.online() == {"host"}


def test_one_strangers_refusal_does_not_end_a_node(cluster: Cluster) -> None:
    mine = cluster.node("mine")
    other = cluster.node("other", token=cluster.new_token())
    joiner = cluster.node("joiner", "--bootstrap", other.addr, bootstrap=mine)
    eventually(lambda: joiner.online() == {"mine", "joiner"}, within=10)
    assert joiner.child.poll() is None


def test_no_token_is_refused_with_the_command_that_makes_one(cluster: Cluster) -> None:
    result = cluster.run("up", "--state-dir", str(cluster.folder / "s"))
    assert result.returncode == 2
    assert "meshnode token new" in result.stderr
    assert result.stdout == ""


def test_a_token_on_the_command_line_is_refused(cluster: Cluster) -> None:
    result = cluster.run("up", "--token", cluster.token)
    assert result.returncode == 2
    assert cluster.token not in result.stderr


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (("--listen", "tcp://1.2.3.4"), {}, "--listen"),
        (("--bootstrap", "/ip4/127.0.0.1/tcp/1"), {}, "--bootstrap"),
        (("--expose", "nonsense"), {}, "--expose"),
        ((), {"MESHNODE_ANOUNCE_INTERVAL": "5"}, "MESHNODE_ANOUNCE_INTERVAL"),
        (("--online-window", "15", "--announce-interval", "10"), {}, "online_window"),
        (("--vram", "lots"), {}, "--vram"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_source(
    cluster: Cluster, args: tuple[str, ...], env: dict[str, str], said: str
) -> None:
    state = cluster.folder / "s"
    result = cluster.run(
        "up", "--state-dir", str(state), *args, MESHNODE_TOKEN=cluster.token, **env
    )
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not state.exists()


def test_an_unknown_key_in_the_file_names_the_file(cluster: Cluster) -> None:
    file = cluster.folder / "meshnode.toml"
    file.write_text('lisen = ["/ip4/127.0.0.1/tcp/0"]\n')
    result = cluster.run("up", "--config", str(file), MESHNODE_TOKEN=cluster.token)
    assert result.returncode == 2
    assert str(file) in result.stderr
    assert "lisen" in result.stderr


def test_a_port_in_use_is_named_and_nothing_is_left(cluster: Cluster) -> None:
    first = cluster.node("first")
    port = first.addr.split("/")[4]
    second = cluster.start_node("second", listen=f"/ip4/127.0.0.1/tcp/{port}")
    assert second.wait(20) == 2
    assert any(port in line for line in second.err), list(second.err)


def test_a_service_name_nobody_offers_is_said(cluster: Cluster) -> None:
    host = cluster.node("host", "--expose", "llm=127.0.0.1:9")
    entry = cluster.entry(host, "--service", "lmm")
    eventually(lambda: "host" in entry.online(), within=10)
    result = cluster.run("explain", "--service", "lmm", "--api", str(entry.ready["api"]))
    assert result.returncode == 4
    assert "lmm" in result.stderr
    assert "llm" in result.stderr


def test_a_damaged_identity_stops_the_start_and_stays_as_it_is(cluster: Cluster) -> None:
    state = cluster.folder / "state-host"
    state.mkdir()
    key = state / "identity.key"
    key.write_bytes(b"not a key")
    node = cluster.start_node("host")
    assert node.wait(20) == 2
    assert key.read_bytes() == b"not a key"
    assert any("identity.key" in line for line in node.err), list(node.err)


def test_a_restarted_node_keeps_its_peer_id(cluster: Cluster) -> None:
    first = cluster.node("host")
    first.kill()
    assert cluster.node("host").peer_id == first.peer_id


def test_a_secret_never_shows_in_logs_or_the_process_list(cluster: Cluster) -> None:
    host = cluster.node("host", "--log-level", "debug")
    node = cluster.node("other", "--log-level", "debug", bootstrap=host)
    eventually(lambda: node.online() == {"host", "other"}, within=10)
    secret = cluster.token.removeprefix("mesh1")
    listing = b"".join(
        Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in (host, node)
    )
    assert secret.encode() not in listing
    assert not any(re.search(re.escape(secret), line) for line in [*host.err, *node.err])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_twelve_nodes_with_one_bootstrap_learn_of_all_and_outlive_it(cluster: Cluster) -> None:
    # Half of what is usual, so that the time past it is, too.
    pace = ("--online-window", "20", "--announce-interval", "5")
    bootstrap = cluster.node(NAMES[0], *pace)
    others = [cluster.start_node(name, *pace, bootstrap=bootstrap) for name in NAMES[1:]]
    for node in others:
        node.wait_ready()
    up = monotonic()
    for node in (bootstrap, *others):
        eventually(lambda node=node: node.online() == set(NAMES), within=15)
    assert monotonic() - up < 15
    bootstrap.kill()
    survivors = set(NAMES[1:])
    threading.Event().wait(30)  # past the online window: only what is heard stays fresh
    for node in others:
        rows = {row["name"]: row for row in node.peers()}
        assert {name for name, row in rows.items() if row["online"]} == survivors
        assert all(rows[name]["last_seen_s"] < 15 for name in survivors)
