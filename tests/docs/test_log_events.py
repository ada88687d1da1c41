"""docs/log-events.md tells of every event that the source logs, as it logs it, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.log_calls import LogEvent, find_log_events

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.M)


@pytest.fixture(scope="module")
def logged() -> dict[str, LogEvent]:
    return find_log_events(ROOT / "meshnode")


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, ...]]:
    page = (ROOT / "docs/log-events.md").read_text()
    found = [match.groups() for match in ROW.finditer(page)]
    # A row that is not of this form would be left out of every comparison.
    assert len(found) == len(re.findall(r"^\| `", page, re.M))
    return found


def test_an_event_is_one_word_in_snake_case(logged: dict[str, LogEvent]) -> None:
    assert len(logged) > 60
    assert [event for event in logged if not re.fullmatch(r"[a-z]+(_[a-z]+)*", event)] == []


def test_the_page_has_each_event_once_and_no_other(
    logged: dict[str, LogEvent], rows: list[tuple[str, ...]]
) -> None:
    assert sorted(event for event, *_ in rows) == sorted(logged)


def test_levels_and_fields_stand_there_as_they_are_logged(
    logged: dict[str, LogEvent], rows: list[tuple[str, ...]]
) -> None:
    described = {
        event: (set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields)))
        for event, levels, fields, _, _ in rows
    }
    assert described == {name: (event.levels, event.fields) for name, event in logged.items()}


def test_each_says_what_it_means_and_what_to_do(rows: list[tuple[str, ...]]) -> None:
    assert [event for event, _, _, meaning, _ in rows if len(meaning.split()) < 4] == []
    # A warning or an error that leaves nothing to do would be none.
    for event, levels, _, _, remedy in rows:
        if "warning" in levels or "error" in levels:
            assert remedy != "nothing", event


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("log.info(f'{who}_came')", "one constant word"),
        ("log.info('came', who)", "one constant word"),
        ("log.info('came', **fields)", "each field is named"),
        ("say = log.info if calm else log.warning", "called where it is named"),
        ("logger = structlog.get_logger(__name__)", "a logger is called log or _log"),
    ],
)
def test_a_call_that_can_not_be_read_is_not_passed_over(
    tmp_path: Path, line: str, why: str
) -> None:
    (tmp_path / "module.py").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=f"module.py:1: .*{why}"):
        find_log_events(tmp_path)


def test_the_calls_of_one_event_are_taken_together(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "log.info('came', peer_id=1)\n_log.exception('came', error=2)\n"
    )
    assert find_log_events(tmp_path) == {
        "came": LogEvent({"info", "error"}, {"peer_id", "error", "exception"})
    }
