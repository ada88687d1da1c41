"""Canaries in everything that is secret, and a search for them wherever they must not be."""

from __future__ import annotations

import base64
import http.client
import json
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshnode.core import token as tokens
from support.cluster import Backend, Cluster, Node, Process, eventually
from support.collector import Collector

pytest.importorskip("opentelemetry.proto", reason="the extra otel is not here")

TESTS = Path(__file__).resolve().parents[1]


def canary(kind: str) -> str:
    return f"canary-{kind}-{secrets.token_hex(12)}"


PROMPT, RESPONSE, REFUSAL = canary("prompt"), canary("response"), canary("refusal")
UPLOAD, SESSION, QUERY = canary("upload"), canary("session"), canary("query")
CLIENT_KEY, WRONG_KEY, X_API_KEY = canary("client"), canary("wrong"), canary("x-api-key")
API_KEY, WRONG_API_KEY, BASIC = canary("api"), canary("wrong-api"), canary("basic")
MODELS = ("m", "slow", "cut", "broken", "refusing")


def spellings(token_text: str) -> dict[str, str]:
    """A token in every form that somebody may print it."""
    key = tokens.decode(token_text).key
    return {
        "the token": token_text,
        "the token without its prefix": token_text.removeprefix(tokens.PREFIX),
        "its key in hex": key.hex(),
        "its key in base64": base64.b64encode(key).decode().rstrip("="),
        "its key in base64url": base64.urlsafe_b64encode(key).decode().rstrip("="),
        "its key as Python's bytes": repr(key)[2:-1],
    }


def everything_secret(cluster: Cluster, wrong_token: str) -> dict[str, str]:
    found = {
        text: text
        for text in (
            *(PROMPT, RESPONSE, REFUSAL, UPLOAD, SESSION, QUERY, CLIENT_KEY, WRONG_KEY),
            *(X_API_KEY, API_KEY, WRONG_API_KEY, BASIC),
        )
    }
    found |= {base64.b64encode(text.encode()).decode(): f"{text} in base64" for text in found}
    for whose, token in (("ours: ", cluster.token), ("theirs: ", wrong_token)):
        found |= {text: whose + how for how, text in spellings(token).items()}
    for file in cluster.folder.glob("state-*/api.key"):
        found[file.read_text().strip()] = str(file)
    return found


def found_in(text: str | bytes, secret: dict[str, str]) -> list[str]:
    """Name each secret that stands in ``text``."""
    data = text.encode() if isinstance(text, str) else text
    return [name for needle, name in secret.items() if needle.encode() in data]


# The engine


def take_request(connection: socket.socket) -> bytes:
    """Read one request to the end of its body; nothing where somebody only looked."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length is not None and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class Engine:
    """Answers with canaries, as the model that is asked for tells it."""

    def __init__(self) -> None:
        self.seen = b""

    def serve(self, connection: socket.socket) -> None:
        while request := take_request(connection):
            if request.startswith(b"GET /v1/models "):
                listing = {"object": "list", "data": [{"id": model} for model in MODELS]}
                self.send(connection, 200, json.dumps(listing))
            elif request.startswith(b"GET"):
                self.send(connection, 404, "{}")
            else:
                self.seen += request
                if not self.answer(connection, request):
                    return

    def answer(self, connection: socket.socket, request: bytes) -> bool:
        """Serve one request of a client; return whether the connection goes on."""
        chunk = json.dumps({"choices": [{"delta": {"content": RESPONSE}}]})
        event = f"data: {chunk}\n\n".encode()
        piece = b"%x\r\n%b\r\n" % (len(event), event)
        start = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        start += b"transfer-encoding: chunked\r\n\r\n"
        if b'"slow"' in request:
            connection.recv(1)  # until the gateway gives up
            return False
        if b'"cut"' in request:
            connection.sendall(start + piece)
            return False
        if b'"broken"' in request:
            connection.sendall(f"HTTP/9 {REFUSAL}\r\n{REFUSAL}\r\n\r\n".encode())
            return False
        if b'"refusing"' in request:
            self.send(connection, 503, json.dumps({"error": f"{REFUSAL}: {PROMPT}"}))
        elif b'"stream": true' in request:
            connection.sendall(start + 3 * piece + b"0\r\n\r\n")
        else:
            self.send(connection, 200, json.dumps({"choices": [{"text": RESPONSE}]}))
        return True

    def send(self, connection: socket.socket, status: int, body: str) -> None:
        head = f"HTTP/1.1 {status} As-Told\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())


# The clients

FORM = "----form-boundary"
JSON = {"content-type": "application/json"}
KEYED = {"authorization": f"Bearer {CLIENT_KEY}", "x-session-id": SESSION}


def ask(
    address: tuple[str, int],
    path: str,
    body: bytes | str | None = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> tuple[int, bytes]:
    """Return the status and the body, or as much of it as came."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        connection.request(method or ("POST" if body else "GET"), path, body, headers or {})
        answer = connection.getresponse()
        head = str(answer.headers).encode()
        try:
            return answer.status, head + answer.read()
        except http.client.IncompleteRead as exc:
            return answer.status, head + exc.partial
    finally:
        connection.close()


def chat(model: str, *, stream: bool = False, prompt: str = PROMPT) -> str:
    said = [{"role": "user", "content": prompt}]
    return json.dumps({"model": model, "messages": said, "stream": stream, "user": SESSION})


def completion(model: str, *, stream: bool = False) -> str:
    return json.dumps({"model": model, "prompt": PROMPT, "stream": stream})


def upload() -> tuple[str, dict[str, str]]:
    fields = f'--{FORM}\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n'
    fields += f'--{FORM}\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n{PROMPT}\r\n'
    fields += f'--{FORM}\r\ncontent-disposition: form-data; name="file"; filename="{UPLOAD}.wav"'
    fields += f"\r\ncontent-type: audio/wav\r\n\r\n{UPLOAD}\r\n--{FORM}--\r\n"
    return fields, {"content-type": f"multipart/form-data; boundary={FORM}"}


def use_gateway(address: tuple[str, int]) -> dict[str, int]:
    """Ask for everything that works and fails; return the statuses."""
    seen: dict[str, int] = {}
    posted = JSON | KEYED

    def one(name: str, path: str, body: str, headers: dict[str, str]) -> None:
        seen[name] = ask(address, path, body, headers)[0]

    for stream in (False, True):
        one(f"chat {stream}", "/v1/chat/completions", chat("m", stream=stream), posted)
        one(f"completion {stream}", "/v1/completions", completion("m", stream=stream), posted)
        for model in ("cut", "slow", "refusing", "broken", "unknown"):
            one(f"{model} {stream}", "/v1/chat/completions", chat(model, stream=stream), posted)
    one("x-api-key", "/v1/messages", chat("m"), JSON | {"x-api-key": CLIENT_KEY})
    form, kind = upload()
    one("upload", "/v1/audio/transcriptions", form, kind | KEYED)
    one("query", f"/v1/chat/completions?key={QUERY}", chat("m"), posted)
    one("no JSON", "/v1/chat/completions", chat("m")[:-4], posted)
    one("no object", "/v1/chat/completions", json.dumps(PROMPT), posted)
    one("two models", "/v1/chat/completions", chat("m")[:-1] + ',"model":"n"}', posted)
    for name, headers in {
        "wrong key": {"authorization": f"Bearer {WRONG_KEY}"},
        "wrong x-api-key": {"x-api-key": X_API_KEY},
        "basic": {"authorization": f"Basic {base64.b64encode(BASIC.encode()).decode()}"},
        "no key": {},
    }.items():
        one(name, "/v1/chat/completions", chat("m"), JSON | headers)
    with socket.create_connection(address, timeout=20) as client:  # one that no parser takes
        client.sendall(
            f"POST /v1/chat/completions?{QUERY} HTTP/1.1\r\nhost: localhost\r\n"
            f"authorization : Bearer {CLIENT_KEY}\r\n\r\n{PROMPT}".encode()
        )
        seen["malformed head"] = int(client.recv(100).split()[1])
    return seen


EXPECTED = {
    **dict.fromkeys(("chat False", "chat True", "completion False", "completion True"), 200),
    **dict.fromkeys(("cut False", "cut True", "x-api-key", "upload", "query"), 200),
    **dict.fromkeys(("slow False", "slow True"), 504),
    **dict.fromkeys(("refusing False", "refusing True"), 503),
    **dict.fromkeys(("broken False", "broken True"), 502),
    **dict.fromkeys(("unknown False", "unknown True"), 404),
    **dict.fromkeys(("no JSON", "no object", "two models", "malformed head"), 400),
    **dict.fromkeys(("wrong key", "wrong x-api-key", "basic", "no key"), 401),
}


# Where they are looked for


def answers_of_api(address: tuple[str, int], key: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    for path in (
        *("/", "/dashboard/app.js", "/healthz", "/readyz", "/metrics", "/openapi.json"),
        *("/api/status", "/api/peers", "/api/decisions", "/api/explain?model=m"),
        *("/api/explain?model=unknown", "/api/nothing", "/api/p2p", "/api/p2p/workers"),
        *("/api/p2p/federation", "/api/p2p/stats"),
    ):
        yield path, ask(address, path, headers=key)[1]
    for asked in ({"prompt": PROMPT}, {"prompt": PROMPT, "stream": True}, {"prompt": [PROMPT]}):
        asking = json.dumps({"model": "m"} | asked)
        shown = {"authorization": f"Bearer {API_KEY}"}
        yield f"POST /api/explain {list(asked)}", ask(address, "/api/explain", asking, shown)[1]
    wrong = {"authorization": f"Bearer {WRONG_API_KEY}"}
    yield "a wrong key", ask(address, "/api/p2p/token", headers=wrong)[1]
    yield "a refused POST", ask(address, "/api/drain", method="POST", headers=wrong)[1]
    yield "/api/events", first_event(address, key)


def first_event(address: tuple[str, int], key: dict[str, str]) -> bytes:
    """The snapshot with which the stream begins."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request("GET", "/api/events", headers=key)
    answer = connection.getresponse()
    event = b""
    while not event.endswith(b"\n\n"):
        event += answer.readline()
    connection.close()
    return event


def metadata_of(process: Process) -> bytes:
    """What ``ps`` shows of a process to everybody, and to its own user."""
    proc = Path(f"/proc/{process.pid}")
    return (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()


def api_address(node: Node) -> tuple[str, int]:
    host, _, port = str(node.ready["api"]).rpartition(":")
    return host, int(port)


def told_to_people(node: Node) -> dict[str, Any]:
    """Where a node listens that says it to people, and not to programs."""

    def told() -> dict[str, str]:
        text = "\n".join([*node.out, *node.err])
        found = re.findall(r"^  (proxy|api) +http://([^/\s]+)", text, re.M)
        return dict(found) if len(found) == 2 else {}

    return eventually(told, within=60)


class Scene:
    """A host with an engine, a gateway, a plain entry, a stranger, and one who only listens."""

    def __init__(self, cluster: Cluster, backend: Callable[..., Backend], traces: str) -> None:
        self.cluster = cluster
        self.engine = Engine()
        folder = cluster.folder
        (folder / "token").write_text(cluster.token + "\n")
        (folder / "api-key").write_text(API_KEY + "\n")
        (folder / "clients").write_text(
            f'[one]\nkey = "{CLIENT_KEY}"\n[two]\nkey = "{"another-" * 4}"\n'
        )
        self.wrong_token = cluster.new_token("e2e")
        (folder / "wrong-token").write_text(self.wrong_token + "\n")
        service = f"llm={backend(self.engine.serve).address}"
        self.host = self.start("host", "--expose", service, "--vram", "8GiB").wait_ready()
        behind = ("--proxy", "127.0.0.1:0", "--otlp-endpoint", traces)
        behind += ("--bootstrap", self.host.addr, "--api-key-file", str(folder / "api-key"))
        gateway = (*behind, "--client-keys-file", str(folder / "clients"))
        gateway += ("--first-byte-timeout", "1s", "--affinity", "session")
        self.gateway = self.start("gateway", *gateway, "--log-format", "pretty")
        self.plain = self.start("plain", *behind, "--proxy-mode", "tcp")
        self.alone = self.start("alone", "--proxy", "127.0.0.1:0")
        self.stranger = self.start("stranger", "--bootstrap", self.host.addr, token="wrong-token")
        self.nodes = [self.host, self.gateway, self.plain, self.alone, self.stranger]
        argv = [sys.executable, "-m", "support.eavesdropper", self.host.addr]
        env = cluster.env(MESHNODE_TOKEN=cluster.token, PYTHONPATH=str(TESTS))
        self.eavesdropper = Process(argv, env)
        cluster.processes.append(self.eavesdropper)
        for node in (self.plain, self.alone):
            node.wait_ready()
        self.gateway.ready = told_to_people(self.gateway)
        self.eavesdropper.first_line()

    def start(self, name: str, *args: str, token: str = "token") -> Node:
        file = str(self.cluster.folder / token)
        return self.cluster.start_node(
            name, "--log-level", "debug", "--token-file", file, *args, token=""
        )

    def heard(self) -> list[bytes]:
        """What went round in the mesh; see support.eavesdropper."""
        lines = [json.loads(line) for line in list(self.eavesdropper.out)[1:]]
        return [base64.b64decode(line["data"]) for line in lines]


@pytest.fixture
def scene(cluster: Cluster, backend: Callable[..., Backend]) -> Iterator[tuple[Scene, Collector]]:
    collector = Collector()
    yield Scene(cluster, backend, collector.url), collector
    collector.close()


@pytest.mark.timeout(240)
def test_no_secret_is_in_anything_that_is_shown_written_or_sent_to_others(
    scene: tuple[Scene, Collector],
) -> None:
    made, traces = scene
    gateway, plain = made.gateway, made.plain
    key = {"authorization": f"Bearer {API_KEY}"}

    for node in (gateway, plain):
        peers = partial(ask, api_address(node), "/api/peers", headers=key)
        eventually(lambda peers=peers: b'"m"' in peers()[1], within=30)
    assert use_gateway(gateway.proxy) == EXPECTED
    for model in ("m", "cut", "refusing"):
        ask(plain.proxy, "/v1/chat/completions", chat(model, stream=True), JSON | KEYED)
    assert ask(made.alone.proxy, "/v1/chat/completions", chat("m"), JSON | KEYED)[0] == 503
    # They were where they belong: otherwise their absence elsewhere would prove nothing.
    for text in (PROMPT, UPLOAD, SESSION, QUERY):
        assert text.encode() in made.engine.seen
    answered = ask(gateway.proxy, "/v1/chat/completions", chat("m", stream=True), JSON | KEYED)
    assert RESPONSE.encode() in answered[1]
    assert made.stranger.wait(60) == 5
    eventually(lambda: len(traces.spans) > 20, within=20)
    eventually(lambda: len(made.heard()) >= 3, within=30)

    secret = everything_secret(made.cluster, made.wrong_token)
    leaks: dict[str, list[str]] = {}

    def look(place: str, text: str | bytes) -> None:
        assert text, f"nothing to look into: {place}"
        if found := found_in(text, secret):
            leaks[place] = found

    look_at_others(gateway, look)
    look_at_commands(made.cluster, look)
    for node in (made.host, gateway, plain, made.alone):
        name = node.state_dir.name
        look(f"ps of {name}", metadata_of(node))
        keyed = key if node in (gateway, plain) else {}
        for path, answer in answers_of_api(api_address(node), keyed):
            look(f"{path} of {name}", answer)
    made.host.kill()
    eventually(lambda: lines_of(plain, made.host, "peer_offline"), within=20)
    for node in (gateway, plain):
        node.signal(signal.SIGINT)
        node.wait(20)
    for node in made.nodes:
        look(f"the output of {node.state_dir.name}", "\n".join([*node.out, *node.err]))
        for file in node.state_dir.rglob("*"):
            if file.is_file() and file.name != "api.key":
                look(str(file), file.read_bytes())
    look("the spans", traces.raw)
    look("the mesh's topics", b"\n".join(made.heard()))
    assert leaks == {}
    assert {line["level"] for line in made.host.log()} >= {"debug", "info"}
    # Of what happened once there is one line, however often others told it.
    for event in ("peer_joined", "peer_offline"):
        assert len(lines_of(plain, made.host, event)) == 1, event


def lines_of(node: Node, peer: Node, event: str) -> list[dict[str, Any]]:
    return [
        line
        for line in node.log()
        if line["event"] == event and line.get("peer_id") == peer.peer_id
    ]


def look_at_others(gateway: Node, look: Callable[[str, bytes], None]) -> None:
    """What another client is told when its own requests fail."""
    other = JSON | {"authorization": "Bearer " + "another-" * 4}
    for model in ("unknown", "slow", "broken", "cut-not"):
        body = chat(model, prompt="something else").replace(SESSION, "another")
        answer = ask(gateway.proxy, "/v1/chat/completions", body, other)[1]
        look(f"an error to others: {model}", answer)
    look("the models, to others", ask(gateway.proxy, "/v1/models", headers=other)[1])


def look_at_commands(cluster: Cluster, look: Callable[[str, str], None]) -> None:
    """What commands say that read the same settings."""
    folder = cluster.folder
    settings = ("--token-file", str(folder / "token"), "--api-key-file", str(folder / "api-key"))
    settings += ("--client-keys-file", str(folder / "clients"), "--state-dir", str(folder / "new"))
    for command in (
        ("token", "show", str(folder / "token")),
        ("config", "show", *settings),
        ("config", "check", *settings),
    ):
        result = cluster.run(*command)
        assert result.returncode == 0, result.stderr
        look(f"meshnode {' '.join(command[:2])}", f"{command[0]}\n{result.stdout}{result.stderr}")
