"""The words settings are written in: sizes, durations, HOST:PORT, multiaddrs, names.

Each ``parse_*`` takes what a person wrote and returns a value, or raises ``ValueError`` with a
text that completes the sentence "proxy=8x from flag --proxy …". Where it came from is added by
``config``, which alone knows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# uint64 carries VRAM on the wire, but nobody has more than 16 TiB: readers take more as unknown.
MAX_VRAM = 16 * 2**40
MAX_NAME = 64  # characters, as on the wire
MAX_EXPOSED = 32  # services, as in one announcement

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# base58 of a hashed or an inlined public key
_PEER_ID = re.compile(r"(12D3KooW|16Uiu2HA|Qm)[1-9A-HJ-NP-Za-km-z]{40,60}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9.:\[\]_-]+|null")
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
_NETWORK = re.compile(r"[a-z0-9-]{1,32}")
# A path of a request: visible ASCII, so that nothing in it can end the request line.
_PATH = re.compile(r"/[!-~]{0,255}")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class HostPort:
    """A TCP address to listen on or to connect to; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; of names, localhost alone is taken to be."""
        if self.host == "localhost":
            return True
        import ipaddress

        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A socket in the file system: whoever may open the file may speak to it."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return True


ApiAddress = HostPort | UnixSocket


@dataclass(frozen=True, slots=True)
class ExposedService:
    """A local server that members may reach by ``name``."""

    name: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.name}={HostPort(self.host, self.port)}"


HealthKind = Literal["auto", "tcp", "http", "ollama", "openai", "llamacpp", "vllm", "off"]
_HEALTH_KINDS = ("auto", "tcp", "ollama", "openai", "llamacpp", "vllm", "off")


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How a service is asked whether it is well; ``auto`` finds out what it is."""

    kind: HealthKind = "auto"
    path: str = ""  # of "http" alone

    def __str__(self) -> str:
        return f"http:{self.path}" if self.kind == "http" else self.kind


AUTO = HealthCheck()


def parse_size(text: str) -> int:
    """Return bytes: ``24GiB`` and ``24Gi`` are powers of 1024, ``24GB`` and ``24G`` of 1000."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError("is no size; write it like 24GiB, 24GB or 24000000000 (bytes)")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()])
    if size > MAX_VRAM:
        raise ValueError("is more than 16 TiB, which no host has; check the unit")
    return size


def format_size(size: int | None) -> str:
    """Return bytes as people read them: ``23.4 GiB``; ``-`` for unknown."""
    if size is None:
        return "-"
    value, units = float(size), iter(("B", "KiB", "MiB", "GiB"))
    for unit in units:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_duration(text: str) -> float:
    """Return seconds: ``10``, ``10s``, ``2m``, ``500ms``."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError("is no duration; write seconds, like 10 or 2.5, or with a unit, like 2m")
    return float(match[1]) * _SECONDS[match[2]]


def parse_count(text: str) -> int:
    """Return a whole number, 0 or more."""
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise ValueError("is no whole number; write one like 256")
    return int(text)


def parse_endpoint(text: str) -> str:
    """Return the base URL of a collector, without user, query and fragment."""
    url = text.strip()
    match = re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url)
    if match is None:
        raise ValueError("is no endpoint; write it like http://127.0.0.1:4318")
    return url


def parse_bool(text: str) -> bool:
    """Return the truth of 1/0, true/false, yes/no, on/off."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("is neither true nor false")


def parse_host_port(text: str, *, listening: bool = True) -> HostPort:
    """Return ``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` or ``PORT``; the host defaults to loopback.

    ``listening`` allows port 0, which asks the system for a free one.
    """
    text = text.strip()
    host, _, port_text = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("has more than one colon; write an IPv6 address as [::1]:8080")
    if not port_text.isascii() or not port_text.isdigit() or int(port_text) > 65535:
        raise ValueError("is no HOST:PORT; write it like 127.0.0.1:8080")
    if not listening and int(port_text) == 0:
        raise ValueError("has port 0, where nothing can be reached")
    if any(character.isspace() or character in "/@" for character in host):
        raise ValueError("is no HOST:PORT; leave off http:// and any path")
    return HostPort(host or "127.0.0.1", int(port_text))


def parse_api_address(text: str, *, listening: bool = True) -> ApiAddress:
    """Return ``HOST:PORT`` or ``unix:/PATH``."""
    kind, separator, path = text.strip().partition(":")
    if kind != "unix" or not separator:
        return parse_host_port(text, listening=listening)
    # 107 bytes is what Linux keeps of a socket's path; macOS, 103.
    if not path.startswith("/") or "\0" in path or len(path.encode()) > 103:
        raise ValueError("is no socket; write it like unix:/run/meshnode/api.sock (103 bytes)")
    return UnixSocket(path)


def parse_host_name(text: str) -> str:
    """Return a name that a Host header may carry, in lower case, without a port."""
    name = text.strip().lower().rstrip(".")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
        raise ValueError("is no host name; write it like gpu1.lan, without http:// and port")
    return name


def parse_exposed_service(text: str) -> ExposedService:
    """Return ``NAME=HOST:PORT``."""
    name, separator, address = text.strip().partition("=")
    if not separator:
        raise ValueError("is no NAME=HOST:PORT; write it like ollama=127.0.0.1:11434")
    target = parse_host_port(address, listening=False)
    return ExposedService(parse_service_name(name), target.host, target.port)


def parse_health(text: str) -> tuple[str, HealthCheck]:
    """Return the service of ``NAME=KIND`` and how it is probed."""
    name, separator, how = text.strip().partition("=")
    kinds = ", ".join(_HEALTH_KINDS)
    if not separator:
        raise ValueError(f"is no NAME=KIND; write it like llm=ollama; kinds: {kinds}, http:/path")
    return parse_service_name(name), _health_check(how, kinds)


def _health_check(how: str, kinds: str) -> HealthCheck:
    for kind in _HEALTH_KINDS:
        if how == kind:
            return HealthCheck(kind)  # type: ignore[arg-type]
    scheme, _, path = how.partition(":")
    if scheme == "http" and _PATH.fullmatch(path):
        return HealthCheck("http", path)
    raise ValueError(f"is no kind of health check; write one of {kinds}, or http:/path")


def parse_max_in_flight(text: str) -> tuple[str, int]:
    """Return the service of ``NAME=N`` and how many requests it takes at once; 0 = no limit."""
    name, separator, number = text.strip().partition("=")
    if not separator or not number.isascii() or not number.isdigit() or int(number) > 1_000_000:
        raise ValueError("is no NAME=N; write it like llm=8, with N up to 1000000 (0 = no limit)")
    return parse_service_name(name), int(number)


def parse_client_count(text: str) -> int:
    """Return how many clients may be connected; each takes a descriptor or two."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise ValueError("is no number of clients; write 1 to 1000000")
    return int(text)


def parse_service_name(text: str) -> str:
    """Return the name of a service: letters, digits, ``.``, ``_`` and ``-``; at most 64."""
    if not _SERVICE.fullmatch(text.strip()):
        raise ValueError("is no service name; use 1 to 64 letters, digits, dots, _ and -")
    return text.strip()


def parse_network(text: str) -> str:
    """Return the name of a network, which is part of every topic."""
    if not _NETWORK.fullmatch(text.strip()):
        raise ValueError("is no network name; use 1 to 32 of a-z, 0-9 and -")
    return text.strip()


def parse_node_name(text: str) -> str:
    """Return a node's name for people: printable, at most 64 characters."""
    name = text.strip()
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError("is no node name; use 1 to 64 printable characters")
    return name


def parse_proxy_mode(text: str) -> Literal["http", "tcp"]:
    """Return how the proxy treats connections."""
    match text:
        case "http" | "tcp":
            return text
    raise ValueError("is no proxy mode; write http, or tcp for anything that is not HTTP")


def parse_origin(text: str) -> str:
    """Return the origin of a page, as browsers send it; ``*`` is every page."""
    origin = text.strip().rstrip("/")
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError("is no origin; write it like https://chat.example, or * for every page")
    return origin


def parse_affinity(text: str) -> Literal["off", "prefix", "session"]:
    """Return what makes a peer warm for a request."""
    match text:
        case "off" | "prefix" | "session":
            return text
    raise ValueError("is no affinity; write off, prefix or session")


def parse_header_name(text: str) -> str:
    """Return the name of a header in lower case."""
    if not _HEADER.fullmatch(text.strip()):
        raise ValueError("is no name of a header; write one like x-session-id")
    return text.strip().lower()


def parse_policy(text: str) -> Literal["vram", "rotate", "random"]:
    """Return the routing policy."""
    match text:
        case "vram" | "rotate" | "random":
            return text
    raise ValueError("is no policy; write vram, rotate or random")


def parse_log_level(text: str) -> Literal["debug", "info", "warning", "error"]:
    """Return the least severe level that is logged."""
    match text.lower():
        case "debug" | "info" | "warning" | "error" as level:
            return level
    raise ValueError("is no log level; write debug, info, warning or error")


def parse_log_format(text: str) -> Literal["pretty", "json"]:
    """Return for whom log lines are written."""
    match text.lower():
        case "pretty" | "json" as form:
            return form
    raise ValueError("is no log format; write pretty or json")


def parse_multiaddr(text: str) -> str:
    """Return a multiaddr that this program can speak: an IP address or DNS name, then TCP.

    ``/p2p/PEER_ID`` may follow, and after it ``/p2p-circuit/p2p/PEER_ID``: the first peer is then
    the relay through which the second is reached.
    """
    # Imported here because it takes longer than a whole --help may.
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error

    text = text.strip()
    example = "/ip4/192.0.2.7/tcp/4201"
    if not text.startswith("/"):
        raise ValueError(f"is no multiaddr; it begins with a slash, like {example}")
    try:
        addr = Multiaddr(text)
        names = [protocol.name for protocol in addr.protocols()]
    except (Error, ValueError) as exc:
        reason = str(exc).split(": ", 1)[-1].split(" (string:")[0]
        raise ValueError(f"is no multiaddr ({reason}); write it like {example}") from exc
    if names[:2] not in ([kind, "tcp"] for kind in ("ip4", "ip6", "dns", "dns4", "dns6")):
        raise ValueError(
            f"names no TCP address, the only kind spoken here; write it like {example}"
        )
    if names[2:] not in ([], ["p2p"], ["p2p", "p2p-circuit", "p2p"]):
        odd = next((name for name in names[2:] if name not in ("p2p", "p2p-circuit")), None)
        raise ValueError(
            f"goes on after the TCP port with /{odd or '/'.join(names[2:])}; only /p2p/PEER_ID may "
            "follow, and after a relay's /p2p-circuit/p2p/PEER_ID"
        )
    return text


def parse_bootstrap(text: str) -> str:
    """Return a multiaddr that ends in ``/p2p/PEER_ID``."""
    addr = parse_multiaddr(text)
    if "/p2p/" not in addr:
        raise ValueError(
            "lacks the peer ID at its end; copy the whole line that the other node prints, "
            f"like {addr}/p2p/12D3KooW…"
        )
    return addr


def parse_listen(text: str) -> str:
    """Return a multiaddr of this host to listen on; without a peer ID, and no DNS name."""
    addr = parse_announce_addr(text)
    if addr.startswith("/dns"):
        raise ValueError("is a name; listen on an IP address, like /ip4/0.0.0.0/tcp/4201")
    return addr


def parse_peer_list(text: str) -> frozenset[str]:
    """Return the peer IDs of a file with one a line; what follows a # is a note."""
    found = set()
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        if not _PEER_ID.fullmatch(word):
            raise ValueError(
                f"has no peer ID in line {number}; write one a line, like 12D3KooW…, as "
                "meshnode peers --json prints them"
            )
        found.add(word)
    return frozenset(found)


def parse_announce_addr(text: str) -> str:
    """Return a multiaddr under which others reach this host, without a peer ID."""
    addr = parse_multiaddr(text)
    if "/p2p/" in addr:
        raise ValueError("ends in a peer ID; leave it off, the node adds its own")
    return addr


def plain_table(raw: object) -> Mapping[str, object] | None:
    """Return ``raw`` if it is a table with text keys, else None."""
    if isinstance(raw, Mapping) and all(isinstance(key, str) for key in raw):
        return raw
    return None
