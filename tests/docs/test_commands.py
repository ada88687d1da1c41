"""Every command of the documentation is run, or says why not and is held to the real parser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.documents import (
    PAGES,
    ROOT,
    Block,
    Session,
    blocks_of,
    check_command,
    missing_lines,
    shell_blocks,
)


def _runs(page: Path) -> bool:
    return any(b.kind in ("sh", "python") and b.not_run is None for b in blocks_of(page))


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", [page for page in PAGES if _runs(page)], ids=_name)
def test_the_commands_of_a_page_do_what_it_says(
    page: Path, cluster: Cluster, tmp_path: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not here; on Debian: apt-get install curl")
    session = Session(cluster, tmp_path)
    ran = False
    for block in blocks_of(page):
        if block.not_run is None:
            # What is shown after a block that was not run can't be compared either.
            if block.kind == "text" and block.file is None and not ran:
                assert block.sample is not None, f"{block.where} says not why it is not compared"
            session.run(block)
            if block.kind in ("sh", "python"):
                ran = True
        elif block.kind == "sh":
            ran = False


@pytest.mark.parametrize("block", list(shell_blocks()), ids=lambda block: block.where)
def test_the_flags_and_paths_of_each_command_are_real(block: Block) -> None:
    assert block.commands, f"{block.where} is empty"
    for command in block.commands:
        assert check_command(command) == [], block.where
    if block.not_run is not None:
        assert len(block.not_run.split()) >= 2, f"{block.where} says not why it is not run"


def test_a_wrong_flag_verb_path_or_output_would_be_found() -> None:
    assert check_command("meshnode up --proxie") != []
    assert check_command("meshnode doctor --exposed x=1:2") != []
    assert check_command("meshnode tokens new") != []
    assert check_command("scripts/tset && meshnode peers") == ["there is no scripts/tset"]
    assert check_command("meshnode up --proxy --expose llm=127.0.0.1:80") == []
    assert missing_lines("NAME  STATE\n…\ngpu1 up", ["NAME   STATE  X", "gpu2  down"]) == [
        "gpu1 up"
    ]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_fenced_block_is_of_a_kind_that_nothing_checks(page: Path) -> None:
    kinds = {block.kind for block in blocks_of(page)}
    assert kinds <= {"sh", "python", "text", "toml", "ini", "json"}
    assert page.read_text().count("\n```") == 2 * len(blocks_of(page)), "a fence without a kind"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_paths_in_this_repository_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:scripts|packaging|ops|protocols|docs|tests|meshnode)/[\w./-]*)`", page.read_text()
    )
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("this is no git checkout, so what a fresh clone has can't be told")
    for path in named:
        assert any(file == path or file.startswith(path.rstrip("/") + "/") for file in listed), path
