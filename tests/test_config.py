from __future__ import annotations

import pytest

from meshnode.config import Config, field_names, resolve
from meshnode.errors import ConfigError, TokenInvalid
from meshnode.values import (
    ExposedService,
    HealthCheck,
    HostPort,
    format_size,
    parse_duration,
    parse_host_port,
    parse_size,
)

PEER = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


def resolved(flags=None, env=None, file=None, **more) -> Config:
    more.setdefault("read_text", {"t": "mesh1abc\n", "key": "k" * 32}.__getitem__)
    return resolve(
        flags or {}, {"MESHNODE_TOKEN": "mesh1xyz", **(env or {})}, file, file_path="m.toml", **more
    )


def refusal(flags=None, env=None, file=None, **more) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(flags, env, file, **more)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_anything_said_every_source_is_the_default():
    config = resolved()
    assert config.listen == ("/ip4/0.0.0.0/tcp/4201",)
    assert str(config.api) == "127.0.0.1:4280"
    assert config.proxy is None
    assert config.online_window == 40.0
    assert config.sources["listen"] == "default"


@pytest.mark.parametrize(
    ("flags", "env", "file", "expected", "source"),
    [
        ({"name": "a"}, {"MESHNODE_NAME": "b"}, {"name": "c"}, "a", "flag --name"),
        ({"name": None}, {"MESHNODE_NAME": "b"}, {"name": "c"}, "b", "environment MESHNODE_NAME"),
        ({}, {}, {"name": "c"}, "c", "file m.toml"),
        ({}, {}, {}, "host", "default"),
    ],
)
def test_flag_beats_environment_beats_file_beats_default(flags, env, file, expected, source):
    config = resolved(flags, env, file, host_name="host")
    assert (config.name, config.sources["name"]) == (expected, source)


def test_an_empty_variable_is_not_set():
    assert resolved(env={"MESHNODE_PROXY": ""}).proxy is None


def test_the_file_may_use_toml_types_and_the_environment_commas():
    config = resolved(
        env={"MESHNODE_LISTEN": "/ip4/0.0.0.0/tcp/0,/ip6/::/tcp/0"},
        file={
            "expose": {"ollama": "127.0.0.1:11434"},
            "mdns": False,
            "announce_interval": 5,
            "queue_length": 0,
            "queue_timeout": "2m",
            "proxy": True,
            "vram": 24_000_000_000,
        },
    )
    assert config.listen == ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    assert config.expose == (ExposedService("ollama", "127.0.0.1", 11434),)
    assert config.mdns is False
    assert config.announce_interval == 5.0
    assert (config.queue_length, config.queue_timeout) == (0, 120.0)
    assert config.proxy == HostPort("127.0.0.1", 8080)
    assert config.vram == 24_000_000_000


def test_an_unknown_key_in_the_file_names_the_file_and_the_nearest_key():
    assert refusal(file={"lisen": "x"}) == (
        "unknown setting lisen in file m.toml; did you mean listen?"
    )


def test_an_unknown_variable_names_the_nearest_one():
    assert "MESHNODE_PROXXY in the environment; did you mean MESHNODE_PROXY?" in refusal(
        env={"MESHNODE_PROXXY": "x"}
    )


def test_a_variable_that_is_like_no_setting_is_not_said_to_be_meant_for_one():
    told = refusal(env={"MESHNODE_NONSENSE": "x"})
    assert told.endswith(
        "MESHNODE_NONSENSE in the environment; run meshnode up --help for the list"
    )


def test_a_bootstrap_may_be_reached_through_a_relay():
    addr = f"/ip4/1.2.3.4/tcp/4201/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    assert resolved({"bootstrap": (addr,)}).bootstrap == (addr,)


def test_a_variable_of_somebody_else_is_left_alone():
    assert resolved(env={"PATH": "/bin", "MESH": "x"}).sources["listen"] == "default"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"listen": ("nonsense",)}, "listen=nonsense from flag --listen is no multiaddr"),
        ({"listen": ("/ip4/1.2.3.400/tcp/1",)}, "'1.2.3.400' is not IPv4"),
        ({"listen": ("/ip4/1.2.3.4/udp/1",)}, "names no TCP address"),
        ({"listen": ("/dns4/gpu/tcp/1",)}, "listen on an IP address"),
        ({"listen": (f"/ip4/0.0.0.0/tcp/1/p2p/{PEER}",)}, "leave it off"),
        ({"bootstrap": ("/ip4/1.2.3.4/tcp/1",)}, "lacks the peer ID"),
        ({"bootstrap": ("/ip4/1.2.3.4/tcp/1/p2p/xyz",)}, "is no multiaddr"),
        (
            {"bootstrap": (f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/p2p-circuit",)},
            "after a relay's /p2p-circuit/p2p/PEER_ID",
        ),
        ({"bootstrap": (f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/tcp/2",)}, "goes on after the TCP port"),
        ({"expose": ("ollama",)}, "expose=ollama from flag --expose is no NAME=HOST:PORT"),
        ({"expose": ("a=1.2.3.4:0",)}, "port 0"),
        ({"expose": ("a b=1.2.3.4:1",)}, "is no service name"),
        ({"expose": ("a=1.2.3.4:1", "a=1.2.3.4:2")}, "uses the name of a=1.2.3.4:1"),
        ({"expose": tuple(f"s{n}=1.2.3.4:1" for n in range(33))}, "names 33 services"),
        ({"proxy": "8x"}, "proxy=8x from flag --proxy is no HOST:PORT"),
        ({"proxy": "http://127.0.0.1:80"}, "proxy=http://127.0.0.1:80"),
        ({"proxy_mode": "udp"}, "is no proxy mode; write http, or tcp"),
        ({"cors_origin": ("chat.example",)}, "is no origin; write it like https://chat.example"),
        ({"first_byte_timeout": "0.1"}, "out of bounds"),
        ({"policy": "best"}, "policy=best from flag --policy is no policy"),
        ({"vram": "24 bananas"}, "vram=24 bananas from flag --vram is no size"),
        ({"vram": "24PiB"}, "is no size"),
        ({"vram": "24000GiB"}, "more than 16 TiB"),
        ({"log_level": "loud"}, "is no log level"),
        ({"log_format": "xml"}, "is no log format"),
        ({"name": "x" * 65}, "is no node name"),
        ({"announce_interval": "often"}, "is no duration"),
        ({"announce_interval": "0.1"}, "out of bounds"),
        ({"online_window": "3"}, "online_window=3 s from flag --online-window is out of bounds"),
        ({"queue_length": "many"}, "queue_length=many from flag --queue-length is no whole number"),
        ({"queue_length": "-1"}, "is no whole number"),
        ({"queue_length": "10001"}, "out of bounds; set it to 0 to 10000 requests"),
        ({"queue_timeout": "0"}, "queue_timeout=0 s from flag --queue-timeout is out of bounds"),
        ({"service": "x"}, "add --proxy"),
        ({"target": "x"}, "add --proxy"),
        ({"open": True}, "contradict"),
        ({"network": "x"}, "only has a meaning with --open"),
        ({"api": "0.0.0.0:4280"}, "set api_key_file"),
        ({"nonsense": "x"}, "unknown setting nonsense in the command line"),
    ],
)
def test_a_bad_value_names_itself_its_source_and_the_remedy(flags, text):
    assert text in refusal(flags)


def test_a_window_below_two_intervals_would_drop_live_peers_and_is_refused():
    assert refusal({"announce_interval": "6"}, {"MESHNODE_ONLINE_WINDOW": "11"}) == (
        "online_window=11 s from environment MESHNODE_ONLINE_WINDOW is below twice "
        "announce_interval=6 s from flag --announce-interval, so one lost announcement would drop "
        "a live peer; set it to at least 12 s"
    )


def test_no_token_names_the_command_that_makes_one():
    with pytest.raises(TokenInvalid, match="meshnode token new") as caught:
        resolve({}, {})
    assert caught.value.exit_code == 2


def test_an_open_mesh_needs_no_token():
    config = resolve({"open": True, "network": "lab"}, {})
    assert (config.open, config.network, config.token_text) == (True, "lab", None)


def test_a_token_file_on_the_command_line_beats_the_token_of_the_environment():
    config = resolved({"token_file": "t"})
    assert config.token_text == "mesh1abc"
    assert config.sources["token_file"] == "flag --token-file"


def test_the_token_of_the_environment_beats_the_token_file_of_the_file():
    config = resolved(file={"token_file": "nowhere"})
    assert (config.token_text, config.token_file) == ("mesh1xyz", None)


def test_two_tokens_in_the_environment_are_one_too_many():
    assert "unset one" in refusal(env={"MESHNODE_TOKEN_FILE": "t"})


def test_a_token_file_may_hold_several_for_rotation():
    config = resolved({"token_file": "t"}, read_text=lambda path: "# new\nmesh1b\n\nmesh1a\n")
    assert config.token_texts == ("mesh1b", "mesh1a")


def test_a_token_that_was_wrapped_stays_one():
    config = resolved({"token_file": "t"}, read_text=lambda path: "mesh1abc\ndef\nmesh1xyz\n")
    assert config.token_texts == ("mesh1abcdef", "mesh1xyz")


def test_a_missing_token_file_is_named_with_its_source():
    def missing(path: str) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    text = refusal({"token_file": "x"}, read_text=missing)
    assert text == "token_file=x from flag --token-file can't be read: No such file or directory"


def test_an_empty_token_file_is_refused():
    assert "holds no token" in refusal({"token_file": "t"}, read_text=lambda path: "\n")


def test_a_token_in_the_settings_file_is_refused():
    text = refusal(file={"token": "mesh1secret"})
    assert "token_file" in text
    assert "mesh1secret" not in text


def test_secrets_are_hidden_from_repr():
    config = resolved({"api_key_file": "key", "api": "0.0.0.0:1"})
    assert config.api_key == "k" * 32
    assert "kkkk" not in repr(config)
    assert "mesh1xyz" not in repr(config)


def test_a_short_api_key_is_refused_without_printing_it():
    text = refusal({"api_key_file": "key"}, read_text=lambda path: "hunter2")
    assert "16" in text
    assert "hunter2" not in text


def test_a_gateway_beyond_loopback_wants_keys_or_to_be_opened_aloud():
    text = refusal({"proxy": "0.0.0.0:8080"})
    assert "--client-keys-file" in text and "--open-proxy" in text
    opened = resolved({"proxy": "0.0.0.0:8080", "open_proxy": True})
    assert "beyond loopback" in opened.warnings[0]
    assert resolved({"proxy": "127.0.0.1:0"}).warnings == ()
    # What can't read requests can't ask for keys.
    assert "beyond" in resolved({"proxy": "0.0.0.0:1", "proxy_mode": "tcp"}).warnings[0]


def test_keys_of_clients_are_read_from_their_file_and_never_shown():
    files = {"keys": '[alice]\nkey = "alice-key-0123456789"\n', "bad": 'key = "secret-one\n'}
    read = {"read_text": files.__getitem__}
    config = resolved({"proxy": "0.0.0.0:8080", "client_keys_file": "keys"}, **read)
    assert config.client_keys == {"alice": {"key": "alice-key-0123456789"}}
    assert config.warnings == () and "0123456789" not in repr(config)
    damaged = refusal({"client_keys_file": "bad"}, **read)
    assert "is no TOML (line 1)" in damaged and "secret-one" not in damaged
    tcp = {"proxy": "127.0.0.1:1", "proxy_mode": "tcp", "client_keys_file": "keys"}
    assert "proxy_mode=tcp" in refusal(tcp, **read)


def test_what_makes_a_peer_warm_is_chosen_by_name():
    assert resolved({"affinity": "session", "session_header": "X-Chat"}).session_header == "x-chat"
    assert "off, prefix or session" in refusal({"affinity": "sticky"})
    assert "no name of a header" in refusal({"session_header": "x y"})


def test_systemds_state_directory_is_taken():
    config = resolved(env={"STATE_DIRECTORY": "/var/lib/meshnode:/x"})
    assert config.state_dir == "/var/lib/meshnode"
    assert config.sources["state_dir"] == "environment STATE_DIRECTORY"
    chosen = resolved({"state_dir": "/s"}, env={"STATE_DIRECTORY": "/var/lib/meshnode"})
    assert chosen.state_dir == "/s"


def test_every_setting_has_a_source():
    assert set(field_names()) <= set(resolved().sources)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 25_769_803_776),
        ("24Gi", 25_769_803_776),
        ("24GB", 24_000_000_000),
        ("24g", 24_000_000_000),
        ("24000000000", 24_000_000_000),
        ("0.5 MiB", 524_288),
        ("0", 0),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "24iB", "24 GiBs", "0x10"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_sizes_are_shown_with_their_unit():
    shown = [format_size(size) for size in (None, 0, 1023, 25_769_803_776, 2**44)]
    assert shown == ["-", "0 B", "1023 B", "24.0 GiB", "16.0 TiB"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10.0), ("2.5s", 2.5), ("2m", 120.0), ("500ms", 0.5), ("1h", 3600)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "expected", "loopback"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080), True),
        (":8080", ("127.0.0.1", 8080), True),
        ("8080", ("127.0.0.1", 8080), True),
        ("[::1]:0", ("::1", 0), True),
        ("localhost:1", ("localhost", 1), True),
        ("0.0.0.0:80", ("0.0.0.0", 80), False),
        ("gpu.lan:80", ("gpu.lan", 80), False),
    ],
)
def test_host_and_port(text, expected, loopback):
    parsed = parse_host_port(text)
    assert (parsed.host, parsed.port) == expected
    assert parsed.is_loopback is loopback


@pytest.mark.parametrize("text", ["", "host:", "::1:80", "a b:1", "h:65536", "h:-1", "http://h:1"])
def test_what_is_no_host_and_port(text):
    with pytest.raises(ValueError, match=r"HOST:PORT|colon"):
        parse_host_port(text)


def test_an_ipv6_address_is_written_with_brackets():
    assert str(HostPort("::1", 80)) == "[::1]:80"


def test_how_services_are_probed_and_what_they_take_is_said_by_name() -> None:
    config = resolved(
        {
            "expose": ["llm=127.0.0.1:11434", "tts=127.0.0.1:9000"],
            "health": ["llm=ollama", "tts=http:/ready?full=1"],
            "max_in_flight": ["llm=8"],
            "drain_grace": "2m",
        }
    )
    assert config.health == (
        ("llm", HealthCheck("ollama")),
        ("tts", HealthCheck("http", "/ready?full=1")),
    )
    assert config.max_in_flight == (("llm", 8),)
    assert config.drain_grace == 120.0
    table = {
        "expose": {"llm": "127.0.0.1:1"},
        "health": {"llm": "tcp"},
        "max_in_flight": {"llm": 2},
    }
    from_file = resolved(file=table)
    assert (from_file.health, from_file.max_in_flight) == (
        (("llm", HealthCheck("tcp")),),
        (("llm", 2),),
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"health": ["llm"]}, "is no NAME=KIND"),
        ({"health": ["llm=lmstudio"]}, "write one of auto, tcp, ollama"),
        ({"health": ["llm=http:ready"]}, "is no kind"),
        ({"health": ["llm=http:/\x01"]}, "is no kind"),
        ({"health": ["tts=tcp"]}, "names the service tts, which is not exposed; exposed are: llm"),
        ({"health": ["llm=tcp", "llm=off"]}, "names the service llm twice"),
        ({"max_in_flight": ["llm=-1"]}, "is no NAME=N"),
        ({"max_in_flight": ["llm"]}, "is no NAME=N"),
        ({"max_in_flight": ["tts=1"]}, "not exposed"),
        ({"drain_grace": "2000m"}, "out of bounds"),
    ],
)
def test_a_wrong_word_on_health_limits_or_draining_is_named_with_its_source(
    flags: dict[str, object], words: str
) -> None:
    said = refusal({"expose": ["llm=127.0.0.1:1"], **flags})
    assert words in said and "flag --" in said
