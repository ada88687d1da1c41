"""Draining a node from its page, in a real Chromium."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from support.cluster import Backend, Cluster, Node, eventually

STORED = "() => JSON.stringify([Object.values(sessionStorage), Object.values(localStorage)])"


def ask(node: Node) -> str:
    body = {
        "model": "demo-model",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
    }
    request = urllib.request.Request(
        f"{node.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        read: str = answer.read().decode()
        return read


def speak_until(over: threading.Event) -> Callable[[socket.socket], None]:
    """Answer a request with events until then."""

    def serve(connection: socket.socket) -> None:
        if not connection.recv(65536):
            return  # a look at the service's health
        connection.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        )
        while not over.wait(0.1):
            connection.sendall(b"data: {}\n\n")
        connection.sendall(b"data: [DONE]\n\n")

    return serve


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Ends the answer under way; set at the latest when the test ends."""
    over = threading.Event()
    yield over
    over.set()


@pytest.fixture
def service(over: threading.Event) -> Iterator[str]:
    backend = Backend(speak_until(over))
    yield backend.address
    backend.close()


def key_of(node: Node) -> str:
    return (node.state_dir / "api.key").read_text().strip()


@pytest.mark.timeout(240)
def test_the_pages_button_drains_the_node_once_it_is_confirmed_and_the_key_is_right(
    look: Any, cluster: Cluster, over: threading.Event, service: str
) -> None:
    exposed = ("--expose", f"llm={service}", "--health", "llm=tcp")
    host = cluster.node("host", *exposed, "--vram", "8GiB")
    entry = cluster.entry(host)
    eventually(lambda: entry.online() == {"host", "laptop"}, within=20)
    page = look.open(host.ready["api"])
    said = page.locator("#drain-line")
    with ThreadPoolExecutor(1) as pool, ExitStack() as ending:
        ending.callback(over.set)  # or the pool would wait for ever where something fails
        answer = pool.submit(ask, entry)
        eventually(lambda: page.locator("#tile-flight").inner_text() == "1", within=20)

        # By keyboard alone; the first thing that Enter would press changes nothing.
        page.get_by_role("button", name="Drain…").focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="Drain host?")
        dialog.wait_for()
        assert "1 request is served here" in dialog.inner_text()
        look.keep("drain-asks")
        page.keyboard.press("Enter")
        dialog.wait_for(state="hidden")
        page.keyboard.press("Enter")
        dialog.wait_for()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")

        # A wrong key is said to be wrong, and changes nothing.
        page.get_by_role("dialog", name="API key").wait_for()
        page.keyboard.type("a-guess")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("That key is not this node's.").wait_for()
        look.keep("drain-wrong-key")
        assert host.state_of("host") == "up"
        page.keyboard.type(key_of(host))
        page.keyboard.press("Enter")

        eventually(lambda: "takes nothing new" in said.inner_text(), within=10)
        assert "1 request may end first, within 30" in said.inner_text()
        assert said.get_attribute("role") == "status"
        eventually(lambda: look.states()["host"] == "draining", within=10)
        button = page.locator("#drain")
        assert (button.inner_text(), button.get_attribute("aria-disabled")) == ("Draining", "true")
        assert page.evaluate("document.activeElement.id") == "drain"
        assert page.evaluate(STORED) == "[[],[]]"  # no key of it is in what the browser keeps
        look.keep("drain-runs", full_page=True)
        over.set()
        assert "data: [DONE]" in answer.result(60)  # what ran has ended well
    assert host.wait(30) == 0
    eventually(lambda: "it has left the mesh" in said.inner_text(), within=20)
    assert button.inner_text() == "Drained"
    look.keep("drain-is-over")
    # A browser notes by itself the 401 of the wrong key, and that nothing listens any more.
    assert [c for c in look.complaints if "401" not in c and "ERR_" not in c] == []

    # Started again on the same port, it can be drained again.
    cluster.node("host", "--api", host.ready["api"], bootstrap=entry)
    page.wait_for_selector('#connection[data-state="live"]', timeout=30_000)
    eventually(lambda: button.inner_text() == "Drain…", within=10)
    assert said.inner_text() == ""


@pytest.mark.timeout(240)
def test_whoever_gives_up_or_meets_a_failing_node_is_told_and_nothing_is_drained(
    look: Any, cluster: Cluster
) -> None:
    node = cluster.node("alone")
    page = look.open(node.ready["api"])
    drain = page.get_by_role("button", name="Drain…")
    drain.click()
    page.keyboard.press("Escape")
    drain.click()
    page.get_by_role("button", name="Drain it").click()
    page.get_by_role("dialog", name="API key").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    assert page.locator("#drain-line").inner_text() == ""

    refusal = {"error": {"message": "the node failed to answer; its log says why"}}
    page.route("**/api/drain", lambda route: route.fulfill(status=500, json=refusal))
    drain.click()
    page.get_by_role("button", name="Drain it").click()
    page.locator("#key-input").fill(key_of(node))
    page.keyboard.press("Enter")
    told = page.get_by_text("The node was not drained: the node failed to answer")
    told.wait_for()
    # The page knows the key by now, and does not ask again.
    page.unroute("**/api/drain")
    page.route("**/api/drain", lambda route: route.abort())
    drain.click()
    page.get_by_role("button", name="Drain it").click()
    page.get_by_text("The node was not drained: The node does not answer.").wait_for()
    assert node.state_of("alone") == "up"


@pytest.mark.timeout(240)
def test_a_drain_that_somebody_else_began_is_shown_too(
    look: Any, cluster: Cluster, over: threading.Event, service: str
) -> None:
    exposed = ("--expose", f"llm={service}", "--health", "llm=tcp")
    host = cluster.node("host", *exposed, "--vram", "8GiB")
    entry = cluster.entry(host)
    eventually(lambda: entry.online() == {"host", "laptop"}, within=20)
    page = look.open(host.ready["api"])
    with ThreadPoolExecutor(2) as pool, ExitStack() as ending:
        ending.callback(over.set)
        answer = pool.submit(ask, entry)
        eventually(lambda: host.in_flight() == 1, within=20)
        told = ("--api", str(host.ready["api"]), "--state-dir", str(host.state_dir))
        drained = pool.submit(cluster.run, "drain", *told)
        page.get_by_text("This node drains: it takes nothing new").wait_for()
        over.set()
        assert "data: [DONE]" in answer.result(60)
        assert drained.result(60).returncode == 0
    page.get_by_text("it has left the mesh").wait_for()
