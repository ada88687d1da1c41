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
