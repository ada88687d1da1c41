"""Values that only make sense together, and within bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshnode.config.settings import Config
from meshnode.errors import ConfigError, TokenInvalid
from meshnode.values import MAX_EXPOSED, ExposedService

# What each setting may be, and in what unit.
_BOUNDS: Mapping[str, tuple[float, float, str]] = {
    # Announcing faster than once a second would make GossipSub's own counter outrun its clock.
    "announce_interval": (1, 1800, "s"),
    # Readers bound an announced window to these, so a node that says otherwise would be misread.
    "online_window": (10, 3600, "s"),
    # A day: longer than any answer takes; a node that is to go must go some time.
    "drain_grace": (0, 86_400, "s"),
    # A prompt's first token takes seconds on any engine; nobody waits for one longer than a day.
    "first_byte_timeout": (1, 86_400, "s"),
    # A prompt's worth of memory and two descriptors for each; and nobody waits for an hour.
    "queue_length": (0, 10_000, "requests"),
    "queue_timeout": (0.1, 3600, "s"),
}


def check_together(config: Config) -> None:
    """Check what only makes sense together.

    Raises:
        ConfigError: two settings contradict each other; the text names both sources.
        TokenInvalid: there is no token, and the mesh was not said to be open.
    """
    _check_bounds(config)
    _check_entry(config)
    _check_belonging(config)
    _check_exposed(config)
    if not config.api.is_loopback and config.api_key is None:
        raise ConfigError(
            f"api={config.api} from {config.sources['api']} listens beyond loopback without a key; "
            "set api_key_file, or listen on 127.0.0.1"
        )


def _check_bounds(config: Config) -> None:
    for key, (least, most, unit) in _BOUNDS.items():
        value: float = getattr(config, key)
        if not least <= value <= most:
            raise ConfigError(
                f"{key}={value:g} {unit} from {config.sources[key]} is out of bounds; "
                f"set it to {least:g} to {most:g} {unit}"
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
