"""The yamux state machine: what arrives, and what leaves."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshnode.errors import PeerRefused, PeerUnreachable, StreamClosed, StreamReset, WireError
from meshnode.net.libp2p.yamux import Connection
from meshnode.net.libp2p.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    MAX_MESSAGE,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Limits,
)
from meshnode.net.libp2p.yamux_stream import Stream

KIB = 1024


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream_id: int
    length: int
    body: bytes = b""


def frame(kind: int, flags: int, stream_id: int, length: int, *, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, length) + body


def data_frame(stream_id: int, body: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream_id, len(body), body=body)


def parse(wire: bytes) -> list[Frame]:
    frames = []
    while wire:
        version, kind, flags, stream_id, length = HEADER.unpack_from(wire)
        assert version == 0
        end = HEADER.size + (length if kind == DATA else 0)
        frames.append(Frame(kind, flags, stream_id, length, wire[HEADER.size : end]))
        wire = wire[end:]
    return frames


def sent_by(connection: Connection) -> list[Frame]:
    frames = []
    while connection.has_output:
        message = connection.next_message()
        assert len(message) <= MAX_MESSAGE
        frames += parse(message)
    return frames


def shuttle(*pair: Connection) -> None:
    """Carry bytes both ways until nobody has anything to say."""
    here, there = pair
    while here.has_output or there.has_output:
        there.receive(here.next_message())
        here.receive(there.next_message())


def make_pair(limits: Limits | None = None) -> tuple[Connection, Connection]:
    return (
        Connection(is_initiator=True, limits=limits),
        Connection(is_initiator=False, limits=limits),
    )


def open_pair(limits: Limits | None = None) -> tuple[Connection, Connection, Stream, Stream]:
    """Two connections with one stream between them, its SYN and ACK exchanged."""
    here, there = make_pair(limits)
    ours = here.open()
    assert write(ours, b"hello") == 5
    shuttle(here, there)
    theirs = there.accept()
    assert theirs is not None
    assert theirs.read(100) == b"hello"
    write(theirs, b"welcome")
    shuttle(here, there)
    assert ours.read(100) == b"welcome"
    return here, there, ours, theirs


def write(stream: Stream, data: bytes) -> int:
    return stream.write(memoryview(data))


# Opening.


def test_an_open_that_is_given_up_at_once_costs_the_peer_nothing() -> None:
    connection = Connection(is_initiator=True)
    connection.open().reset()
    connection.open().abandon()
    assert connection.stream_count == 0
    assert not connection.has_output


def test_the_syn_rides_on_the_first_data() -> None:
    connection = Connection(is_initiator=True)
    write(connection.open(), b"hello")
    assert sent_by(connection) == [Frame(DATA, SYN, 1, 5, b"hello")]


def test_a_reader_that_waits_tells_the_peer_of_the_stream() -> None:
    connection = Connection(is_initiator=False)
    assert connection.open().read(1) is None
    assert sent_by(connection) == [Frame(WINDOW_UPDATE, SYN, 2, 0)]


def test_stream_ids_rise_in_the_order_of_the_syns() -> None:
    connection = Connection(is_initiator=True)
    first, second = connection.open(), connection.open()
    write(second, b"x")
    write(first, b"y")
    assert [sent.stream_id for sent in sent_by(connection)] == [1, 3]
    assert (second.id, first.id) == (1, 3)


def test_an_ack_goes_with_whatever_is_sent_next() -> None:
    connection = Connection(is_initiator=False)
    connection.receive(data_frame(1, b"x", SYN))
    assert not connection.has_output
    stream = connection.accept()
    assert stream is not None
    write(stream, b"y")
    assert sent_by(connection) == [Frame(DATA, ACK, 1, 1, b"y")]


def test_acks_are_not_withheld_from_a_peer_that_opens_many_streams() -> None:
    connection = Connection(is_initiator=False)
    for stream_id in range(1, 2 * 64, 2):
        connection.receive(frame(WINDOW_UPDATE, SYN, stream_id, 0))
    # Those that nobody takes are not acknowledged: the peer must not send more and more.
    assert not connection.has_output
    while connection.accept():
        pass
    assert [sent.flags for sent in sent_by(connection)] == [ACK] * 64


def test_no_more_than_256_syns_are_under_way_and_the_others_keep_their_bytes() -> None:
    here, there = make_pair()
    opened = [here.open() for _ in range(1000)]
    for number, stream in enumerate(opened):
        write(stream, b"%d" % number)
        stream.abandon()
    accepted = []
    while len(accepted) < 1000:
        frames = sent_by(here)
        assert 0 < len(frames) <= 256
        for sent in frames:
            there.receive(frame(sent.kind, sent.flags, sent.stream_id, sent.length, body=sent.body))
        while stream := there.accept():
            accepted.append(stream.read(100))
            stream.finish()
        for sent in sent_by(there):
            assert not sent.flags & RST
            here.receive(frame(sent.kind, sent.flags, sent.stream_id, sent.length))
    assert accepted == [b"%d" % number for number in range(1000)]
    assert (here.stream_count, there.stream_count) == (0, 0)


def test_a_stream_that_waits_to_be_announced_can_be_given_up() -> None:
    connection = Connection(is_initiator=True)
    opened = [connection.open() for _ in range(300)]
    for stream in opened:
        write(stream, b"x")
    sent_by(connection)
    for stream in reversed(opened):
        stream.reset()
    assert all(sent.flags == RST for sent in sent_by(connection))
    assert connection.stream_count == connection.queued == 0


def test_a_fin_never_shares_a_frame_with_an_ack_because_py_libp2p_overlooks_it() -> None:
    connection = Connection(is_initiator=False)
    connection.receive(data_frame(1, b"x", SYN))
    stream = connection.accept()
    assert stream is not None
    write(stream, b"y" * MAX_MESSAGE)
    stream.finish()
    frames = sent_by(connection)
    assert frames[0] == Frame(WINDOW_UPDATE, ACK, 1, 0)
    assert [sent.flags for sent in frames[1:]] == [0, FIN]
    assert b"".join(sent.body for sent in frames) == b"y" * MAX_MESSAGE


def test_the_peer_is_told_of_a_reset_only_if_it_knows_the_stream() -> None:
    connection = Connection(is_initiator=True)
    stream = connection.open()
    write(stream, b"never sent")
    stream.reset()
    assert sent_by(connection) == []


# The two ends of a stream.


def test_a_fin_reads_as_an_end_and_leaves_the_other_way_open() -> None:
    here, there, ours, theirs = open_pair()
    write(ours, b"last words")
    ours.finish()
    shuttle(here, there)
    assert theirs.read(100) == b"last words"
    assert theirs.read(100) == b""
    assert theirs.read(100) == b""
    write(theirs, b"answer")
    shuttle(here, there)
    assert ours.read(100) == b"answer"


def test_a_reset_reads_as_a_cut_behind_what_came_before_it() -> None:
    here, there, ours, theirs = open_pair()
    write(ours, b"half an ans")
    shuttle(here, there)
    ours.reset()
    shuttle(here, there)
    assert theirs.read(100) == b"half an ans"
    with pytest.raises(StreamReset, match="the peer reset"):
        theirs.read(100)
    with pytest.raises(StreamReset):
        write(theirs, b"x")


def test_the_death_of_the_connection_reads_as_a_cut() -> None:
    here, _, ours, _ = open_pair()
    here.end("the connection was lost")
    with pytest.raises(StreamReset, match="lost"):
        ours.read(100)
    with pytest.raises(StreamReset, match="lost"):
        write(ours, b"x")
    with pytest.raises(PeerUnreachable, match="lost"):
        here.open()


def test_an_answer_that_came_whole_is_read_whole_after_the_connection_died() -> None:
    here, there, ours, theirs = open_pair()
    write(ours, b"whole")
    ours.finish()
    shuttle(here, there)
    there.end("the connection was lost")
    assert theirs.read(100) == b"whole"
    assert theirs.read(100) == b""


def test_own_reset_and_own_end_say_that_they_were_own() -> None:
    _, _, ours, theirs = open_pair()
    ours.finish()
    with pytest.raises(StreamClosed):
        write(ours, b"x")
    theirs.reset()
    with pytest.raises(StreamClosed):
        theirs.read(1)
    with pytest.raises(StreamClosed):
        write(theirs, b"x")


def test_both_tables_are_empty_once_both_sides_ended() -> None:
    here, there, ours, theirs = open_pair()
    ours.finish()
    shuttle(here, there)
    assert (here.stream_count, there.stream_count) == (1, 1)
    theirs.finish()
    shuttle(here, there)
    assert (here.stream_count, there.stream_count) == (0, 0)
    assert not here.streams
    assert not there.streams


def test_an_abandoned_stream_lets_the_peer_finish() -> None:
    here, there, ours, theirs = open_pair()
    write(ours, b"bye")
    ours.abandon()
    shuttle(here, there)
    assert theirs.read(100) == b"bye"
    assert theirs.read(100) == b""
    write(theirs, b"nobody hears this")
    theirs.finish()
    shuttle(here, there)
    assert (here.stream_count, there.stream_count) == (0, 0)


def test_a_peer_that_goes_on_sending_to_an_abandoned_stream_is_reset() -> None:
    here, there, ours, theirs = open_pair()
    ours.abandon()
    write(theirs, b"x" * 200 * KIB)
    shuttle(here, there)
    assert (here.stream_count, there.stream_count) == (0, 0)
    with pytest.raises(StreamReset):
        write(theirs, b"x")


# Windows.


def test_tiny_reads_send_no_window_update_before_half_the_window_is_used() -> None:
    connection = Connection(is_initiator=False)
    connection.receive(data_frame(1, b"x" * 200 * KIB, SYN))
    stream = connection.accept()
    assert stream is not None
    for _ in range(128 * KIB - 1):
        stream.read(1)
    assert not connection.has_output
    stream.read(1)
    assert sent_by(connection) == [Frame(WINDOW_UPDATE, ACK, 1, 128 * KIB)]


def test_a_writer_stops_at_the_window_and_goes_on_when_the_reader_reads() -> None:
    here, there, ours, theirs = open_pair()
    big = b"x" * 256 * KIB
    assert write(ours, big) == len(big)
    shuttle(here, there)
    write(ours, b"more")
    shuttle(here, there)
    # "hello" took five bytes of the window.
    assert theirs.unread == INITIAL_WINDOW - 5
    assert ours.queued == 5 + 4
    assert theirs.read(INITIAL_WINDOW) == b"x" * (INITIAL_WINDOW - 5)
    shuttle(here, there)
    assert theirs.read(INITIAL_WINDOW) == b"xxxxxmore"
    assert ours.queued == 0


def test_the_send_buffer_is_bounded_and_tells_when_half_of_it_is_free() -> None:
    here, there, ours, theirs = open_pair()
    woken = []
    ours.on_writable = lambda: woken.append(ours.queued)
    assert write(ours, b"x" * 300 * KIB) == 256 * KIB
    assert write(ours, b"x") == 0
    shuttle(here, there)
    assert woken
    assert max(woken) <= 128 * KIB
    assert theirs.unread > 0


def drain(here: Connection, there: Connection, ours: Stream, theirs: Stream, total: int) -> None:
    while total > 0:
        total -= write(ours, b"x" * min(total, 64 * KIB))
        shuttle(here, there)
        while theirs.read(INITIAL_WINDOW):
            pass
        shuttle(here, there)


def test_the_window_grows_to_one_mebibyte_for_a_reader_that_keeps_up() -> None:
    here, there, ours, theirs = open_pair()
    drain(here, there, ours, theirs, 3 * 1024 * KIB)
    assert theirs.window == 1024 * KIB
    assert theirs.recv_credit + theirs._consumed == theirs.window


def test_the_window_of_a_reader_that_lags_does_not_grow() -> None:
    here, there, ours, theirs = open_pair()
    for _ in range(40):
        write(ours, b"x" * 64 * KIB)
        shuttle(here, there)
        theirs.read(48 * KIB)
    assert theirs.window == INITIAL_WINDOW


def test_all_windows_together_grow_no_further_than_their_bound() -> None:
    limits = Limits(growth=256 * KIB)
    here, there, ours, theirs = open_pair(limits)
    drain(here, there, ours, theirs, 2 * 1024 * KIB)
    assert theirs.window == 512 * KIB
    ours.reset()
    shuttle(here, there)
    another = here.open()
    write(another, b"hello")
    shuttle(here, there)
    accepted = there.accept()
    assert accepted is not None
    drain(here, there, another, accepted, 2 * 1024 * KIB)
    assert accepted.window == 512 * KIB  # what the first stream gave back


def test_a_window_sent_in_tiny_frames_is_kept_in_little_more_than_its_bytes() -> None:
    connection = Connection(is_initiator=False)
    connection.receive(frame(WINDOW_UPDATE, SYN, 1, 0))
    connection.receive(data_frame(1, b"ab") * 100_000)
    stream = connection.accept()
    assert stream is not None
    assert len(stream._inbox) < 20
    assert stream.read(7) == b"ab"
    received = b""
    while (more := stream.read(1001)) is not None:
        received += more
    assert received == b"ab" * 99_999


# Messages.


def test_one_message_carries_the_small_frames_of_many_streams() -> None:
    connection = Connection(is_initiator=True)
    for _ in range(100):
        write(connection.open(), b"x" * 50)
    assert len(parse(connection.next_message())) == 100
    assert not connection.has_output


def test_a_bulk_stream_does_not_starve_a_small_one() -> None:
    connection = Connection(is_initiator=True)
    bulk, small = connection.open(), connection.open()
    write(bulk, b"x" * 200 * KIB)
    assert [sent.stream_id for sent in parse(connection.next_message())] == [bulk.id]
    write(small, b"y")
    write(bulk, b"x" * 50 * KIB)
    second, third = parse(connection.next_message()), parse(connection.next_message())
    assert small.id in [sent.stream_id for sent in second + third[:1]]


def test_bulk_frames_fill_one_noise_message_each() -> None:
    connection = Connection(is_initiator=True)
    write(connection.open(), b"x" * 256 * KIB)
    lengths = [sent.length for sent in sent_by(connection)]
    assert lengths == [65507, 65507, 65507, 65507, 256 * KIB - 4 * 65507]


# The connection.


def test_a_ping_is_answered_with_its_own_number() -> None:
    here, there = make_pair()
    opaque = here.ping()
    shuttle(here, there)
    assert here.pongs == [opaque]


def test_goodbye_follows_everything_that_was_queued() -> None:
    connection = Connection(is_initiator=True)
    stream = connection.open()
    write(stream, b"last words")
    stream.finish()
    connection.say_goodbye()
    assert [sent.kind for sent in sent_by(connection)] == [DATA, GO_AWAY]
    assert connection.said_goodbye
    with pytest.raises(PeerUnreachable):
        connection.open()


def test_goodbye_waits_for_a_full_window_only_until_it_is_hurried() -> None:
    here, there, ours, _ = open_pair()
    write(ours, b"x" * 256 * KIB)
    shuttle(here, there)
    here.say_goodbye()
    assert not here.has_output
    here.hurry()
    assert [sent.kind for sent in sent_by(here)] == [GO_AWAY]


def test_open_streams_outlive_a_goodbye_of_the_peer_but_no_new_ones_begin() -> None:
    here, _, ours, _ = open_pair()
    here.receive(frame(GO_AWAY, 0, 0, 0))
    with pytest.raises(PeerUnreachable):
        here.open()
    here.receive(data_frame(ours.id, b"still here"))
    assert ours.read(100) == b"still here"


def test_the_stream_beyond_the_limit_is_refused_at_once() -> None:
    connection = Connection(is_initiator=True, limits=Limits(streams=2))
    first = connection.open()
    connection.open()
    with pytest.raises(PeerRefused, match="limit"):
        connection.open()
    first.reset()
    connection.open()


def test_inbound_streams_beyond_the_limit_are_reset_with_their_data() -> None:
    connection = Connection(is_initiator=False, limits=Limits(streams=1))
    connection.receive(data_frame(1, b"a", SYN) + data_frame(3, b"b", SYN) + data_frame(1, b"c"))
    stream = connection.accept()
    assert stream is not None
    assert stream.read(10) == b"ac"
    assert sent_by(connection)[0] == Frame(WINDOW_UPDATE, RST, 3, 0)
    assert connection.stream_count == 1


def test_inbound_streams_beyond_the_backlog_are_reset() -> None:
    connection = Connection(is_initiator=False, limits=Limits(accept_backlog=2))
    for stream_id in (1, 3, 5):
        connection.receive(frame(WINDOW_UPDATE, SYN, stream_id, 0))
    assert sent_by(connection)[0] == Frame(WINDOW_UPDATE, RST, 5, 0)


def test_a_stream_that_was_reset_before_it_was_taken_is_not_handed_out() -> None:
    connection = Connection(is_initiator=False)
    connection.receive(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, RST, 1, 0))
    assert connection.accept() is None
    assert connection.stream_count == 0


@pytest.mark.parametrize("provoke", [frame(PING, SYN, 0, 7), frame(WINDOW_UPDATE, SYN, 3, 0)])
def test_a_peer_that_provokes_answers_and_reads_none_is_cut_off(provoke: bytes) -> None:
    connection = Connection(is_initiator=False, limits=Limits(streams=1, control_frames=100))
    connection.receive(frame(WINDOW_UPDATE, SYN, 1, 0))
    connection.receive(provoke * 100)
    with pytest.raises(WireError) as caught:
        connection.receive(provoke)
    assert caught.value.code == "control_flood"


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (HEADER.pack(1, DATA, 0, 1, 0), "bad_version"),
        (frame(4, 0, 1, 0), "bad_type"),
        (frame(WINDOW_UPDATE, SYN, 0, 0), "bad_stream_id"),
        (frame(WINDOW_UPDATE, SYN, 2, 0), "bad_stream_id"),
        (frame(WINDOW_UPDATE, SYN, 1, 0) * 2, "duplicate_stream"),
        (frame(DATA, SYN, 1, INITIAL_WINDOW + 1), "window_overrun"),
        (frame(WINDOW_UPDATE, SYN, 1, 2**32 - 1), "window_overflow"),
        (frame(WINDOW_UPDATE, SYN | FIN, 1, 0) + data_frame(1, b"x"), "data_after_fin"),
    ],
)
def test_a_frame_that_breaks_the_protocol_is_named(wire: bytes, code: str) -> None:
    connection = Connection(is_initiator=False)
    with pytest.raises(WireError) as caught:
        connection.receive(wire)
    assert caught.value.code == code


def test_frames_of_a_stream_that_is_gone_were_on_their_way_and_are_overlooked() -> None:
    here, there, ours, theirs = open_pair()
    write(theirs, b"on its way")
    crossing = there.next_message()
    ours.reset()
    here.receive(crossing + frame(WINDOW_UPDATE, RST, 99, 0) + data_frame(99, b"x", FIN))
    assert here.stream_count == 0


HEADERS = st.builds(
    HEADER.pack,
    st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1]),
    st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]),
    st.one_of(st.sampled_from([0, 1, 2, 4, 8]), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)),
)


@given(st.lists(st.one_of(HEADERS, st.binary(max_size=40)), max_size=20), st.randoms())
def test_garbage_is_a_fault_of_the_peer_and_nothing_else(
    pieces: list[bytes], rng: random.Random
) -> None:
    connection = Connection(is_initiator=False)
    write(connection.open(), b"hello")
    wire = b"".join(pieces)
    # WireError is the one exception that may come of bytes.
    with suppress(WireError):
        while wire:
            cut = rng.randint(1, len(wire))
            connection.receive(wire[:cut])
            wire = wire[cut:]
            if stream := connection.accept():
                stream.read(rng.randint(1, 10))
    sent_by(connection)
    connection.end("over")
    assert connection.stream_count == 0


# Both sides together, against a model.

BLOB = random.Random(1).randbytes(1 << 20)


class Way:
    """The model of one direction of one stream."""

    def __init__(self) -> None:
        self.written = 0
        self.read = 0
        self.finished = False  # by its writer
        self.ended = False  # as its reader saw


class TwoSides(RuleBasedStateMachine):
    """Two connections, and between them bytes that arrive in any pieces at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)
        limits = Limits(streams=6, accept_backlog=3, send_buffer=200 * KIB)
        self.sides = make_pair(limits)
        self.wires = [bytearray(), bytearray()]  # what side 0, 1 sent
        self.held: list[list[Stream]] = [[], []]
        # By (stream ID, who writes); one per stream and direction.
        self.ways: dict[tuple[int, int], Way] = {}
        self.was_reset: set[int] = set()  # by whichever side, or refused

    @initialize(rng=st.randoms(use_true_random=False))
    def seed(self, rng: random.Random) -> None:
        self.rng = rng

    def way(self, stream: Stream, writer: int) -> Way:
        return self.ways.setdefault((stream.id, writer), Way())

    def pick(self, side: int) -> Stream | None:
        return self.rng.choice(self.held[side]) if self.held[side] else None

    @rule(side=st.integers(0, 1))
    def open(self, side: int) -> None:
        connection = self.sides[side]
        if connection._outbound >= connection.limits.streams:
            with pytest.raises(PeerRefused):
                connection.open()
        else:
            self.held[side].append(connection.open())

    @rule(side=st.integers(0, 1))
    def accept(self, side: int) -> None:
        stream = self.sides[side].accept()
        if stream is not None:
            self.held[side].append(stream)

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 3, 600, 70_000, 250_000]))
    def write(self, side: int, size: int) -> None:
        stream = self.pick(side)
        if stream is None:
            return
        # The ID, by which the model knows it, comes with the first byte.
        way = self.way(stream, side) if stream.id else Way()
        size = min(size, len(BLOB) - way.written)
        if not size:
            return
        try:
            taken = write(stream, BLOB[way.written : way.written + size])
        except StreamClosed:
            assert stream.aborted or stream.fin_queued
            return
        except StreamReset:
            assert stream.id in self.was_reset
            return
        self.ways.setdefault((stream.id, side), way).written += taken
        assert stream.queued <= 200 * KIB

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 1000, 100_000, 1 << 20]))
    def read(self, side: int, size: int) -> None:
        stream = self.pick(side)
        if stream is not None:
            self.read_from(side, stream, size)

    def read_from(self, side: int, stream: Stream, size: int) -> bool:
        """Return whether something came."""
        try:
            data = stream.read(size)
        except StreamClosed:
            assert stream.aborted or stream.let_go
            return False
        except StreamReset:
            assert stream.id in self.was_reset
            return False
        way = self.way(stream, 1 - side)
        if data is None:
            assert not way.ended
            return False
        if not data:
            assert way.finished
            assert way.read == way.written
            way.ended = True
            return False
        assert len(data) <= size
        assert data == BLOB[way.read : way.read + len(data)]
        way.read += len(data)
        return True

    @rule(side=st.integers(0, 1))
    def finish(self, side: int) -> None:
        stream = self.pick(side)
        if stream is not None and not stream.gone:
            stream.finish()
            self.way(stream, side).finished = True

    @rule(side=st.integers(0, 1))
    def reset(self, side: int) -> None:
        stream = self.pick(side)
        if stream is not None:
            if not stream.gone:
                self.was_reset.add(stream.id)
            stream.reset()
            self.held[side].remove(stream)

    @rule(side=st.integers(0, 1))
    def abandon(self, side: int) -> None:
        stream = self.pick(side)
        if stream is not None:
            if stream.id and not stream.gone:
                self.way(stream, side).finished = True
                self.was_reset.add(stream.id)  # It may be, by a writer that goes on.
            stream.abandon()
            self.held[side].remove(stream)

    @rule(side=st.integers(0, 1))
    def send(self, side: int) -> None:
        message = self.sides[side].next_message()
        assert len(message) <= MAX_MESSAGE
        for sent in parse(message):
            if sent.flags & RST:
                self.was_reset.add(sent.stream_id)
        self.wires[side] += message

    @precondition(lambda self: any(self.wires))
    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 5, 12, 13, 1000, 100_000, 1 << 20]))
    def arrive(self, side: int, size: int) -> None:
        piece = bytes(self.wires[side][:size])
        del self.wires[side][:size]
        # A window overrun, a frame out of place, anything wrong: it raises WireError here.
        self.sides[1 - side].receive(piece)

    @invariant()
    def no_buffer_outgrows_its_window(self) -> None:
        for connection in self.sides:
            assert connection.queued == sum(s.queued for s in connection.streams.values())
            for stream in connection.streams.values():
                assert stream.unread <= stream.window <= connection.limits.max_window
                if not (stream.ended or stream.let_go):
                    # Every byte of the window is the peer's to send, on its way, or here.
                    coming = connection._body_left if connection._body_stream is stream else 0
                    here = stream.unread + stream._consumed
                    assert stream.recv_credit + coming + here == stream.window

    def carry_everything(self) -> None:
        busy = True
        while busy:
            busy = False
            for side in (0, 1):
                while self.sides[side].has_output:
                    self.send(side)
                if self.wires[side]:
                    busy = True
                    self.arrive(side, len(self.wires[side]))

    def teardown(self) -> None:
        self.carry_everything()
        for side in (0, 1):
            while stream := self.sides[side].accept():
                self.held[side].append(stream)
            for stream in self.held[side]:
                if not stream.gone:
                    stream.finish()
                    self.way(stream, side).finished = True
        # Whatever was not cut now arrives whole, and nothing stays in the tables.
        busy = True
        while busy:
            self.carry_everything()
            busy = False
            for side in (0, 1):
                # A peer's stream may have been announced only now, by its end.
                while stream := self.sides[side].accept():
                    stream.finish()
                    self.way(stream, side).finished = True
                    self.held[side].append(stream)
                    busy = True
                for stream in self.held[side]:
                    busy |= self.read_from(side, stream, 1 << 20)
        for side in (0, 1):
            for stream in self.held[side]:
                if stream.id not in self.was_reset:
                    assert self.way(stream, 1 - side).ended
        for connection in self.sides:
            for stream in list(connection.streams.values()):
                assert stream.id in self.was_reset
                stream.reset()
            assert connection.stream_count == 0
            assert connection.queued == 0


TestTwoSides = TwoSides.TestCase
TestTwoSides.settings = settings(max_examples=60, stateful_step_count=60)


# Bytes that wait for others.


def write_soon(stream: Stream, data: bytes) -> int:
    return stream.write(memoryview(data), soon=True)


def test_bytes_that_may_wait_leave_in_one_frame_with_the_next() -> None:
    here, _, ours, _ = open_pair()
    assert write_soon(ours, b"done") == 4
    assert not here.has_output
    write(ours, b"next")
    assert sent_by(here) == [Frame(DATA, 0, 1, 8, b"donenext")]
    assert not here.held


def test_bytes_that_may_wait_leave_alone_once_they_are_released() -> None:
    here, _, ours, _ = open_pair()
    write_soon(ours, b"done")
    here.release(tuple(here.held))
    assert sent_by(here) == [Frame(DATA, 0, 1, 4, b"done")]
    here.release([ours])  # whoever released them was late
    assert not here.has_output


def test_bytes_that_may_wait_leave_before_the_end_of_their_stream() -> None:
    here, _, ours, _ = open_pair()
    write_soon(ours, b"done")
    ours.finish()
    assert sent_by(here) == [Frame(DATA, FIN, 1, 4, b"done")]


def test_bytes_that_may_wait_do_not_go_before_those_that_wait_for_credit() -> None:
    here, there, ours, theirs = open_pair()
    size = ours.send_credit
    write(ours, bytes(size))
    shuttle(here, there)
    write(ours, b"first")
    write_soon(ours, b"second")
    while there.streams[1].unread:
        theirs.read(size)
    shuttle(here, there)
    here.release(tuple(here.held))
    shuttle(here, there)
    assert theirs.read(100) == b"firstsecond"


def test_a_reset_takes_with_it_what_may_wait() -> None:
    here, _, ours, _ = open_pair()
    write_soon(ours, b"done")
    ours.reset()
    assert not here.held
    assert here.queued == 0
    assert sent_by(here) == [Frame(WINDOW_UPDATE, RST, 1, 0)]


def test_the_first_bytes_of_a_stream_wait_for_nobody() -> None:
    connection = Connection(is_initiator=True)
    write_soon(connection.open(), b"hello")
    assert sent_by(connection) == [Frame(DATA, SYN, 1, 5, b"hello")]
