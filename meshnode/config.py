"""One frozen Config, resolved once: flag > environment > file > default.

Everything here is pure: what stands in flags, environment and file comes in as mappings, and
files are read through a function that the caller hands in. Every error names the value, the
source it came from, and what to write instead.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NoReturn, TypeVar

from meshnode.errors import ConfigError, TokenInvalid
from meshnode.values import (
    MAX_EXPOSED,
    MAX_NAME,
    ApiAddress,
    ExposedService,
    HealthCheck,
    HostPort,
    parse_affinity,
    parse_announce_addr,
    parse_api_address,
    parse_bool,
    parse_bootstrap,
    parse_client_count,
    parse_count,
    parse_duration,
    parse_endpoint,
    parse_exposed_service,
    parse_header_name,
    parse_health,
    parse_host_name,
    parse_host_port,
    parse_listen,
    parse_log_format,
    parse_log_level,
    parse_max_in_flight,
    parse_network,
    parse_node_name,
    parse_origin,
    parse_peer_list,
    parse_policy,
    parse_proxy_mode,
    parse_service_name,
    parse_size,
    plain_table,
)

__all__ = ["Config", "ExposedService", "HostPort", "resolve"]

PREFIX = "MESHNODE_"
DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/4201"
DEFAULT_API: ApiAddress = HostPort("127.0.0.1", 4280)
DEFAULT_PROXY = HostPort("127.0.0.1", 8080)
DEFAULT_OPEN_NETWORK = "open"
# Readers bound an announced window to these, so a node that says otherwise would be misread.
ONLINE_WINDOW_BOUNDS = (10.0, 3600.0)
# Announcing faster than once a second would make GossipSub's own counter outrun its clock.
ANNOUNCE_INTERVAL_BOUNDS = (1.0, 1800.0)
# A day: longer than any answer takes; a node that is to go must go some time.
DRAIN_GRACE_BOUNDS = (0.0, 86_400.0)

# A prompt's worth of memory and two descriptors for each; and nobody waits for an hour.
QUEUE_LENGTH_BOUNDS = (0, 10_000)
QUEUE_TIMEOUT_BOUNDS = (0.1, 3600.0)
# A prompt's first token takes seconds on any engine; nobody waits for one longer than a day.
FIRST_BYTE_BOUNDS = (1.0, 86_400.0)

# Settings that name where other settings stand; they are no fields of Config.
_POINTERS = frozenset({"config"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of one node. ``sources`` tells for each field where its value came from."""

    state_dir: str
    name: str
    token_texts: tuple[str, ...] = field(default=(), repr=False)  # the first is the newest
    token_file: str | None = None
    open: bool = False
    network: str | None = None  # only with ``open``; a token brings its own
    allow_peers_file: str | None = None
    allowed_peers: frozenset[str] | None = None  # peer IDs; None lets in whoever has the token
    block_peers_file: str | None = None
    blocked_peers: frozenset[str] = frozenset()
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    announce_addr: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    relay: bool = False
    expose: tuple[ExposedService, ...] = ()
    health: tuple[tuple[str, HealthCheck], ...] = ()  # by service; "auto" where none is named
    max_in_flight: tuple[tuple[str, int], ...] = ()  # by service; no limit where none is named
    drain_grace: float = 30.0  # seconds
    max_clients: int = 4096  # connected to the proxy at a time
    max_clients_per_ip: int = 1024  # from one address that is not this host's
    proxy: HostPort | None = None
    proxy_mode: Literal["http", "tcp"] = "http"
    first_byte_timeout: float = 300.0  # seconds for an engine to begin its answer
    cors_origin: tuple[str, ...] = ()  # whose pages may use the proxy
    response_headers: bool = True  # x-meshnode-peer and x-meshnode-reason
    affinity: Literal["off", "prefix", "session"] = "prefix"  # what makes a peer warm
    session_header: str = "x-session-id"  # where clients name their sessions; lower case
    client_keys_file: str | None = None
    # The parsed file: one table for each client that may use the proxy; None asks for no key.
    client_keys: Mapping[str, object] | None = field(default=None, repr=False)
    open_proxy: bool = False  # beyond loopback without keys
    service: str | None = None
    target: str | None = None
    policy: Literal["vram", "rotate", "random"] = "vram"
    vram: int | None = None  # bytes to pretend
    api: ApiAddress = DEFAULT_API
    api_host_allow: tuple[str, ...] = ()  # names under which the API may be asked for
    api_key_file: str | None = None
    api_key: str | None = field(default=None, repr=False)
    otlp_endpoint: str | None = None  # the base URL of a collector; None: no traces
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["pretty", "json"] = "pretty"
    announce_interval: float = 10.0  # seconds
    online_window: float = 40.0  # seconds
    queue_length: int = 256  # requests that may wait while every peer is full
    queue_timeout: float = 30.0  # seconds
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    warnings: tuple[str, ...] = ()  # allowed, but worth a line in the log

    @property
    def token_text(self) -> str | None:
        """The token to join with; None in an open mesh."""
        return self.token_texts[0] if self.token_texts else None


@dataclass(frozen=True, slots=True)
class _Said:
    """One value as it was written, and where."""

    value: object
    source: str


def resolve(
    flags: Mapping[str, object],
    env: Mapping[str, str],
    file: Mapping[str, object] | None = None,
    *,
    file_path: str = "",
    host_name: str = "meshnode",
    platform_state_dir: str = "",
    read_text: Callable[[str], str] | None = None,
    must_hold: bool = True,
) -> Config:
    """Return the Config that these sources make together.

    ``flags`` maps field names to what stood on the command line; None means not given. ``env`` is
    the whole environment. ``file`` is the parsed TOML file at ``file_path``. ``read_text`` reads
    the token and key files, and may raise OSError or UnicodeDecodeError. Without ``must_hold``
    each value is read, but not whether they make sense together (see ``check_together``).

    Raises:
        ConfigError: a value, a key or a combination is wrong; the text names its source.
        TokenInvalid: there is no token, and the mesh was not said to be open.
    """
    said = _gather(flags, env, file or {}, file_path)
    if "state_dir" not in said and env.get("STATE_DIRECTORY"):
        # systemd lists several with colons when the unit names several; the first is ours.
        first = env["STATE_DIRECTORY"].split(":")[0]
        said["state_dir"] = _Said(first, "environment STATE_DIRECTORY")
    read = _Reader(said)
    config = Config(
        state_dir=read.one("state_dir", _path, platform_state_dir or ".meshnode"),
        name=read.one("name", parse_node_name, host_name[:MAX_NAME] or "meshnode"),
        token_texts=_token_texts(read, read_text),
        token_file=read.optional("token_file", _path),
        open=read.switch("open", False),
        network=read.optional("network", parse_network),
        allow_peers_file=read.optional("allow_peers_file", _path),
        allowed_peers=_peer_list(read, "allow_peers_file", read_text),
        block_peers_file=read.optional("block_peers_file", _path),
        blocked_peers=_peer_list(read, "block_peers_file", read_text) or frozenset(),
        listen=read.many("listen", parse_listen, (DEFAULT_LISTEN,)),
        announce_addr=read.many("announce_addr", parse_announce_addr),
        bootstrap=read.many("bootstrap", parse_bootstrap),
        mdns=read.switch("mdns", True),
        relay=read.switch("relay", False),
        expose=read.many("expose", parse_exposed_service),
        health=read.many("health", parse_health),
        max_in_flight=read.many("max_in_flight", parse_max_in_flight),
        drain_grace=read.one("drain_grace", parse_duration, 30.0),
        max_clients=read.one("max_clients", parse_client_count, 4096),
        max_clients_per_ip=read.one("max_clients_per_ip", parse_client_count, 1024),
        proxy=read.optional("proxy", _proxy),
        proxy_mode=read.one("proxy_mode", parse_proxy_mode, "http"),
        first_byte_timeout=read.one("first_byte_timeout", parse_duration, 300.0),
        cors_origin=read.many("cors_origin", parse_origin),
        response_headers=read.switch("response_headers", True),
        affinity=read.one("affinity", parse_affinity, "prefix"),
        session_header=read.one("session_header", parse_header_name, "x-session-id"),
        client_keys_file=read.optional("client_keys_file", _path),
        client_keys=_client_keys(read, read_text),
        open_proxy=read.switch("open_proxy", False),
        service=read.optional("service", parse_service_name),
        target=read.optional("target", parse_node_name),
        policy=read.one("policy", parse_policy, "vram"),
        vram=read.optional("vram", parse_size),
        api=read.one("api", parse_api_address, DEFAULT_API),
        api_host_allow=read.many("api_host_allow", parse_host_name),
        api_key_file=read.optional("api_key_file", _path),
        api_key=_api_key(read, read_text),
        otlp_endpoint=read.optional("otlp_endpoint", parse_endpoint),
        log_level=read.one("log_level", parse_log_level, "info"),
        log_format=read.one("log_format", parse_log_format, "pretty"),
        announce_interval=read.one("announce_interval", parse_duration, 10.0),
        online_window=read.one("online_window", parse_duration, 40.0),
        queue_length=read.one("queue_length", parse_count, 256),
        queue_timeout=read.one("queue_timeout", parse_duration, 30.0),
        sources=read.sources,
        warnings=_warnings(read),
    )
    if must_hold:
        check_together(config)
    return config


def field_names() -> tuple[str, ...]:
    """Return every setting that flags, environment and file may hold."""
    derived = {
        *("token_texts", "allowed_peers", "blocked_peers", "api_key", "client_keys"),
        *("sources", "warnings"),
    }
    return tuple(entry.name for entry in fields(Config) if entry.name not in derived)


# --- gathering: who said what, the strongest source last to be overruled ---


def _gather(
    flags: Mapping[str, object],
    env: Mapping[str, str],
    file: Mapping[str, object],
    file_path: str,
) -> dict[str, _Said]:
    known = field_names()
    said: dict[str, _Said] = {}
    for key, value in file.items():
        if key == "token":
            raise ConfigError(
                f"token in file {file_path} is not read, as such files are seldom kept private; "
                "put it in a file of its own (mode 600) and set token_file to its path"
            )
        if key not in known:
            raise _unknown(key, f"file {file_path}", known, str)
        said[key] = _Said(value, f"file {file_path}")
    from_environment = _from_environment(env, known)
    if "token" in from_environment:
        said.pop("token_file", None)
    said.update(from_environment)
    for key, value in flags.items():
        if key not in known:
            raise _unknown(key, "the command line", known, _flag)
        if value is not None and value != () and value != []:
            said[key] = _Said(value, f"flag {_flag(key)}")
            if key == "token_file":
                said.pop("token", None)
    return said


def _from_environment(env: Mapping[str, str], known: Sequence[str]) -> dict[str, _Said]:
    said: dict[str, _Said] = {}
    for variable, text in env.items():
        if not variable.startswith(PREFIX):
            continue
        key = variable.removeprefix(PREFIX).lower()
        if key not in known and key != "token" and key not in _POINTERS:
            raise _unknown(variable, "the environment", (*known, "token", "config"), _variable)
        # An empty variable is how a unit file or a shell says "not set".
        if text.strip() and key not in _POINTERS:
            said[key] = _Said(text, f"environment {variable}")
    if "token" in said and "token_file" in said:
        raise ConfigError(
            "MESHNODE_TOKEN and MESHNODE_TOKEN_FILE are both set in the environment, and only one "
            "can hold; unset one of them"
        )
    return said


def _unknown(
    name: str, source: str, known: Sequence[str], spell: Callable[[str], str]
) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, [spell(key) for key in known], n=1)
    advice = f"; did you mean {near[0]}?" if near else "; run meshnode up --help for the list"
    return ConfigError(f"unknown setting {name} in {source}{advice}")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _variable(key: str) -> str:
    return PREFIX + key.upper()


# --- reading: text to values, each error with its source ---


class _Reader:
    """Turns what was said into values and remembers the sources."""

    def __init__(self, said: Mapping[str, _Said]) -> None:
        self.said = said
        self.sources = dict.fromkeys(field_names(), "default")
        self.sources.update({key: entry.source for key, entry in said.items()})

    def one(self, key: str, parse: Callable[[str], T], default: T) -> T:
        entry = self.said.get(key)
        if entry is None:
            return default
        return self._parse(key, entry.value, parse)

    def optional(self, key: str, parse: Callable[[str], T | None]) -> T | None:
        return self.one(key, parse, None)

    def many(
        self, key: str, parse: Callable[[str], T], default: tuple[T, ...] = ()
    ) -> tuple[T, ...]:
        entry = self.said.get(key)
        if entry is None:
            return default
        return tuple(self._parse(key, item, parse) for item in _items(entry.value))

    def switch(self, key: str, default: bool) -> bool:
        return self.one(key, parse_bool, default)

    def fail(self, key: str, reason: str) -> NoReturn:
        raise ConfigError(f"{key}={self.shown(key)} from {self.sources[key]} {reason}")

    def _parse(self, key: str, raw: object, parse: Callable[[str], T]) -> T:
        try:
            return parse(_as_text(raw))
        except ValueError as exc:
            source = self.sources[key]
            raise ConfigError(f"{key}={_as_text(raw)} from {source} {exc}") from exc

    def shown(self, key: str) -> str:
        return ",".join(_as_text(item) for item in _items(self.said[key].value))


def _as_text(raw: object) -> str:
    if isinstance(raw, bool):
        return "true" if raw else "false"
    return str(raw)


def _items(raw: object) -> list[object]:
    """Split what may hold several values: a list, a TOML table of names, or text with commas."""
    if isinstance(raw, str):
        return [item for item in raw.replace(",", " ").split() if item]
    table = plain_table(raw)
    if table is not None:
        return [f"{key}={_as_text(value)}" for key, value in table.items()]
    if isinstance(raw, (list, tuple)):
        return list(raw)
    return [raw]


def _path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("is no path")
    return text


def _proxy(text: str) -> HostPort | None:
    if text.strip().lower() in ("true", "yes", "on"):
        return DEFAULT_PROXY
    if text.strip().lower() in ("false", "no", "off", "none"):
        return None
    return parse_host_port(text)


# --- secrets: from files and the environment only ---


def _token_texts(read: _Reader, read_text: Callable[[str], str] | None) -> tuple[str, ...]:
    direct = read.said.get("token")
    if direct is not None:
        return split_tokens(str(direct.value))
    entry = read.said.get("token_file")
    if entry is None:
        return ()
    texts = split_tokens(_read_text(read, "token_file", read_text))
    if not texts:
        read.fail("token_file", "holds no token; make one with: meshnode token new")
    return texts


def split_tokens(text: str) -> tuple[str, ...]:
    """Return the tokens in ``text``: several, so that a key can be rotated.

    Lines that begin with # are notes. A token that a mail program wrapped stays one: only its
    beginning reads mesh1.
    """
    texts: list[str] = []
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for word in " ".join(lines).split():
        if re.match(r"mesh\d", word) or not texts:
            texts.append(word)
        else:
            texts[-1] += word
    return tuple(texts)


def _peer_list(
    read: _Reader, key: str, read_text: Callable[[str], str] | None
) -> frozenset[str] | None:
    if key not in read.said:
        return None
    try:
        return parse_peer_list(_read_text(read, key, read_text))
    except ValueError as exc:
        read.fail(key, str(exc))


def _client_keys(
    read: _Reader, read_text: Callable[[str], str] | None
) -> Mapping[str, object] | None:
    if "client_keys_file" not in read.said:
        return None
    try:
        return tomllib.loads(_read_text(read, "client_keys_file", read_text))
    except tomllib.TOMLDecodeError as exc:
        # Without the parser's words: they could quote a key.
        position = re.search(r"line \d+", str(exc))
        where = f" ({position[0]})" if position else ""
        read.fail("client_keys_file", f'is no TOML{where}; write [name] and under it key = "…"')


def _api_key(read: _Reader, read_text: Callable[[str], str] | None) -> str | None:
    if "api_key_file" not in read.said:
        return None
    key = _read_text(read, "api_key_file", read_text).strip()
    # 16 characters is what stands between the network and the control API.
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        read.fail(
            "api_key_file",
            "must hold one line of at least 16 printable characters without blanks; "
            "make one with: openssl rand -hex 32",
        )
    return key


def _read_text(read: _Reader, key: str, read_text: Callable[[str], str] | None) -> str:
    if read_text is None:
        read.fail(key, "can't be read here")
    try:
        return read_text(_as_text(read.said[key].value))
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise ConfigError(
            f"{key}={read.shown(key)} from {read.sources[key]} can't be read: {reason}"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{key}={read.shown(key)} from {read.sources[key]} is not a text file"
        ) from exc


# --- values that only make sense together ---


def _warnings(read: _Reader) -> tuple[str, ...]:
    proxy = read.optional("proxy", _proxy)
    if proxy is None or proxy.is_loopback or "client_keys_file" in read.said:
        return ()
    return (
        f"proxy={proxy} from {read.sources['proxy']} listens beyond loopback: whoever reaches it "
        "uses the mesh as this node does",
    )


def check_together(config: Config) -> None:
    """Check what only makes sense together.

    Raises:
        ConfigError: two settings contradict each other; the text names both sources.
        TokenInvalid: there is no token, and the mesh was not said to be open.
    """
    _check_times(config)
    _check_entry(config)
    _check_queue(config)
    _check_belonging(config)
    _check_exposed(config)
    if not config.api.is_loopback and config.api_key is None:
        raise ConfigError(
            f"api={config.api} from {config.sources['api']} listens beyond loopback without a key; "
            "set api_key_file, or listen on 127.0.0.1"
        )


def _check_times(config: Config) -> None:
    for key, bounds in (
        ("announce_interval", ANNOUNCE_INTERVAL_BOUNDS),
        ("online_window", ONLINE_WINDOW_BOUNDS),
        ("drain_grace", DRAIN_GRACE_BOUNDS),
        ("first_byte_timeout", FIRST_BYTE_BOUNDS),
    ):
        value: float = getattr(config, key)
        if not bounds[0] <= value <= bounds[1]:
            raise ConfigError(
                f"{key}={value:g} s from {config.sources[key]} is out of bounds; "
                f"set it to {bounds[0]:g} to {bounds[1]:g} s"
            )
    if config.online_window < 2 * config.announce_interval:
        raise ConfigError(
            f"online_window={config.online_window:g} s from {config.sources['online_window']} is "
            f"below twice announce_interval={config.announce_interval:g} s from "
            f"{config.sources['announce_interval']}, so one lost announcement would drop a live "
            f"peer; set it to at least {2 * config.announce_interval:g} s"
        )


def _check_entry(config: Config) -> None:
    for key in ("service", "target"):
        value: str | None = getattr(config, key)
        if value is not None and config.proxy is None:
            raise ConfigError(
                f"{key}={value} from {config.sources[key]} says where the proxy sends requests, "
                "but there is no proxy; add --proxy"
            )
    if config.client_keys is not None and config.proxy_mode == "tcp":
        raise ConfigError(
            f"client_keys_file={config.client_keys_file} from "
            f"{config.sources['client_keys_file']} can't be asked for with proxy_mode=tcp from "
            f"{config.sources['proxy_mode']}, which does not read requests; leave one of them off"
        )
    proxy = config.proxy
    if (
        proxy is not None
        and not proxy.is_loopback
        and config.proxy_mode == "http"
        and config.client_keys is None
        and not config.open_proxy
    ):
        raise ConfigError(
            f"proxy={proxy} from {config.sources['proxy']} listens beyond loopback without keys, "
            "so whoever reaches it could use the mesh; name its clients with --client-keys-file, "
            "listen on 127.0.0.1, or say --open-proxy"
        )


def _check_queue(config: Config) -> None:
    for key, bounds, unit in (
        ("queue_length", QUEUE_LENGTH_BOUNDS, "requests"),
        ("queue_timeout", QUEUE_TIMEOUT_BOUNDS, "s"),
    ):
        value: float = getattr(config, key)
        if not bounds[0] <= value <= bounds[1]:
            raise ConfigError(
                f"{key}={value:g} {unit} from {config.sources[key]} is out of bounds; "
                f"set it to {bounds[0]:g} to {bounds[1]:g} {unit}"
            )


def _check_belonging(config: Config) -> None:
    token_source = config.sources.get("token", config.sources["token_file"])
    if config.open and config.token_texts:
        raise ConfigError(
            f"open from {config.sources['open']} and a token from {token_source} contradict each "
            "other: a mesh is open or private; leave one off"
        )
    if config.network is not None and not config.open:
        raise ConfigError(
            f"network={config.network} from {config.sources['network']} only has a meaning with "
            "--open; a token names its own network"
        )
    if not config.open and not config.token_texts:
        raise TokenInvalid(
            "no token, and a mesh is private by default; make one with: meshnode token new > "
            "mesh.token, then give every node: --token-file mesh.token (or say --open to let "
            "anybody in)"
        )


def _check_exposed(config: Config) -> None:
    if len(config.expose) > MAX_EXPOSED:
        raise ConfigError(
            f"expose from {config.sources['expose']} names {len(config.expose)} services, but an "
            f"announcement holds {MAX_EXPOSED}; start another node for the rest"
        )
    seen: dict[str, ExposedService] = {}
    for service in config.expose:
        other = seen.setdefault(service.name, service)
        if other is not service:
            raise ConfigError(
                f"expose={service} from {config.sources['expose']} uses the name of {other}; "
                "give each service its own name"
            )
    _check_of_exposed(config, "health", [name for name, _ in config.health])
    _check_of_exposed(config, "max_in_flight", [name for name, _ in config.max_in_flight])


def _check_of_exposed(config: Config, key: str, names: Sequence[str]) -> None:
    """Check a setting that says something once of each of some exposed services."""
    exposed = [service.name for service in config.expose]
    for place, name in enumerate(names):
        if name not in exposed:
            known = f"exposed are: {', '.join(exposed)}" if exposed else "nothing is exposed"
            raise ConfigError(
                f"{key} from {config.sources[key]} names the service {name}, which is not exposed; "
                f"{known}"
            )
        if name in names[:place]:
            raise ConfigError(
                f"{key} from {config.sources[key]} names the service {name} twice; leave one off"
            )
