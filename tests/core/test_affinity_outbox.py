"""What is told of warm caches when there is more to tell than room, and each node's share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.core.affinity_batch import AffinityBatch, decode, encode, unpack_blocks
from meshnode.core.affinity_outbox import (
    MAX_AGE,
    MAX_PENDING_BLOCKS,
    MIN_BATCH_BYTES,
    TOTAL_BYTES,
    Outbox,
    Share,
)
from meshnode.core.model_router import Observed

PEER = "12D3KooW" + "p" * 44


def observed(*blocks: int, model: str = "m", peer: str = PEER, service: str = "llm") -> Observed:
    return Observed(model, blocks, (peer, service))


def told(batch: AffinityBatch) -> set[Observed]:
    """Return the runs of a batch as observations."""
    return {
        Observed(
            batch.models[run.model],
            unpack_blocks(run.blocks),
            (batch.places[run.place].id, batch.places[run.place].service_id),
        )
        for run in batch.runs
    }


def test_requests_of_one_model_at_one_service_share_a_run_in_the_order_of_time() -> None:
    outbox = Outbox()
    outbox.add(observed(1, 2), 0.0)
    outbox.add(observed(9, model="n"), 0.1)
    outbox.add(observed(3, 4), 0.2)
    taken = outbox.take(8192, 1.0)
    assert taken is not None and taken[1] == 5
    assert told(taken[0]) == {observed(1, 2, 3, 4), observed(9, model="n")}
    assert not outbox and outbox.take(8192, 1.0) is None


def test_a_block_that_changed_hands_twice_is_told_once_as_it_stands() -> None:
    outbox = Outbox()
    outbox.add(observed(1, 2, peer="a"), 0.0)
    outbox.add(observed(1, 2, 3, peer="b"), 0.1)
    taken = outbox.take(8192, 1.0)
    assert taken is not None
    assert told(taken[0]) == {observed(1, 2, 3, peer="b")}


def test_the_newest_goes_first_and_what_grew_too_old_is_dropped_and_counted() -> None:
    outbox = Outbox()
    for number in range(200):
        outbox.add(observed(number), number / 100)
    taken = outbox.take(MIN_BATCH_BYTES, 2.0)
    assert taken is not None
    ((run,), count) = told(taken[0]), taken[1]
    assert run.blocks == tuple(range(200 - count, 200)) and 20 < count < 100
    assert outbox.dropped == 0
    assert outbox.take(8192, 2.0 + MAX_AGE) is None
    assert outbox.dropped == 200 - count and not outbox


def test_what_waits_is_bounded() -> None:
    outbox = Outbox()
    for number in range(MAX_PENDING_BLOCKS):
        outbox.add(observed(2 * number, 2 * number + 1), 0.0)
    assert outbox.dropped == MAX_PENDING_BLOCKS


def test_what_the_wire_has_no_form_for_is_not_told() -> None:
    outbox = Outbox()
    outbox.add(observed(1, model=""), 0.0)  # a request that named no model
    outbox.add(observed(1, model="m" * 200), 0.0)
    outbox.add(observed(1, model="\ud800"), 0.0)
    assert not outbox


OBSERVATIONS = st.lists(
    st.builds(
        Observed,
        st.text("abcé", min_size=1, max_size=100),
        st.lists(st.integers(0, 2**48 - 1), min_size=1, max_size=64).map(tuple),
        st.tuples(st.text("pqr", min_size=1, max_size=52), st.text("sé", max_size=64)),
    ),
    max_size=40,
)


@given(given=OBSERVATIONS, room=st.integers(MIN_BATCH_BYTES, 8192))
def test_a_batch_never_takes_more_than_its_room_and_invents_nothing(
    given: list[Observed], room: int
) -> None:
    outbox = Outbox()
    for each in given:
        outbox.add(each, 0.0)
    true = {(each.model, each.place, block) for each in given for block in each.blocks}
    while (taken := outbox.take(room, 1.0)) is not None:
        data = encode(taken[0])
        assert len(data) <= room
        read = told(decode(data))
        assert sum(len(each.blocks) for each in read) == taken[1]
        assert {(each.model, each.place, block) for each in read for block in each.blocks} <= true
    assert outbox.take(8192, 1.0) is not None or not outbox


# Shares


def test_one_that_speaks_alone_may_say_all_after_a_soft_beginning() -> None:
    share, rooms = Share(), []
    for second in range(5):
        rooms.append(share.room(second))
        share.said(rooms[-1], second)
        assert share.next_at(second) == second + 1.0
    assert rooms == [1024, 2048, 4096, 8192, 8192]
    assert share.room(60.0) == 1024  # it was silent


def test_a_share_shrinks_with_the_number_of_those_that_speak_and_grows_back() -> None:
    share = Share()
    share.said(8192, 0.0)
    for number in range(49):
        share.heard(f"p{number}", 0.5)
    assert share.room(1.0) == TOTAL_BYTES // 50 == 1310
    share.said(1310, 9.0)
    assert share.room(10.6) == 2620  # the others have been silent for ten seconds
    for number in range(1023):
        share.heard(f"p{number}", 11.0)
    share.said(512, 11.0)
    assert share.room(12.0) == MIN_BATCH_BYTES
    assert share.next_at(12.0) == 11.0 + 1024 * MIN_BATCH_BYTES / TOTAL_BYTES == 19.0
