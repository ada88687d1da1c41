from __future__ import annotations

import json
import os

import pytest

from meshnode.cli import run


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for key in list(os.environ):
        if key.startswith("MESHNODE_"):
            monkeypatch.delenv(key)


def shown(capsys, *argv: str) -> dict[str, object]:
    run(["config", "show", "--json", *argv])
    return json.loads(capsys.readouterr().out)


def test_show_tells_each_value_and_where_it_came_from(tmp_path, monkeypatch, capsys):
    (tmp_path / "meshnode.toml").write_text('name = "of the file"\npolicy = "rotate"\n')
    monkeypatch.setenv("MESHNODE_POLICY", "random")
    made = shown(capsys, "--open", "--proxy", "--config", str(tmp_path / "meshnode.toml"))
    settings = made["settings"]
    file = f"file {tmp_path / 'meshnode.toml'}"
    assert settings["name"] == {"value": "of the file", "source": file}
    assert settings["policy"] == {"value": "random", "source": "environment MESHNODE_POLICY"}
    assert settings["proxy"] == {"value": "127.0.0.1:8080", "source": "flag --proxy"}
    assert settings["listen"] == {"value": ["/ip4/0.0.0.0/tcp/4201"], "source": "default"}
    assert made["problem"] is None


def test_show_hides_tokens_and_keys(tmp_path, monkeypatch, capsys):
    assert run(["token", "new"]) == 0
    token = capsys.readouterr().out.strip()
    (tmp_path / "key").write_text("k" * 32)
    monkeypatch.setenv("MESHNODE_TOKEN", token)
    flags = ["--api-key-file", str(tmp_path / "key")]
    assert run(["config", "show", *flags]) == 0
    assert run(["config", "show", "--json", *flags]) == 0
    out = capsys.readouterr().out
    assert "(hidden: 1)" in out and '"tokens": 1' in out
    assert token not in out and "k" * 32 not in out


def test_settings_that_do_not_hold_are_shown_all_the_same(capsys):
    assert run(["config", "show", "--json", "--open", "--service", "llm"]) == 2
    out, err = capsys.readouterr()
    body = json.loads(out)
    assert body["settings"]["service"]["value"] == "llm"
    assert "add --proxy" in body["problem"] and "add --proxy" in err


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--open"], 0, "ok: 1 settings said"),
        ([], 2, "meshnode token new"),
        (["--open", "--listen", "x"], 2, "listen=x from flag --listen is no multiaddr"),
        (["--open", "--nonsense"], 2, "No such option: --nonsense"),
        (["--open", "--config", "/nowhere.toml"], 2, "can't be read"),
    ],
)
def test_check_says_whether_up_could_start(flags, code, text, capsys):
    assert run(["config", "check", *flags]) == code
    told = capsys.readouterr()
    assert text in told.out + told.err


def test_check_finds_a_damaged_token_before_the_start_does(monkeypatch, capsys):
    monkeypatch.setenv("MESHNODE_TOKEN", "mesh1AAAA")
    assert run(["config", "check", "--json"]) == 2
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is False and "damaged" in body["problem"]


SPOKEN = [
    *("--open", "--proxy", "--expose", "chat=127.0.0.1:1", "--expose", "raw=127.0.0.1:2"),
    *("--max-in-flight", "chat=4", "--max-in-flight", "raw=2"),
    *("--health", "chat=http:/health", "--health", "raw=tcp"),
    *("--drain-grace", "1m", "--no-mdns"),
]


def test_show_prints_each_value_as_a_flag_takes_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["config", "show", *SPOKEN]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words[1:] for words in lines}
    assert rows["max_in_flight"] == ["chat=4", "raw=2", "flag", "--max-in-flight"]
    assert rows["health"] == ["chat=http:/health", "raw=tcp", "flag", "--health"]
    assert rows["expose"][:2] == ["chat=127.0.0.1:1", "raw=127.0.0.1:2"]
    assert (rows["drain_grace"][0], rows["mdns"][0], rows["open"][0]) == ("60", "false", "true")
    assert (rows["bootstrap"][0], rows["vram"][0]) == ("-", "-")


def test_show_as_json_has_one_value_for_each_service_as_the_file_takes_it(tmp_path, capsys):
    settings = shown(capsys, *SPOKEN)["settings"]
    assert settings["max_in_flight"]["value"] == {"chat": 4, "raw": 2}
    assert settings["health"]["value"] == {"chat": "http:/health", "raw": "tcp"}
    assert shown(capsys, "--open")["settings"]["max_in_flight"]["value"] == {}
    # What was shown, put into a file, is shown again.
    file = tmp_path / "meshnode.toml"
    file.write_text(
        'open = true\nexpose = ["chat=127.0.0.1:1", "raw=127.0.0.1:2"]\n'
        "max_in_flight = { chat = 4, raw = 2 }\n"
        'health = { chat = "http:/health", raw = "tcp" }\n'
    )
    again = shown(capsys, "--config", str(file))["settings"]
    assert again["max_in_flight"]["value"] == settings["max_in_flight"]["value"]
    assert again["health"]["value"] == settings["health"]["value"]
