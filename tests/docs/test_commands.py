"""Every command of the documentation is run, or says why not and is held to the real parser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from meshnode.config import field_names
from support.cluster import Cluster, Engine
from support.documents import (
    PAGES,
    ROOT,
    Block,
    all_flags,
    blocks_of,
    check_command,
    missing_lines,
    run_page,
    shell_blocks,
    spoken_of,
)


def _runs(page: Path) -> bool:
    return any(b.kind in ("sh", "python") and b.not_run is None for b in blocks_of(page))


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[None]]]:
    """All pages under way, two at a time: each waits for one process after the other."""
    folder = tmp_path_factory.mktemp("pages")
    wanted = [
        item.callspec.params["page"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "runs" in item.fixturenames
    ]
    clusters = {page: Cluster(_new(folder / str(n))) for n, page in enumerate(wanted)}
    shared = Cluster(folder)
    with ThreadPoolExecutor(2) as pool:
        try:
            engine = shared.engine("engine", "--model", "llama3.2")
            yield {
                page: pool.submit(_run_and_close, page, cluster, engine)
                for page, cluster in clusters.items()
            }
        finally:
            pool.shutdown(cancel_futures=True)
            shared.close()


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _run_and_close(page: Path, cluster: Cluster, engine: Engine) -> None:
    try:
        run_page(page, cluster, cluster.folder, engine)
    finally:
        cluster.close()


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    shutil.which("curl") is None, reason="curl is not here; on Debian: apt-get install curl"
)
@pytest.mark.parametrize("page", [page for page in PAGES if _runs(page)], ids=_name)
def test_the_commands_of_a_page_do_what_it_says(page: Path, runs: dict[Path, Future[None]]) -> None:
    runs[page].result()


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


def _wrong_in_prose(page: Path, flags: set[str]) -> list[str]:
    wrong = []
    for code in spoken_of(page):
        words = code.split()
        if words[0] == "meshnode" or code.startswith("scripts/"):
            wrong += check_command(code, is_whole=False)
        elif code.startswith("--") and words[0].split("=")[0] not in flags:
            wrong.append(code)
        elif code.startswith("MESHNODE_"):
            name = code.removeprefix("MESHNODE_").lower()
            if name not in {*field_names(), "token", "config"}:
                wrong.append(code)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_flags_and_variables_that_the_prose_names_exist(page: Path) -> None:
    assert _wrong_in_prose(page, all_flags()) == []


def test_a_wrong_flag_in_prose_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Say `--proxie`, or `meshnode peer`, or set `MESHNODE_PROXIE`; not `--proxy`.")
    assert len(_wrong_in_prose(page, all_flags())) == 3


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
