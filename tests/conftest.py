"""What holds for every test."""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.cluster import Cluster
from support.lan import Lan

# A shell that runs the tests in the background lets them and their children ignore these; what
# they do in a node is part of what is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("untimed")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Real processes of one network, ended on every way out."""
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Hosts on local networks of their own, where network namespaces are permitted."""
    lan = Lan.open_or_skip()
    yield lan
    lan.close()


@pytest.fixture(autouse=True)
def _stock_leaks_stay_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect what the unmended library leaves open, so that no later test is blamed for it."""
    yield
    if request.node.get_closest_marker("stock") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
