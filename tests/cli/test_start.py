from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from meshnode.cli import fill_in_proxy, run
from meshnode.errors import MeshnodeError, NoCandidate

VERBS = [
    [],
    ["up"],
    ["token"],
    ["token", "new"],
    ["token", "show"],
    ["status"],
    ["peers"],
    ["explain"],
    ["gpus"],
    ["doctor"],
    ["config"],
    ["config", "show"],
    ["demo"],
]
HEAVY = ("trio", "libp2p", "pydantic", "structlog", "rich", "starlette", "http.client")
PROBE = f"""
import sys
from meshnode.cli import run
code = run(sys.argv[1:])
print([name for name in {HEAVY!r} if name in sys.modules], code, file=sys.stderr)
"""


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("MESHNODE_")}


def meshnode(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshnode", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**clean_environment(), **environment},
    )


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for key in list(os.environ):
        if key.startswith("MESHNODE_"):
            monkeypatch.delenv(key)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_loads_nothing_heavy(verb):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *verb, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
    )
    assert done.stderr == "[] 0\n"
    assert "Usage: meshnode" in done.stdout


def test_help_takes_less_than_three_tenths_of_a_second():
    def processor_time() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert meshnode("up", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of the processor and not of the wall, so that a busy machine tells the same.
    assert min(processor_time() for _ in range(5)) < 0.3


def test_the_version_goes_to_stdout(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("meshnode 0.")


def test_completion_is_offered(monkeypatch, capsys):
    monkeypatch.setenv("_MESHNODE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "meshnode token s")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run([]) == 0
    assert capsys.readouterr().out.strip() == "show"


def test_completion_knows_the_options_of_a_verb(monkeypatch, capsys):
    monkeypatch.setenv("_MESHNODE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "meshnode explain --prompt")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run([]) == 0
    assert capsys.readouterr().out.strip() == "--prompt-file"


@pytest.mark.parametrize("argv", [["nonsense"], ["up", "--nonsense"], [], ["token"]])
def test_wrong_usage_ends_with_2_and_says_so_on_stderr(argv, capsys):
    assert run(argv) == 2
    assert "Usage: meshnode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["up", "--token", "x"],
        ["up", "--token=x"],
        ["up", "mesh1" + "a" * 40],
        ["token", "show", "mesh1" + "a" * 40],
        ["up", "--name=mesh1" + "a" * 40],
    ],
)
def test_a_token_on_the_command_line_is_refused_and_not_repeated(argv, capsys):
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: a token on the command line")
    assert "--token-file" in err
    assert "aaaa" not in err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["up"], "meshnode token new"),
        (["up", "--open", "--listen", "x"], "listen=x from flag --listen is no multiaddr"),
        (["up", "--open", "--config", "/nowhere"], "config=/nowhere from flag --config can't be"),
        (["up", "--token-file", "/nowhere"], "token_file=/nowhere from flag --token-file can't be"),
        (["up", "--open", "--expose", "x"], "expose=x from flag --expose"),
    ],
)
def test_bad_settings_end_with_2_and_one_line(argv, text, capsys):
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert text in err


def test_an_unknown_key_of_the_file_names_the_file(tmp_path, capsys):
    path = tmp_path / "mesh.toml"
    path.write_text('open = true\nlisen = ["/ip4/0.0.0.0/tcp/1"]\n')
    assert run(["up", "--config", str(path)]) == 2
    assert f"lisen in file {path}; did you mean listen?" in capsys.readouterr().err


def test_what_is_no_toml_names_the_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mesh.toml"
    path.write_text("open = true\nname = \n")
    monkeypatch.setenv("MESHNODE_CONFIG", str(path))
    assert run(["up"]) == 2
    err = capsys.readouterr().err
    assert f"config={path} from environment MESHNODE_CONFIG is no TOML" in err
    assert "line 2" in err


def test_with_json_logs_an_error_is_a_json_line_too(capsys):
    assert run(["up", "--log-format", "json"]) == 2
    told = json.loads(capsys.readouterr().err)
    assert told["event"] == "stopped"
    assert "meshnode token new" in told["error"]
    assert told["exit_code"] == 2


@pytest.mark.parametrize(
    ("argv", "filled"),
    [
        (["up", "--proxy"], ["up", "--proxy=127.0.0.1:8080"]),
        (["up", "--proxy", "--open"], ["up", "--proxy=127.0.0.1:8080", "--open"]),
        (["up", "--proxy", ":9000"], ["up", "--proxy", ":9000"]),
        (["up", "--proxy=:9000", "--open"], ["up", "--proxy=:9000", "--open"]),
        (["up"], ["up"]),
    ],
)
def test_proxy_alone_means_port_8080_of_loopback(argv, filled):
    assert fill_in_proxy(argv) == filled


@pytest.mark.parametrize(("error", "code"), [(MeshnodeError("a\nb"), 1), (NoCandidate("a\nb"), 4)])
def test_an_error_of_ours_is_one_line_and_its_own_exit_code(monkeypatch, capsys, error, code):
    def fail(argv):
        raise error

    monkeypatch.setattr("meshnode.cli.app.invoke", fail)
    assert run(["peers"]) == code
    assert capsys.readouterr().err == "error: a b\n"


def test_a_bug_is_one_line_that_says_how_to_see_more(monkeypatch, capsys):
    def fail(argv):
        raise ExceptionGroup("outer", [ZeroDivisionError("oops")])

    monkeypatch.setattr("meshnode.cli.app.invoke", fail)
    assert run(["peers"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ZeroDivisionError: oops")
    assert "--log-level debug" in err
    assert err.count("\n") == 1


def test_a_bug_shows_its_traceback_to_who_asks(monkeypatch):
    def fail(argv):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("meshnode.cli.app.invoke", fail)
    with pytest.raises(ZeroDivisionError):
        run(["up", "--log-level", "debug"])


def test_a_reader_that_has_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "meshnode", "token", "new"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        env=clean_environment(),
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1
