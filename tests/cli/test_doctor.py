from __future__ import annotations

import json
import os
import socket
import stat

import pytest

from meshnode.cli import findings
from support.cluster import Cluster, eventually

PEER = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


def examined(cluster: Cluster, *flags: str, token: str | None = None) -> dict[str, dict]:
    """The findings of one run, the worst of each check's."""
    done = cluster.run(
        *("doctor", "--json", "--state-dir", str(cluster.folder / "state")),
        *("--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns", *flags),
        MESHNODE_TOKEN=cluster.token if token is None else token,
        MESHNODE_API="127.0.0.1:1",
    )
    body = json.loads(done.stdout)
    order = ["skipped", "ok", "warning", "failed"]
    worst: dict[str, dict] = {}
    for check in body["checks"]:
        seen = worst.get(check["check"])
        if seen is None or order.index(check["verdict"]) > order.index(seen["verdict"]):
            worst[check["check"]] = check
    failed = any(check["verdict"] == "failed" for check in body["checks"])
    assert body["ok"] is not failed
    assert done.returncode == (1 if failed else 0)
    return worst


def test_a_host_that_lacks_nothing_has_no_failing_line(cluster):
    host = cluster.hosts(8)[0]
    service = f"llm={cluster.engine('other').address}"
    found = examined(
        cluster,
        "--expose",
        service,
        "--vram",
        "8GiB",
        "--bootstrap",
        host.addr,
        "--api=127.0.0.1:0",
    )
    assert {name for name, each in found.items() if each["verdict"] != "ok"} <= {
        *("mdns", "node", "identity")
    }
    assert "took this token within" in found["bootstrap"]["message"]


def test_every_failing_line_ends_with_what_mends_it(cluster):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = examined(
            cluster,
            *("--listen", f"/ip4/127.0.0.1/tcp/{port}", "--expose", "llm=127.0.0.1:1"),
            *("--bootstrap", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", "--proxy", f"127.0.0.1:{port}"),
        )
    failed = {name: each["mend"] for name, each in found.items() if each["verdict"] == "failed"}
    assert failed == {
        "port": f"sudo ss -ltnp 'sport = :{port}'",
        "service": "nc -vz 127.0.0.1 1",
        "bootstrap": "nc -vz 127.0.0.1 1",
    }


def test_a_bootstrap_of_another_mesh_is_told_from_one_that_is_down(cluster):
    host = cluster.hosts(8)[0]
    found = examined(cluster, "--bootstrap", host.addr, token=cluster.new_token("other"))
    assert found["bootstrap"]["verdict"] == "failed"
    assert "token" in found["bootstrap"]["message"]
    assert found["bootstrap"]["mend"] == "meshnode token show FILE"


def test_the_ports_of_the_running_node_are_no_clash(cluster):
    host = cluster.hosts(8)[0]
    port = host.addr.split("/")[4]
    done = cluster.run(
        *("doctor", "--json", "--no-mdns", "--api", host.ready["api"]),
        *("--listen", f"/ip4/127.0.0.1/tcp/{port}", "--state-dir", str(host.state_dir)),
        MESHNODE_TOKEN=cluster.token,
    )
    checks = json.loads(done.stdout)["checks"]
    ports = [each["message"] for each in checks if each["check"] == "port"]
    assert len(ports) == 2 and all(each.endswith("is the running node's") for each in ports)
    assert {"ok"} == {each["verdict"] for each in checks if each["check"] == "identity"}


def doctor_at(cluster: Cluster, node) -> dict[str, list[dict]]:
    """What ``meshnode doctor`` without a token says beside this node, by check."""
    done = cluster.run(
        "doctor", "--json", "--api", node.ready["api"], "--state-dir", str(node.state_dir)
    )
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == any(each["verdict"] == "failed" for each in checks)
    return {
        name: [c for c in checks if c["check"] == name] for name in (c["check"] for c in checks)
    }


def test_without_a_token_the_running_node_is_asked_about_itself(cluster):
    host = cluster.hosts(8)[0]
    eventually(lambda: host.peers()[0]["services"][0]["models"], within=10)
    found = doctor_at(cluster, host)
    verdicts = {name: {each["verdict"] for each in found[name]} for name in found}
    assert verdicts["token"] == verdicts["node"] == verdicts["port"] == {"ok"}
    assert verdicts["settings"] == {"skipped"}
    assert found["service"][0]["message"] == "llm is well: demo-model"
    assert found["gpu"][0]["message"] == "the node announces 8.0 GiB free of 8.0 GiB"


def test_the_running_nodes_dead_engine_fails_with_its_reason(cluster):
    dead = cluster.node("dead", "--expose", "llm=127.0.0.1:1", "--health", "llm=tcp")
    eventually(lambda: not dead.peers()[0]["services"][0]["healthy"], within=10)
    found = doctor_at(cluster, dead)
    assert found["service"][0]["verdict"] == "failed"
    assert "127.0.0.1:1" in found["service"][0]["message"]


def test_files_that_others_can_read_are_warned_of(cluster):
    path = cluster.folder / "token"
    path.write_text(cluster.token)
    path.chmod(0o644)
    found = examined(cluster, "--token-file", str(path), token="")
    assert found["token"]["verdict"] == "warning"
    assert found["token"]["mend"] == f"chmod 600 {path}"


def test_a_damaged_identity_is_named_before_the_start_stumbles_on_it(cluster):
    state = cluster.folder / "state"
    state.mkdir()
    (state / "identity.key").write_bytes(b"garbage")
    found = examined(cluster)
    assert found["identity"]["verdict"] == "failed"
    assert found["identity"]["mend"].startswith("mv ")
    assert (state / "identity.key").read_bytes() == b"garbage"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_folder_that_is_not_ours_is_named(cluster):
    locked = cluster.folder / "locked"
    locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    found = examined(cluster, "--state-dir", str(locked / "state"))
    assert found["state"]["verdict"] == "failed"


def test_a_clock_that_was_never_set_is_named():
    made = findings.look_at_clock(0.0)
    assert made.verdict == "failed" and "1970-01-01" in made.message
    assert made.mend == "sudo timedatectl set-ntp true"
