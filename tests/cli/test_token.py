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


def test_a_qr_code_is_the_token_itself_and_says_so(tmp_path, capsys):
    import segno

    text = new_token(capsys, "--network", "lab")
    (tmp_path / "t").write_text(text)
    assert run(["token", "show", str(tmp_path / "t"), "--qr"]) == 0
    out, err = capsys.readouterr()
    assert "Whoever scans this is a member" in err
    expected = io.StringIO()
    segno.make(text.strip(), error="l", micro=False).terminal(expected, compact=True)
    assert out == expected.getvalue()
    assert text.strip() not in out


def rotated(path, capsys, *flags: str) -> list[str]:
    assert run(["token", "rotate", str(path), *flags]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "mesh1" not in err
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_text().split()


def test_a_rotated_file_begins_with_a_new_key_and_keeps_the_old_until_told_otherwise(
    tmp_path, capsys
):
    path = tmp_path / "t"
    old = new_token(capsys, "--network", "lab", "--bootstrap", ADDR).strip()
    path.write_text("# ours\n" + old + "\n")
    new, kept = rotated(path, capsys)
    assert kept == old and new != old
    assert (decode(new).network, decode(new).bootstraps) == ("lab", (ADDR,))
    assert decode(new).key != decode(old).key
    assert rotated(path, capsys, "--finish") == [new]


def test_a_link_to_the_tokens_file_stays_a_link(tmp_path, capsys):
    path, link = tmp_path / "t", tmp_path / "link"
    path.write_text(new_token(capsys))
    link.symlink_to(path)
    rotated(link, capsys)
    assert link.is_symlink()
    assert len(path.read_text().split()) == 2


def test_rotating_for_ever_without_finishing_is_refused(tmp_path, capsys):
    path = tmp_path / "t"
    path.write_text(new_token(capsys))
    for _ in range(7):
        rotated(path, capsys)
    before = path.read_text()
    assert run(["token", "rotate", str(path)]) == 2
    assert "--finish" in capsys.readouterr().err
    assert path.read_text() == before


@pytest.mark.parametrize("content", ["", "mesh1AAAA", "hello"])
def test_what_is_no_token_is_left_as_it_is(tmp_path, content, capsys):
    path = tmp_path / "t"
    path.write_text(content)
    assert run(["token", "rotate", str(path)]) == 2
    assert path.read_text() == content
    assert "error: " in capsys.readouterr().err
