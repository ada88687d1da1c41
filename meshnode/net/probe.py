"""One look at a service of this host: what it is, whether it is well, what it can serve."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from meshnode.core.engines import (
    Catalogue,
    has_status,
    parse_gauges,
    parse_ollama_models,
    parse_openai_models,
    parse_slots,
)
from meshnode.errors import PeerUnreachable, ProbeFailed
from meshnode.net.http_get import HttpAnswer, NotHttp, http_get
from meshnode.values import HealthCheck, HostPort

# An engine at work answers late, but a look must end before the next one is due to matter.
PROBE_TIMEOUT = 2.5  # seconds, for each request of a look
# A catalogue of a thousand models, or vLLM's metrics with some histograms, has 500 KB.
_MAX_BODY = 1024 * 1024
# Looks at a service of which nothing could be read, before it is taken for a plain TCP service:
# who speaks no HTTP should not be bothered with it for ever.
_MAX_GUESSES = 3

_VLLM_LOAD = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_LLAMACPP_LOAD = ("llamacpp:requests_processing", "llamacpp:requests_deferred")

Get = Callable[[str], Awaitable[HttpAnswer]]


@dataclass(frozen=True, slots=True)
class EngineView:
    """What the last good look showed."""

    check: HealthCheck  # what it was recognised as, or told to be
    catalogue: Catalogue = field(default_factory=Catalogue)
    load: int | None = None  # requests that the engine says it holds; None: it does not tell


class Probe:
    """Looks at one service, and remembers what it is.

    Args:
        address: where it listens.
        check: how to look; ``auto`` finds out, anew after each time that it was down.
    """

    def __init__(self, address: HostPort, check: HealthCheck) -> None:
        self._address = address
        self._told = check
        self._known = check
        self._guesses = 0

    @property
    def speaks_http(self) -> bool:
        """Whether a connection that is accepted says less than an answer would."""
        return self._known.kind not in ("tcp", "off", "auto")

    def forget(self) -> None:
        """Recognise it anew at the next look: what comes back may be something else."""
        self._known = self._told
        self._guesses = 0

    async def look(self) -> EngineView:
        """Return what the service is and has.

        Raises:
            ProbeFailed: it is not well, or late, or unreadable.
        """
        if self._known.kind == "auto":
            self._known = await self._recognise()
        if self._known.kind == "auto":
            return EngineView(HealthCheck("tcp"))  # it accepts; what it is, a later look may tell
        return await self._look_as(self._known)

    async def _look_as(self, check: HealthCheck) -> EngineView:
        match check.kind:
            case "http":
                _good(await self._get(check.path), check.path)
                return EngineView(check)
            case "ollama":
                return await self._ollama(check)
            case "openai":
                return await self._openai(check)
            case "vllm":
                return await self._vllm(check)
            case "llamacpp":
                return await self._llamacpp(check)
        return EngineView(check)

    async def _get(self, path: str) -> HttpAnswer:
        try:
            return await http_get(self._address, path, timeout=PROBE_TIMEOUT, max_bytes=_MAX_BODY)
        except ProbeFailed as exc:
            if isinstance(exc.__cause__, PeerUnreachable) and exc.is_certain:
                self.forget()  # its process is gone; the next one may be another engine
            raise

    async def _recognise(self) -> HealthCheck:
        try:
            return await self._recognise_http()
        except NotHttp:
            return HealthCheck("tcp")
        except ProbeFailed as exc:
            if exc.is_certain:
                raise
            self._guesses += 1
            return HealthCheck("tcp" if self._guesses >= _MAX_GUESSES else "auto")

    async def _recognise_http(self) -> HealthCheck:
        models = await self._get("/v1/models")
        if models.status >= 500:
            # llama.cpp says so while it loads its model.
            _good(models, "/v1/models")
        if models.status == 200 and (known := _by_models(models.body)) is not None:
            if known.kind == "openai" and await self._is_ollama():
                return HealthCheck("ollama")
            return known
        if await self._is_ollama():
            return HealthCheck("ollama")
        health = await self._get("/health")
        return HealthCheck("http", "/health") if health.status == 200 else HealthCheck("tcp")

    async def _is_ollama(self) -> bool:
        answer = await self._get("/api/ps")
        try:
            parse_ollama_models(answer.body, "/api/ps")
        except ProbeFailed:
            return False
        return answer.status == 200

    async def _ollama(self, check: HealthCheck) -> EngineView:
        everything = parse_ollama_models(
            _good(await self._get("/api/tags"), "/api/tags"), "/api/tags"
        )
        running = parse_ollama_models(_good(await self._get("/api/ps"), "/api/ps"), "/api/ps")
        return EngineView(check, _with_loaded(everything, running.models))

    async def _openai(self, check: HealthCheck) -> EngineView:
        answer = await self._get("/v1/models")
        # It wants a key that only clients have: it is well, and its models stay unknown.
        if answer.status in (401, 403):
            return EngineView(check)
        return EngineView(check, _listed(_good(answer, "/v1/models")))

    async def _vllm(self, check: HealthCheck) -> EngineView:
        _good(await self._get("/health"), "/health")
        view = await self._openai(check)
        return EngineView(check, view.catalogue, await self._gauges(_VLLM_LOAD))

    async def _llamacpp(self, check: HealthCheck) -> EngineView:
        _good(await self._get("/health"), "/health")
        answer = await self._get("/v1/models")
        if answer.status in (401, 403):
            return EngineView(check, load=await self._llamacpp_load())
        catalogue = _listed(_good(answer, "/v1/models"))
        return EngineView(check, catalogue, await self._llamacpp_load())

    async def _llamacpp_load(self) -> int | None:
        """Ask for the slots, which may be switched off, and then for the metrics."""
        try:
            slots = await self._get("/slots")
            if slots.status == 200:
                return parse_slots(slots.body)
        except ProbeFailed:
            return None
        return await self._gauges(_LLAMACPP_LOAD)

    async def _gauges(self, names: tuple[str, ...]) -> int | None:
        """Return the engine's own count; None where it keeps none, which is no fault."""
        try:
            answer = await self._get("/metrics")
        except ProbeFailed:
            return None
        return parse_gauges(answer.body, names) if answer.status == 200 else None


def _by_models(body: bytes) -> HealthCheck | None:
    """Return the engine that lists its models like this; None if it is no such list."""
    try:
        owners = parse_openai_models(body).owners
    except ProbeFailed:
        return None
    if "vllm" in owners:
        return HealthCheck("vllm")
    return HealthCheck("llamacpp" if "llamacpp" in owners else "openai")


def _listed(body: bytes) -> Catalogue:
    """Return the models of ``GET /v1/models``; loaded are all, unless it tells which.

    Most of those who don't tell (vLLM, TGI, llama.cpp without its router) load what they serve
    when they start. To take the others for cold would send everything past them.
    """
    catalogue = parse_openai_models(body)
    return catalogue if has_status(body) else _with_loaded(catalogue, catalogue.models)


def _with_loaded(catalogue: Catalogue, loaded: tuple[str, ...]) -> Catalogue:
    return replace(catalogue, loaded=tuple(m for m in catalogue.models if m in loaded))


def _good(answer: HttpAnswer, path: str) -> bytes:
    """Return the body of an answer that says all is well.

    Raises:
        ProbeFailed: the service itself says that it is not.
    """
    if answer.status >= 400:
        raise ProbeFailed(f"GET {path} answers {answer.status}", is_certain=True)
    return answer.body
