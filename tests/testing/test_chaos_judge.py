"""The judge of a chaos run: a failure counts as true only where its cause was there."""

from __future__ import annotations

from random import Random

import pytest

from support.chaos import KINDS, Request, Timeline, Trouble, plan

HOSTS = ("a", "b", "c")


def timeline(*troubles: Trouble) -> Timeline:
    return Timeline(HOSTS, list(troubles))


def asked(outcome, *, host=None, status=None, error="", began=10.0, ended=12.0) -> Request:
    return Request("entry", began, ended, True, outcome, host, status, error)


@pytest.mark.parametrize("kind", ["kill", "stop", "engine"])
def test_a_cut_is_true_if_its_host_was_struck_meanwhile(kind):
    struck = timeline(Trouble("a", kind, 11.0, 15.0))
    assert struck.untruth(asked("cut", host="a")) is None
    assert struck.untruth(asked("cut", host="b")) is not None
    assert struck.untruth(asked("cut", host="a", began=16.0, ended=17.0)) is not None
    assert struck.untruth(asked("cut", host="a", began=8.0, ended=9.0)) is not None


def test_a_host_that_terminates_cuts_nothing():
    assert timeline(Trouble("a", "terminate", 11.0)).untruth(asked("cut", host="a")) is not None


def test_a_cut_before_any_answer_is_never_true():
    assert timeline(Trouble("a", "kill", 11.0)).untruth(asked("cut")) is not None


def test_503_is_true_only_if_nobody_could_serve_all_the_while():
    two = timeline(Trouble("a", "kill", 9.0), Trouble("b", "stop", 9.0))
    assert "c could" in (two.untruth(asked("status", status=503)) or "")
    three = timeline(*two.troubles, Trouble("c", "terminate", 1.0, 11.0))
    assert three.untruth(asked("status", status=503)) is None
    assert three.untruth(asked("status", status=503, began=11.5)) is not None


def test_502_is_true_if_as_many_were_struck_as_it_says():
    one = timeline(Trouble("a", "kill", 11.0))
    said = "1 of the peers were tried, and none served this request: reset"
    assert one.untruth(asked("status", status=502, error=said)) is None
    more = said.replace("1", "2")
    assert one.untruth(asked("status", status=502, error=more)) is not None
    assert one.untruth(asked("status", status=502, error="?")) is not None


@pytest.mark.parametrize("outcome", ["disconnected", "timeout", "wrong"])
def test_some_failures_have_no_excuse(outcome):
    everything = timeline(*(Trouble(host, "kill", 0.0) for host in HOSTS))
    assert everything.untruth(asked(outcome, host="a")) is not None
    assert everything.untruth(asked("status", status=500)) is not None
    assert everything.untruth(asked("served", host="a")) is None


def test_a_plan_follows_its_seed_and_leaves_time_to_recover():
    first, again, other = (plan(Random(s), HOSTS, minutes=20, every=3.0) for s in (1, 1, 2))
    assert first == again != other
    assert {fault.kind for fault in first} == set(KINDS)
    assert {fault.host for fault in first} == set(HOSTS)
    assert 300 < len(first) < 500
    assert all(0 <= fault.at <= 20 * 60 - 30 for fault in first)
    assert plan(Random(1), HOSTS, minutes=0.5, every=3.0)[-1].at <= 15
