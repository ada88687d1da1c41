"""What a log line never holds, whichever form it has."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import logging, structlog
from meshnode.cli.logs import set_up_logs
set_up_logs("debug", FORM)
def fail(prompt):
    raise ValueError("no good")
try:
    fail("a secret " + "prompt")
except ValueError:
    structlog.get_logger("ours").exception("client_failed")
    logging.getLogger("theirs").exception("library failed")
"""


@pytest.mark.parametrize("form", ["pretty", "json"])
def test_a_traceback_tells_where_it_was_and_not_with_which_values(form: str) -> None:
    code = CODE.replace("FORM", repr(form))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    for event in ("client_failed", "library failed"):
        assert event in done.stderr
    assert done.stderr.count("ValueError: no good") == 2
    assert "a secret prompt" not in done.stderr
