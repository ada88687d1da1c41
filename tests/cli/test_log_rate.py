from __future__ import annotations

import json
import os
import subprocess
import sys

from meshnode.cli.log_rate import LogRate

FLOOD = """
import logging, structlog, time
from meshnode.cli.logs import set_up_logs
set_up_logs("info", "json")
log = structlog.get_logger("x")
for number in range(5000):
    log.warning("client_refused", number=number)
    logging.getLogger("libp2p.y").warning("odd frame %d", number)
log.info("peer_joined")
time.sleep(0.5)
log.warning("client_refused", number="last")
"""


def test_a_burst_is_written_whole_and_a_flood_at_its_rate() -> None:
    rate = LogRate(burst=10, rate=2.0)
    written = [rate.take("refused", now / 100) for now in range(1000)]  # 100 a second for 10 s
    assert written[:10] == [0] * 10
    assert sum(said is not None for said in written) == 10 + 19
    # Nothing is lost from the count.
    last = max(place for place, said in enumerate(written) if said is not None)
    assert sum(said + 1 for said in written if said is not None) == last + 1


def test_a_flood_of_one_kind_holds_back_no_other() -> None:
    rate = LogRate(burst=2, rate=1.0)
    for _ in range(100):
        rate.take("flood", 0.0)
    assert rate.take("peer_left", 0.0) == 0


def test_the_next_line_after_a_flood_says_how_many_were_left_out() -> None:
    rate = LogRate(burst=1, rate=1.0)
    assert [rate.take("a", 0.0) for _ in range(5)] == [0, None, None, None, None]
    assert rate.take("a", 1.0) == 4
    assert rate.take("a", 2.0) == 0


def test_kinds_that_a_stranger_could_invent_are_bounded() -> None:
    rate = LogRate(burst=1, rate=0.001)
    for number in range(100_000):
        rate.take(f"kind {number}", 0.0)
    assert len(rate._budgets) <= 513


def test_a_flood_does_not_fill_the_log_of_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FLOOD],
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    refused = [line for line in lines if line["event"] == "client_refused"]
    odd = [line for line in lines if line.get("logger") == "libp2p.y"]
    assert 100 <= len(refused) < 200 and 100 <= len(odd) < 200
    assert any(line["event"] == "peer_joined" for line in lines)
    assert refused[-1]["number"] == "last"
    assert len(refused) + sum(line.get("left_out", 0) for line in refused) == 5001
