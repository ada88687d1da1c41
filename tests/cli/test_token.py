from __future__ import annotations

import io
import json
import os
import sys

import pytest

from meshnode.cli import run
from meshnode.core.token import decode

ADDR = "/ip4/192.0.2.7/tcp/4201/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for key in list(os.environ):
        if key.startswith("MESHNODE_"):
            monkeypatch.delenv(key)


def new_token(capsys, *flags: str) -> str:
    assert run(["token", "new", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mesh1")
    assert out.count("\n") == 1
    assert err == ""
    return out


def test_a_new_token_carries_network_and_bootstraps(capsys):
    token = decode(new_token(capsys, "--network", "lab", "--bootstrap", ADDR))
    assert (token.network, token.bootstraps) == ("lab", (ADDR,))


def test_no_two_tokens_have_one_key(capsys):
    assert decode(new_token(capsys)).key != decode(new_token(capsys)).key


@pytest.mark.parametrize(
    ("flags", "text"),
    [(["--network", "A B"], "is no network name"), (["--bootstrap", "x"], "is no multiaddr")],
)
def test_a_token_that_nobody_could_use_is_not_made(flags, text, capsys):
    assert run(["token", "new", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err


def test_show_tells_everything_but_the_key(tmp_path, capsys):
    text = new_token(capsys, "--network", "lab", "--bootstrap", ADDR)
    (tmp_path / "t").write_text("# made today\n" + text)
    assert run(["token", "show", str(tmp_path / "t"), "--json"]) == 0
    out = capsys.readouterr().out
    shown = json.loads(out)
    token = decode(text)
    assert shown == {
        "schema_version": 1,
        "network": "lab",
        "fingerprint": token.fingerprint(),
        "bootstraps": [ADDR],
        "older": [],
    }
    assert token.key.hex() not in out
    assert run(["token", "show", str(tmp_path / "t")]) == 0
    assert f"bootstrap    {ADDR}" in capsys.readouterr().out


def test_show_reads_environment_and_standard_input(monkeypatch, capsys):
    first, second = new_token(capsys, "--network", "one"), new_token(capsys, "--network", "two")
    monkeypatch.setattr(sys, "stdin", io.StringIO(second))
    assert run(["token", "show"]) == 0
    assert "network      two" in capsys.readouterr().out
    monkeypatch.setenv("MESHNODE_TOKEN", first)
    assert run(["token", "show"]) == 0
    assert "network      one" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "# nothing\n", "mesh1AAAA", "hello", "mesh2AAAA"])
def test_what_is_no_token_is_told_in_one_line(tmp_path, text, capsys):
    (tmp_path / "t").write_text(text)
    assert run(["token", "show", str(tmp_path / "t")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_missing_file_is_named(capsys):
    assert run(["token", "show", "/nowhere"]) == 2
    assert "/nowhere can't be read: No such file" in capsys.readouterr().err
