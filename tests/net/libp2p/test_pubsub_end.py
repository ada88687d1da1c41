"""The end of pubsub, step by step: at none of them does a late task meet a closed nursery."""

from __future__ import annotations

import trio

from support.pubsub_nodes import Node, running


class EveryStep(trio.abc.Instrument):
    """Starts a task in the pubsub's name after each step of any task, once armed."""

    def __init__(self) -> None:
        self.node: Node | None = None
        self.tried = 0
        self.failures: list[RuntimeError] = []

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.node is None or task.parent_nursery is None:
            return
        tasks = self.node.pubsub._pubsub._tasks
        nursery = tasks.nursery
        # Only once nothing else runs there: each task started would bring on the next.
        if nursery is not None and not nursery.child_tasks:
            self.tried += 1
            try:
                tasks.run_task(trio.lowlevel.checkpoint)
            except RuntimeError as exc:
                self.failures.append(exc)


async def test_a_task_that_comes_while_the_service_ends_meets_no_closed_nursery() -> None:
    steps = EveryStep()
    trio.lowlevel.add_instrument(steps)
    try:
        with trio.fail_after(10):
            async with running() as node:
                steps.node = node
    finally:
        trio.lowlevel.remove_instrument(steps)
    assert steps.failures == []
