from __future__ import annotations

import pytest

from meshnode.http.traffic import KEPT_SECONDS, Traffic, quantile
from meshnode.metrics import Metrics

INF = float("inf")


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def traffic(metrics):
    return Traffic((metrics.requests, metrics.tunnels), metrics.request_ttft_seconds)


def test_a_second_holds_what_ended_in_it_and_not_what_ended_before(metrics, traffic):
    entry = metrics.tunnels.labels
    entry(role="entry", outcome="complete").inc(3)
    first = traffic.sample()
    entry(role="entry", outcome="upstream_cut").inc()
    entry(role="entry", outcome="client_gone").inc()
    second = traffic.sample()
    assert (first.ended, first.failed) == (3, 0)
    assert (second.ended, second.failed) == (2, 1)


def test_tunnels_served_for_others_are_not_this_nodes_requests(metrics, traffic):
    metrics.tunnels.labels(role="exit", outcome="complete").inc(9)
    assert traffic.sample().ended == 0


def test_requests_of_the_gateway_and_plain_connections_count_alike(metrics, traffic):
    metrics.tunnels.labels(role="entry", outcome="complete").inc()
    for outcome in ("complete", "refused", "unserved"):
        metrics.requests.labels(outcome=outcome).inc()
    second = traffic.sample()
    assert (second.ended, second.failed) == (4, 1)


def test_what_was_counted_before_the_watch_began_is_not_told_as_one_second(metrics):
    metrics.tunnels.labels(role="entry", outcome="complete").inc(1000)
    assert (
        Traffic((metrics.requests, metrics.tunnels), metrics.request_ttft_seconds).sample().ended
        == 0
    )


def test_the_median_is_estimated_within_its_bucket(metrics, traffic):
    for _ in range(10):
        metrics.request_ttft_seconds.observe(0.03)  # between 0.025 and 0.05
    second = traffic.sample()
    assert second.first_bytes == 10
    assert second.ttft_p50 == pytest.approx(0.0375)
    assert traffic.sample().ttft_p50 is None


@pytest.mark.parametrize(
    ("share", "counts", "value"),
    [
        (0.5, [], None),
        (0.5, [(1.0, 0), (INF, 0)], None),
        (0.5, [(1.0, 4), (INF, 4)], 0.5),
        (0.75, [(1.0, 2), (2.0, 4), (INF, 4)], 1.5),
        (0.95, [(1.0, 0), (INF, 5)], 1.0),  # all beyond the last bound: no less than it
        (1.0, [(1.0, 2), (2.0, 2), (INF, 2)], 1.0),
    ],
)
def test_quantiles_are_prometheus_own(share, counts, value):
    assert quantile(share, counts) == value


def test_the_ring_holds_ten_minutes_and_counts_every_second(metrics, traffic):
    for _ in range(KEPT_SECONDS + 5):
        metrics.tunnels.labels(role="entry", outcome="complete").inc()
        traffic.sample()
    view = traffic.view()
    assert view["upto"] == KEPT_SECONDS + 5
    assert view["requests"] == [1] * KEPT_SECONDS
    assert view["ttft_p50_ms"] == [None] * KEPT_SECONDS
    assert traffic.latest() == {"upto": KEPT_SECONDS + 5, "step_s": 1} | {
        "requests": [1],
        "failures": [0],
        "ttft_p50_ms": [None],
        "ttft_p95_ms": [None],
    }
