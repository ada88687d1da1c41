"""HTTP servers that answer as inference engines do, and whose pages a test changes."""

from __future__ import annotations

import json

import h11
import trio

from meshnode.values import HostPort


def listing(owner, *names):
    return {"object": "list", "data": [{"id": name, "owned_by": owner} for name in names]}


def tags(*names):
    return {"models": [{"name": name, "model": name} for name in names]}


VLLM = {
    "/health": b"",
    "/v1/models": listing("vllm", "Qwen/Qwen3-8B"),
    "/metrics": b'vllm:num_requests_running{e="0"} 3.0\nvllm:num_requests_waiting{e="0"} 1.0\n',
}
LLAMACPP = {
    "/health": {"status": "ok"},
    "/v1/models": listing("llamacpp", "gemma.gguf"),
    "/slots": [{"id": 0, "is_processing": True}, {"id": 1, "is_processing": False}],
}
OLLAMA = {
    "/v1/models": listing("library", "a:1b", "b:8b"),
    "/api/tags": tags("a:1b", "b:8b"),
    "/api/ps": tags("b:8b"),
}
LOCALAI = {"/v1/models": listing("", "hermes"), "/health": b"OK"}


class Pages:
    """An HTTP server whose pages a test changes; a page is a body, or a status and a body."""

    def __init__(self, pages):
        self.pages = dict(pages)
        self.asked = []

    async def serve(self, stream):
        async with stream:
            parser = h11.Connection(h11.SERVER)
            while not isinstance(event := parser.next_event(), h11.Request):
                assert event is h11.NEED_DATA
                data = await stream.receive_some()
                if not data:
                    return  # somebody only looked whether it accepts
                parser.receive_data(data)
            path = event.target.decode()
            self.asked.append(path)
            page = self.pages.get(path, (404, b"not found"))
            if page == "hang":
                await trio.sleep_forever()
            status, body = page if isinstance(page, tuple) else (200, page)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            head = h11.Response(
                status_code=status, headers=[("Content-Length", str(len(data)))], reason=b""
            )
            try:
                await stream.send_all(
                    parser.send(head)
                    + parser.send(h11.Data(data))
                    + parser.send(h11.EndOfMessage())
                )
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass


async def serve_pages(nursery, pages):
    """Serve pages on loopback; return them and the address."""
    served = Pages(pages)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, served.serve, listeners)
    return served, HostPort("127.0.0.1", listeners[0].socket.getsockname()[1])
