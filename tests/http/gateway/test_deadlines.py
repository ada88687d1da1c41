"""Waits for peers end at their time, by one task, on a virtual clock."""

from __future__ import annotations

import trio

from meshnode.http.gateway.deadlines import LOOK_INTERVAL, Deadlines


class Silent:
    """An exchange whose peer says nothing; notes when it was given up."""

    def __init__(self):
        self.reset_at = []

    def reset(self):
        self.reset_at.append(trio.current_time())


async def test_only_what_is_overdue_is_given_up_and_at_most_one_look_late(nursery, autojump_clock):
    deadlines = Deadlines()
    nursery.start_soon(deadlines.look_forever)
    began = trio.current_time()
    short, long, answered = Silent(), Silent(), Silent()
    deadlines.begin(long, began + 300)
    wait = deadlines.begin(short, began + 3)
    other = deadlines.begin(answered, began + 3)
    await trio.sleep(2.9)
    deadlines.end(other)
    deadlines.end(other)
    assert not short.reset_at
    await trio.sleep(10)
    assert wait.is_over
    assert not other.is_over
    assert len(short.reset_at) == 1
    assert 0 <= short.reset_at[0] - began - 3 <= LOOK_INTERVAL + 0.001
    assert not answered.reset_at
    assert not long.reset_at
    assert len(deadlines) == 1


async def test_a_wait_whose_time_moves_on_is_given_up_at_the_later_one(nursery, autojump_clock):
    deadlines = Deadlines()
    nursery.start_soon(deadlines.look_forever)
    began = trio.current_time()
    silent = Silent()
    wait = deadlines.begin(silent, began + 3)
    await trio.sleep(2)
    wait.due = began + 60
    await trio.sleep(50)
    assert not silent.reset_at
    await trio.sleep(11)
    assert len(silent.reset_at) == 1
    assert len(deadlines) == 0


async def test_with_nothing_to_wait_for_it_sleeps_and_wakes_for_the_next(nursery, autojump_clock):
    deadlines = Deadlines()
    nursery.start_soon(deadlines.look_forever)
    for _ in range(2):
        await trio.sleep(1000)
        silent = Silent()
        deadlines.begin(silent, trio.current_time() + 1)
        await trio.sleep(2)
        assert len(silent.reset_at) == 1
