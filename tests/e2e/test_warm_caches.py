"""A conversation goes on warm whichever entry node it comes in at, with real processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import openai

from support.cluster import Cluster, Node, eventually

MODEL = "demo-model"
QUESTION = {"role": "user", "content": "A long question about one thing and another. " * 60}


def chat(entry: Node, *messages: dict[str, str]) -> str:
    with openai.OpenAI(
        base_url=entry.base_url, api_key="unused", max_retries=0, timeout=30
    ) as client:
        answer = client.chat.completions.create(model=MODEL, messages=list(messages))  # type: ignore[arg-type]
        return answer.choices[0].message.content or ""


def explain(
    cluster: Cluster, entry: Node, prompt: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    asked = ("--model", MODEL, "--prompt-file", str(prompt), "--api", str(entry.ready["api"]))
    return cluster.run("explain", *asked, "--state-dir", str(entry.state_dir), *more)


def explained(cluster: Cluster, entry: Node, prompt: Path) -> dict[str, Any]:
    done = explain(cluster, entry, prompt, "--json")
    assert done.returncode == 0, done.stderr
    decision: dict[str, Any] = json.loads(done.stdout)
    return decision


def figure(node: Node, name: str) -> float:
    lines = node.get("/metrics").splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_a_prompt_that_one_entry_served_is_warm_at_the_other_until_its_host_dies(
    cluster: Cluster, tmp_path: Path
) -> None:
    small, big = cluster.hosts(8, 24)
    # The first sends all it has to the smaller host, where the other would send nothing by itself.
    a = cluster.start_node("a", "--proxy", "127.0.0.1:0", "--target", "host8", bootstrap=big)
    b = cluster.start_node("b", "--proxy", "127.0.0.1:0", bootstrap=big)
    for entry in (a, b):
        entry.wait_ready()
        eventually(lambda entry=entry: entry.online() == {"a", "b", "host8", "host24"}, within=15)
        eventually(lambda entry=entry: len(models_told(entry)) == 2, within=15)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps({"model": MODEL, "messages": [QUESTION], "temperature": 0.3}))
    before = explained(cluster, b, prompt)
    assert (before["picked"], before["tier"]) == (big.peer_id, "vram")
    assert not any(row["match_ratio"] for row in before["candidates"])

    said = chat(a, QUESTION)
    assert a.decisions()[0]["picked"] == small.peer_id
    eventually(lambda: all(row["in_flight"] == 0 for row in b.peers()), within=10)
    warm = eventually(
        lambda: (now := explained(cluster, b, prompt))["tier"] == "prefix" and now, within=10
    )
    assert (warm["picked"], warm["match_ratio"], warm["pressure"]) == (small.peer_id, 1.0, 0)
    rows = {row["name"]: row for row in warm["candidates"]}
    assert rows["host8"]["match_ratio"] == 1.0 and not rows["host24"]["match_ratio"]
    assert rows["host8"]["loaded"] and rows["host8"]["in_flight"] == 0

    known, told = figure(b, "meshnode_affinity_blocks_known"), figure(b, "meshnode_affinity_batche")
    table = explain(cluster, b, prompt).stdout
    assert "host8; decided by: the prompt's beginning is cached there" in table and "100%" in table
    assert b.decisions() == []  # nothing that was asked so far was a request
    assert all(row["in_flight"] == 0 for row in b.peers())
    assert figure(b, "meshnode_affinity_blocks_known") == known > 10
    assert figure(b, "meshnode_affinity_batche") == told

    answer = {"role": "assistant", "content": said}
    chat(b, QUESTION, answer, {"role": "user", "content": "And then?"})
    decision = b.decisions()[0]
    assert (decision["picked"], decision["tier"]) == (small.peer_id, "prefix")
    assert decision["match_ratio"] > 0.8

    small.kill()
    for entry in (a, b):
        eventually(
            lambda entry=entry: figure(entry, "meshnode_affinity_blocks_known") == 0, within=20
        )
    after = explained(cluster, b, prompt)
    assert (after["picked"], after["tier"]) == (big.peer_id, "only")
    assert not any(row["match_ratio"] for row in after["candidates"])
    assert explain(cluster, a, prompt).returncode == 4  # its only target is gone
    chat(b, QUESTION)
    assert b.decisions()[0]["picked"] == big.peer_id
    for node in (a, b, big):
        assert QUESTION["content"][:40] not in "\n".join([*node.out, *node.err])


def models_told(entry: Node) -> list[str]:
    """The hosts that said which models they have."""
    return [row["name"] for row in entry.peers() if any(s["models"] for s in row["services"])]
