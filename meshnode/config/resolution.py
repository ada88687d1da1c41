"""Every source put together: flag > environment > file > default."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshnode.config.named_files import api_key, client_keys, peer_list, token_texts
from meshnode.config.reading import Reader
from meshnode.config.settings import DEFAULT_PROXY, Config
from meshnode.config.sources import Said, gather
from meshnode.config.together import check_together
from meshnode.values import (
    MAX_NAME,
    HostPort,
    parse_affinity,
    parse_announce_addr,
    parse_api_address,
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
    parse_policy,
    parse_proxy_mode,
    parse_service_name,
    parse_size,
)


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
    said = gather(flags, env, file or {}, file_path)
    if "state_dir" not in said and env.get("STATE_DIRECTORY"):
        # systemd lists several with colons when the unit names several; the first is ours.
        first = env["STATE_DIRECTORY"].split(":")[0]
        said["state_dir"] = Said(first, "environment STATE_DIRECTORY")
    read = Reader(said)
    unset = Config(
        state_dir=platform_state_dir or ".meshnode", name=host_name[:MAX_NAME] or "meshnode"
    )
    config = Config(
        state_dir=read.one("state_dir", _path, unset.state_dir),
        name=read.one("name", parse_node_name, unset.name),
        token_texts=token_texts(read, read_text),
        token_file=read.optional("token_file", _path),
        open=read.switch("open", unset.open),
        network=read.optional("network", parse_network),
        allow_peers_file=read.optional("allow_peers_file", _path),
        allowed_peers=peer_list(read, "allow_peers_file", read_text),
        block_peers_file=read.optional("block_peers_file", _path),
        blocked_peers=peer_list(read, "block_peers_file", read_text) or frozenset(),
        listen=read.many("listen", parse_listen, unset.listen),
        announce_addr=read.many("announce_addr", parse_announce_addr),
        bootstrap=read.many("bootstrap", parse_bootstrap),
        mdns=read.switch("mdns", unset.mdns),
        relay=read.switch("relay", unset.relay),
        expose=read.many("expose", parse_exposed_service),
        health=read.many("health", parse_health),
        max_in_flight=read.many("max_in_flight", parse_max_in_flight),
        drain_grace=read.one("drain_grace", parse_duration, unset.drain_grace),
        max_clients=read.one("max_clients", parse_client_count, unset.max_clients),
        max_clients_per_ip=read.one(
            "max_clients_per_ip", parse_client_count, unset.max_clients_per_ip
        ),
        proxy=read.optional("proxy", _proxy),
        proxy_mode=read.one("proxy_mode", parse_proxy_mode, unset.proxy_mode),
        first_byte_timeout=read.one("first_byte_timeout", parse_duration, unset.first_byte_timeout),
        cors_origin=read.many("cors_origin", parse_origin),
        response_headers=read.switch("response_headers", unset.response_headers),
        affinity=read.one("affinity", parse_affinity, unset.affinity),
        session_header=read.one("session_header", parse_header_name, unset.session_header),
        client_keys_file=read.optional("client_keys_file", _path),
        client_keys=client_keys(read, read_text),
        open_proxy=read.switch("open_proxy", unset.open_proxy),
        service=read.optional("service", parse_service_name),
        target=read.optional("target", parse_node_name),
        policy=read.one("policy", parse_policy, unset.policy),
        vram=read.optional("vram", parse_size),
        api=read.one("api", parse_api_address, unset.api),
        api_host_allow=read.many("api_host_allow", parse_host_name),
        api_key_file=read.optional("api_key_file", _path),
        api_key=api_key(read, read_text),
        otlp_endpoint=read.optional("otlp_endpoint", parse_endpoint),
        log_level=read.one("log_level", parse_log_level, unset.log_level),
        log_format=read.one("log_format", parse_log_format, unset.log_format),
        announce_interval=read.one("announce_interval", parse_duration, unset.announce_interval),
        online_window=read.one("online_window", parse_duration, unset.online_window),
        queue_length=read.one("queue_length", parse_count, unset.queue_length),
        queue_timeout=read.one("queue_timeout", parse_duration, unset.queue_timeout),
        sources=read.sources,
        warnings=_warnings(read),
    )
    if must_hold:
        check_together(config)
    return config


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


def _warnings(read: Reader) -> tuple[str, ...]:
    proxy = read.optional("proxy", _proxy)
    if proxy is None or proxy.is_loopback or "client_keys_file" in read.said:
        return ()
    return (
        f"proxy={proxy} from {read.sources['proxy']} listens beyond loopback: whoever reaches it "
        "uses the mesh as this node does",
    )
