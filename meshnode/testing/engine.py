"""A small OpenAI-compatible engine with no model: it says who it is, a word at a time.

    python -m meshnode.testing.engine --name gpu-24 --vram-gib 24

For demos and tests that want to see which engine served, how many it served at once, and what
becomes of an answer whose reader goes away. ``GET /stats`` tells the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import TypeVar, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from hypercorn.typing import ASGIFramework
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from meshnode.testing.openai_shapes import (
    CHAT,
    CREATED,
    TEXT,
    Answer,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerateRequest,
    ModelRequest,
    Shape,
    embedding,
    error_body,
)
from meshnode.testing.other_shapes import (
    AnthropicAnswer,
    MessagesRequest,
    OllamaAnswer,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaText,
)
from meshnode.testing.prefill import PrefixCache

GIB = 1024**3
SHUTDOWN_LIMIT = 1.0  # seconds from a signal to the end of the process

_FILLER = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_RequestT = TypeVar("_RequestT", bound=ModelRequest)


@dataclass(frozen=True)
class EngineOptions:
    """What one engine pretends to be."""

    name: str = "engine"
    models: tuple[str, ...] = ("demo-model",)
    loaded: tuple[str, ...] | None = None  # those in memory; None = all
    vram: int = 0  # bytes that it says it has
    tokens: int = 24  # words per answer, unless the request wants fewer
    tokens_per_second: float = 200.0  # 0 = all at once
    first_token_delay: float = 0.0  # seconds
    prefill_tokens_per_second: float = 0.0  # of what its prefix cache lacks; 0 = at once
    fail_with: int = 0  # an HTTP status that answers every POST; 0 = none
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def models_loaded(self) -> tuple[str, ...]:
        return self.models if self.loaded is None else self.loaded


@dataclass
class EngineStats:
    """What an engine has done since it began."""

    served: int = 0  # answered to the end
    in_flight: int = 0
    peak_in_flight: int = 0
    cancelled: int = 0  # the reader went away before the end
    failed: int = 0  # answered with an error
    tokens: int = 0  # generated, those of cancelled answers too
    prompt_tokens: int = 0  # of those prompts whose reading was waited for
    cached_tokens: int = 0  # of them, those that its prefix cache had

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Count one answer while it is generated, and how it ends."""
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        finished = False
        try:
            yield
            finished = True
        finally:
            self.in_flight -= 1
            self.served += finished
            self.cancelled += not finished


class _RequestError(Exception):
    """Answer with an error in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, code=code, param=param)


class Engine:
    """The endpoints of one engine, and its counts."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.stats = EngineStats()
        self._asked = 0
        self._cache = PrefixCache()
        # A GPU that reads two prompts at once takes twice as long for each.
        self._reading = trio.Lock()

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/stats", self._tell_stats),
                Route("/v1/models", self._models),
                Route("/api/tags", self._tags),
                Route("/api/ps", self._running),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/v1/messages", self._message, methods=["POST"]),
                Route("/api/chat", self._ollama_chat, methods=["POST"]),
                Route("/api/generate", self._ollama_generate, methods=["POST"]),
                Route("/api/embed", self._ollama_embed, methods=["POST"]),
                Route("/api/show", self._show, methods=["POST"]),
            ],
            exception_handlers={_RequestError: self._refuse, HTTPException: self._refuse},
        )

    async def _health(self, request: Request) -> Response:
        return self._reply({"status": "ok", "engine": self.options.name})

    async def _tell_stats(self, request: Request) -> Response:
        return self._reply({"engine": self.options.name, **asdict(self.stats)})

    async def _models(self, request: Request) -> Response:
        rows = [
            {"id": model, "object": "model", "created": CREATED, "owned_by": self.options.name}
            for model in self.options.models
        ]
        return self._reply({"object": "list", "data": rows})

    async def _tags(self, request: Request) -> Response:
        rows = [{"name": model, "model": model} for model in self.options.models]
        return self._reply({"models": rows})  # Ollama's list of models

    async def _running(self, request: Request) -> Response:
        rows = [{"name": model, "model": model} for model in self.options.models_loaded]
        return self._reply({"models": rows})  # and of those in memory

    async def _chat(self, request: Request) -> Response:
        return self._generate(CHAT, await self._parse(request, ChatRequest))

    async def _complete(self, request: Request) -> Response:
        return self._generate(TEXT, await self._parse(request, CompletionRequest))

    async def _message(self, request: Request) -> Response:
        return self._generate(CHAT, await self._parse(request, MessagesRequest), AnthropicAnswer)

    async def _ollama_chat(self, request: Request) -> Response:
        return self._generate(CHAT, await self._parse(request, OllamaChatRequest), OllamaAnswer)

    async def _ollama_generate(self, request: Request) -> Response:
        return self._generate(TEXT, await self._parse(request, OllamaGenerateRequest), OllamaText)

    async def _ollama_embed(self, request: Request) -> Response:
        body = await self._parse(request, EmbeddingRequest)
        with self.stats.serving():
            vectors = [embedding(text, "float") for text in body.inputs()]
        return self._reply({"model": body.model, "embeddings": vectors})

    async def _show(self, request: Request) -> Response:
        body = await self._parse(request, ModelRequest)
        return self._reply({"modelfile": f"FROM {body.model}", "details": {}, "model_info": {}})

    async def _embed(self, request: Request) -> Response:
        body = await self._parse(request, EmbeddingRequest)
        with self.stats.serving():
            texts = body.inputs()
            rows = [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": embedding(text, body.encoding_format),
                }
                for index, text in enumerate(texts)
            ]
        count = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return self._reply({"object": "list", "model": body.model, "data": rows, "usage": usage})

    async def _parse(self, request: Request, shape: type[_RequestT]) -> _RequestT:
        try:
            raw = await request.body()
        except ClientDisconnect:
            self.stats.cancelled += 1
            raise _RequestError(400, "the request was cut short") from None
        if self.options.fail_with:
            raise _RequestError(
                self.options.fail_with, f"{self.options.name} fails as told to", code="told_to_fail"
            )
        try:
            body = shape.model_validate_json(raw)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False)[0]
            param = ".".join(map(str, first["loc"])) or None
            raise _RequestError(
                400, f"{param or 'body'}: {first['msg']}", code="invalid_body", param=param
            ) from exc
        if body.model not in self.options.models:
            raise _RequestError(
                404,
                f"the model {body.model!r} does not exist; "
                f"this engine has {', '.join(self.options.models)}",
                code="model_not_found",
                param="model",
            )
        return body

    def _generate(
        self, shape: Shape, body: GenerateRequest, kind: type[Answer] = Answer
    ) -> Response:
        self._asked += 1
        prompt = body.prompt_text().split()
        limit = body.limit
        count = self.options.tokens if limit is None else min(limit, self.options.tokens)
        answer = kind(
            shape=shape,
            number=self._asked,
            model=body.model,
            engine=self.options.name,
            pieces=answer_words(self.options, body.model, count),
            prompt_tokens=len(prompt),
            finish_reason="length" if count < self.options.tokens else "stop",
            usage_wanted=body.usage_wanted,
        )
        return _Generation(self, answer, prompt, stream=body.stream)

    async def read(self, model: str, prompt: Sequence[str]) -> None:
        """Take as long as an engine takes for what its prefix cache lacks of the prompt."""
        rate = self.options.prefill_tokens_per_second
        if not rate:
            return
        async with self._reading:
            cached = self._cache.cached(model, prompt)
            await trio.sleep((len(prompt) - cached) / rate)
            self._cache.keep(model, prompt)
        self.stats.prompt_tokens += len(prompt)
        self.stats.cached_tokens += cached

    def keep(self, model: str, prompt: Sequence[str], answer: Sequence[str]) -> None:
        """Have an answer in the cache too: the next turn of its conversation begins with it."""
        if self.options.prefill_tokens_per_second:
            self._cache.keep(model, [*prompt, *"".join(answer).split()])

    def _reply(self, body: object, status: int = 200) -> Response:
        return JSONResponse(body, status, headers=self.headers)

    def _refuse(self, request: Request, exc: Exception) -> Response:
        self.stats.failed += 1
        if isinstance(exc, _RequestError):
            return self._reply(exc.body, exc.status)
        assert isinstance(exc, HTTPException)  # an unknown path, or the wrong method
        message = f"{request.method} {request.url.path}: {exc.detail}"
        return self._reply(error_body(exc.status_code, message, code=None), exc.status_code)

    @property
    def headers(self) -> dict[str, str]:
        return {"x-engine": self.options.name}


def answer_words(options: EngineOptions, model: str, count: int) -> tuple[str, ...]:
    """Return the ``count`` tokens of an answer: who speaks, then words that count up."""
    said = f"This is {options.name} with {options.vram / GIB:g} GiB of VRAM, serving {model}:"
    first, *others = said.split()
    words = islice(cycle(_FILLER), max(0, count - len(others) - 1))
    return (first, *(f" {word}" for word in (*others, *words)))[:count]


class _Generation(Response):
    """Sends the answer at the engine's pace; stops when its reader goes away.

    Not Starlette's StreamingResponse: a generator that is cancelled between two of its chunks
    ends whenever it is collected, and the counts must be right at once.
    """

    def __init__(
        self, engine: Engine, answer: Answer, prompt: Sequence[str], *, stream: bool
    ) -> None:
        super().__init__()
        self._engine = engine
        self._answer = answer
        self._prompt = prompt
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            if self._stream:
                await self._send_stream(send)
            else:
                await self._send_whole(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _send_stream(self, send: Send) -> None:
        headers = {
            "content-type": self._answer.media_type,
            "cache-control": "no-cache",
            **self._engine.headers,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        with self._engine.stats.serving():
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            started = await self._read_prompt()
            for index in range(len(self._answer.pieces)):
                await self._wait_for_token(started, index)
                chunk = self._answer.chunk(index)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._engine.keep(self._answer.model, self._prompt, self._answer.pieces)
        # Counted before its last bytes: who has read [DONE] may ask for the counts at once.
        await send({"type": "http.response.body", "body": self._answer.end()})

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._engine.stats.serving():
            started = await self._read_prompt()
            for index in range(len(self._answer.pieces)):
                await self._wait_for_token(started, index)
            self._engine.keep(self._answer.model, self._prompt, self._answer.pieces)
        response = JSONResponse(self._answer.whole(), headers=self._engine.headers)
        await response(scope, receive, send)

    async def _read_prompt(self) -> float:
        await self._engine.read(self._answer.model, self._prompt)
        return trio.current_time()

    async def _wait_for_token(self, started: float, index: int) -> None:
        options = self._engine.options
        rate = options.tokens_per_second
        due = started + options.first_token_delay + (index / rate if rate else 0.0)
        await trio.sleep_until(due)
        self._engine.stats.tokens += 1


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def serve_engine(
    options: EngineOptions,
    *,
    engine: Engine | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; ``task_status`` gets the bound (host, port).

    Pass ``engine`` to keep its counts at hand. Cancelling waits for clients that have stopped
    reading in the middle of an answer: close them first.

    Raises:
        OSError: the address can't be bound.
    """
    listener = _bind(options.host, options.port)
    bound = cast(tuple[str, int], listener.getsockname()[:2])
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "WARNING"
    config.backlog = 1024
    # Clients keep their connections for as long as a test or a benchmark runs.
    config.keep_alive_timeout = 75
    config.keep_alive_max_requests = 1_000_000
    app = cast(ASGIFramework, (engine or Engine(options)).app())
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, app, config)
        task_status.started(bound)


async def _serve(
    app: ASGIFramework, config: Config, *, task_status: trio.TaskStatus[list[str]]
) -> None:
    await serve(app, config, task_status=task_status, mode="asgi")


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _parse_options(argv: Sequence[str] | None) -> EngineOptions:
    default = EngineOptions()
    parser = argparse.ArgumentParser(
        prog="python -m meshnode.testing.engine",
        description="An OpenAI-compatible engine with no model, for demos and tests.",
    )
    parser.add_argument("--name", default=default.name)
    parser.add_argument("--model", action="append", help="may be given several times")
    parser.add_argument("--loaded", action="append", help="of them, those in memory; default all")
    parser.add_argument("--vram-gib", type=float, default=0.0, help="what it says it has")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="words per answer")
    parser.add_argument(
        "--tokens-per-second", type=float, default=default.tokens_per_second, help="0: all at once"
    )
    parser.add_argument("--first-token-delay", type=float, default=0.0, help="seconds")
    parser.add_argument(
        "--prefill-tokens-per-second",
        type=float,
        default=default.prefill_tokens_per_second,
        help="how fast it reads what its prefix cache lacks of a prompt; 0: at once",
    )
    parser.add_argument("--fail-with", type=int, default=0, help="HTTP status for every POST")
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    args = parser.parse_args(argv)
    return EngineOptions(
        name=args.name,
        models=tuple(args.model or default.models),
        loaded=tuple(args.loaded) if args.loaded else None,
        vram=int(args.vram_gib * GIB),
        tokens=args.tokens,
        tokens_per_second=args.tokens_per_second,
        first_token_delay=args.first_token_delay,
        prefill_tokens_per_second=args.prefill_tokens_per_second,
        fail_with=args.fail_with,
        host=args.host,
        port=args.port,
    )


async def _run(options: EngineOptions) -> None:
    """Serve until SIGINT or SIGTERM; one JSON line on stdout once clients can connect."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            host, port = await nursery.start(serve_engine, options)
            ready = {"event": "ready", "name": options.name, "host": host, "port": port}
            print(json.dumps({**ready, "pid": os.getpid()}), flush=True)
            async for _ in signals:
                # Hypercorn shields its writes from cancellation, so one client that has stopped
                # reading would keep this process for good.
                last_resort = threading.Timer(SHUTDOWN_LIMIT, os._exit, [0])
                last_resort.daemon = True
                last_resort.start()
                nursery.cancel_scope.cancel()
                break


def main(argv: Sequence[str] | None = None) -> int:
    """Run one engine as a process of its own."""
    options = _parse_options(argv)
    status = 0
    try:
        trio.run(_run, options)
    except* OSError as group:
        reason = group.exceptions[0]
        print(f"can't serve on {options.host}:{options.port}: {reason}", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
