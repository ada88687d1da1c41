"""--help of every verb: each thing that can be said has a readable name, and says what it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from meshnode.cli import run
from meshnode.cli.app import build_app

# Of an argument, Typer itself adds the type: "PEER <str>".
RAW = re.compile(r"<[a-z]+[^>]*>|\bTEXT\b|\bINTEGER\b|\bFLOAT\b|\{[a-z]+\}")


def verbs(words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    # A verb is loaded only by a command line that names it.
    command: Any = typer.main.get_command(build_app([*words, "--help"]))
    for word in words:
        command = command.commands[word]
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name in inner:
        yield from verbs((*words, name))


VERBS = dict(verbs())


def test_every_verb_is_looked_at():
    assert {("up",), ("swarm",), ("token", "rotate"), ("config", "show")} <= set(VERBS)
    assert len(VERBS) >= 17


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_help_names_no_value_by_its_type(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert RAW.findall(re.sub(r"^  [A-Z]+ <str>  |\{[A-Z]+\}", "", text, flags=re.M)) == []


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_everything_that_can_be_said_is_described(words):
    thin = [
        param.name
        for param in VERBS[words].params
        if len((param.help or "").split()) < 2 or not param.help.rstrip().endswith(".")
    ]
    assert thin == []


# What has no default: who joins which mesh, and what is only there when it is said.
WITHOUT = {
    *("token_file", "network", "allow_peers_file", "block_peers_file", "announce_addr"),
    *("bootstrap", "expose", "max_in_flight", "proxy", "client_keys_file", "target", "vram"),
    *("api_host_allow", "api_key_file", "config", "otlp_endpoint"),
}


def test_a_setting_of_up_with_a_default_names_it():
    said = {param.name: param.help for param in VERBS["up",].params if not param.is_flag}
    unnamed = {name for name, help_text in said.items() if "default" not in help_text.lower()}
    assert unnamed == WITHOUT
