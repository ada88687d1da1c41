"""The waiting room on the virtual clock: who is served when, and what the others are told."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

from meshnode.errors import AllFull, NoCandidate, Overloaded, RetriesSpent
from meshnode.metrics import Metrics
from meshnode.net.lease_queue import LeaseQueue


class Places:
    """So many places, each taken by a lease until it is given back."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.tries = 0

    def take(self) -> int:
        self.tries += 1
        if self.free == 0:
            raise AllFull("1 at its limit of 1")
        self.free -= 1
        return self.free


class Room:
    """A waiting room before some places, and what became of each who came."""

    def __init__(self, free: int = 0, **options) -> None:
        self.metrics = Metrics()
        self.queue = LeaseQueue(metrics=self.metrics, **options)
        self.places = Places(free)
        self.served: list[tuple[object, float]] = []
        self.failed: dict[object, str] = {}

    async def come(self, name, *, key="chat", places=None, **times) -> None:
        try:
            await self.queue.lease((places or self.places).take, key=key, **times)
        except NoCandidate as exc:
            self.failed[name] = str(exc)
        else:
            self.served.append((name, trio.current_time()))

    def give_back(self, places=None) -> None:
        (places or self.places).free += 1
        self.queue.wake()

    def counted(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"meshnode_{name}", labels)


@pytest.fixture
def line(nursery):
    """Let requests come one after another, and wait until all of them stand in line."""

    async def line(room, *names, **options):
        for name in names:

            async def come(name=name):
                await room.come(name, **options)

            nursery.start_soon(come)
            await trio.testing.wait_all_tasks_blocked()

    return line


async def test_a_request_for_which_there_is_room_does_not_wait(autojump_clock):
    room = Room(free=1)
    await room.come("first")
    assert room.served == [("first", 0.0)]
    assert room.counted("queue_wait_seconds_count", outcome="served") is None


async def test_requests_are_served_in_the_order_in_which_they_came(autojump_clock, line):
    room = Room()
    await line(room, *"abcd")
    assert (len(room.queue), room.counted("queue_length")) == (4, 4)
    for _ in range(4):
        room.give_back()
        await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["a", "b", "c", "d"]
    assert (len(room.queue), room.counted("queue_length")) == (0, 0)
    assert room.counted("queue_wait_seconds_count", outcome="served") == 4


async def test_places_that_come_free_together_are_all_taken_at_once(autojump_clock, line):
    room = Room()
    await line(room, *"abcd")
    room.places.free = 3
    room.queue.wake()
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["a", "b", "c"]


async def test_whoever_comes_while_others_wait_stands_behind_them(autojump_clock, line):
    room = Room()
    await line(room, "early")
    room.places.free = 1  # and nobody was woken yet
    await line(room, "late")
    assert room.served == []
    room.queue.wake()
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["early"]


async def test_one_that_was_called_for_nothing_goes_back_before_those_that_came_later(
    autojump_clock, line
):
    room = Room()
    await trio.sleep(5)
    await line(room, "second")
    await line(room, "first", since=1.0)
    room.give_back()
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["first"]
    await trio.sleep(60)
    assert list(room.failed) == ["second"]


async def test_its_time_runs_from_when_it_came(autojump_clock):
    room = Room(timeout=20.0)
    await trio.sleep(15)
    await room.come("a", since=0.0)
    assert trio.current_time() == pytest.approx(20.0)


async def test_whoever_asks_without_waiting_is_told_that_others_do(autojump_clock, line):
    room = Room()
    await line(room, "a")
    room.places.free = 1
    with pytest.raises(AllFull, match="1 requests for the same wait already"):
        room.queue.lease_now(room.places.take, key="chat")
    assert room.queue.lease_now(room.places.take, key="another") == 0


async def test_a_retry_that_the_budget_forbids_is_told_so_after_two_seconds(autojump_clock):
    class Spent(Places):
        def take(self):
            raise RetriesSpent("20 of 100 requests in flight are being retried already")

    room = Room()
    await room.come("a", places=Spent(free=0))
    assert 2.0 <= trio.current_time() <= 2.5
    assert room.failed["a"] == "20 of 100 requests in flight are being retried already"


async def test_only_the_first_of_a_line_tries(autojump_clock, line):
    room = Room()
    await line(room, *range(100))
    tries = room.places.tries
    for _ in range(10):
        room.queue.wake()
        await trio.testing.wait_all_tasks_blocked()
    assert room.places.tries == tries + 10


async def test_a_full_service_does_not_hold_up_requests_for_another(autojump_clock, line):
    room, other = Room(), Places(free=0)
    await line(room, "a", key="full")
    await line(room, "b", key="other", places=other)
    room.give_back(other)
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["b"]


async def test_what_comes_free_with_time_alone_is_noticed_within_half_a_second(
    autojump_clock, line
):
    room = Room()
    await line(room, "a")
    await trio.sleep(10.1)
    room.places.free = 1  # a hold that ran out: nobody says so
    await trio.sleep(0.5)
    assert [name for name, _ in room.served] == ["a"]


async def test_a_request_that_waited_too_long_is_told_so(autojump_clock):
    room = Room(timeout=20.0)
    await room.come("a")
    assert trio.current_time() == pytest.approx(20.0)
    assert room.failed["a"] == (
        "no peer had room within 20.0 s, and 0 more requests wait: 1 at its limit of 1"
    )
    assert room.counted("queue_wait_seconds_count", outcome="timeout") == 1
    assert len(room.queue) == 0


async def test_the_callers_own_deadline_goes_before_a_later_one(autojump_clock):
    room = Room(timeout=20.0)
    await room.come("a", deadline=3.0)
    assert trio.current_time() == pytest.approx(3.0)


async def test_those_behind_one_whose_time_is_over_go_on_waiting(autojump_clock, line):
    room = Room(timeout=20.0)
    await line(room, "a", deadline=3.0)
    await line(room, "b")
    await trio.sleep(5)
    assert list(room.failed) == ["a"]
    room.give_back()
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["b"]


async def test_more_than_may_wait_are_turned_away_at_once(autojump_clock, line):
    room = Room(length=2)
    await line(room, *"abc")
    assert room.failed["c"].startswith("2 requests wait already, and no more may")
    assert room.counted("queue_refused_total") == 1
    room.give_back()
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["a"]
    await line(room, "d")
    assert len(room.queue) == 2


async def test_the_bound_holds_over_all_kinds_of_requests(autojump_clock, line):
    room = Room(length=2)
    await line(room, "a", key="x")
    await line(room, "b", key="y")
    await line(room, "c", key="z")
    assert "1 at its limit of 1" in room.failed["c"]


async def test_no_waiting_room_turns_everybody_away_with_the_reason_of_the_full(autojump_clock):
    room = Room(length=0)
    with pytest.raises(Overloaded, match="1 at its limit of 1") as caught:
        await room.queue.lease(room.places.take, key="chat")
    assert caught.value.retry_after >= 1
    assert trio.current_time() == 0.0


async def test_a_client_that_goes_away_leaves_its_place_at_once(autojump_clock, line):
    room = Room(length=2)
    async with trio.open_nursery() as clients:
        clients.start_soon(room.come, "gone")
        await trio.testing.wait_all_tasks_blocked()
        await line(room, "next")
        clients.cancel_scope.cancel()
    assert len(room.queue) == 1
    assert room.counted("queue_wait_seconds_count", outcome="gone") == 1
    room.give_back()
    await trio.testing.wait_all_tasks_blocked()
    assert [name for name, _ in room.served] == ["next"]


async def test_a_client_that_goes_away_as_its_turn_comes_does_not_keep_the_place(
    autojump_clock, line
):
    room = Room()
    async with trio.open_nursery() as clients:
        clients.start_soon(room.come, "gone")
        await trio.testing.wait_all_tasks_blocked()
        await line(room, "next")
        room.give_back()
        clients.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    taken = Counter(name for name, _ in room.served)
    assert taken.total() == 1 - room.places.free
    assert set(taken) <= {"gone", "next"}
    assert len(room.queue) == 1 - taken["next"]


async def test_when_nobody_can_serve_any_more_those_who_wait_are_told_at_once(autojump_clock, line):
    class Gone(Places):
        gone = False

        def take(self):
            if self.gone:
                raise NoCandidate("no peer offers the service 'chat'")
            return super().take()

    room, places = Room(), Gone(free=0)
    await line(room, "a", "b", places=places)
    places.gone = True
    room.queue.wake()
    await trio.testing.wait_all_tasks_blocked()
    assert room.failed == dict.fromkeys("ab", "no peer offers the service 'chat'")
    assert room.counted("queue_wait_seconds_count", outcome="unserved") == 2
