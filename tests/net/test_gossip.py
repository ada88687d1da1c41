from __future__ import annotations

from itertools import pairwise

import pytest
import trio
from structlog.testing import capture_logs

from meshnode.core.ledger import Observation
from meshnode.core.node_data import MAX_ENVELOPE_BYTES, NodeData, ServiceData, encode
from meshnode.errors import WireError
from meshnode.net.gossip import announce_topic
from meshnode.net.mesh import Verdict


def says(node, **fields):
    """An announcement of ``node``, sealed by it."""
    fields = {"id": node.peer_id, "seq": 10, "name": node.name, **fields}
    return node.mesh.seal(encode(NodeData(**fields)))


@pytest.fixture
def pair(make_node):
    """Two nodes that do not run: what one says, the other hears by hand."""
    return make_node("hearer"), make_node("speaker")


def test_the_topic_names_the_network():
    assert announce_topic("lab") == "/meshnode/lab/announce/1.0.0"


async def test_an_announcement_is_heard_and_forwarded(pair):
    hearer, speaker = pair
    assert hearer.hearer.hear(speaker.peer_id, says(speaker)) is Verdict.ACCEPT
    assert hearer.online() == {"speaker"}
    assert hearer.counted("announcements_total", direction="received") == 1


async def test_a_replayed_announcement_is_not_a_sign_of_life(pair, autojump_clock):
    hearer, speaker = pair
    envelope = says(speaker)
    hearer.hearer.hear(speaker.peer_id, envelope)
    await trio.sleep(39)
    assert hearer.hearer.hear(speaker.peer_id, envelope) is Verdict.IGNORE
    assert hearer.hearer.hear(speaker.peer_id, says(speaker, seq=9)) is Verdict.IGNORE
    await trio.sleep(1)
    assert hearer.online() == set()
    assert hearer.counted("announcements_rejected_total", reason="stale") == 2


async def test_what_is_malformed_or_forged_is_rejected_and_counted(pair):
    hearer, speaker = pair
    other_id = "12D3KooWother"
    garbled = bytearray(says(speaker))
    garbled[-1] ^= 1
    wrong = [
        ("too_large", speaker.peer_id, bytes(MAX_ENVELOPE_BYTES + 1)),
        ("bad_envelope", speaker.peer_id, b"garbage"),
        ("bad_envelope", speaker.peer_id, b""),
        ("bad_envelope", speaker.peer_id, bytes(garbled)),
        ("bad_msgpack", speaker.peer_id, speaker.mesh.seal(b"\xc1")),
        ("bad_field", speaker.peer_id, speaker.mesh.seal(b"\x80")),
        ("wrong_signer", other_id, says(speaker)),
        ("wrong_signer", speaker.peer_id, says(speaker, id=other_id)),
    ]
    for reason, sender, envelope in wrong:
        before = hearer.counted("announcements_rejected_total", reason=reason)
        assert hearer.hearer.hear(sender, envelope) is Verdict.REJECT
        assert hearer.counted("announcements_rejected_total", reason=reason) == before + 1
    assert len(hearer.ledger) == 0


async def test_a_talkative_origin_is_limited_and_the_others_are_not(
    pair, make_node, autojump_clock
):
    hearer, speaker = pair
    other = make_node("other")
    verdicts = [hearer.hearer.hear(speaker.peer_id, says(speaker, seq=n)) for n in range(1, 31)]
    assert verdicts.count(Verdict.ACCEPT) == 15
    assert hearer.counted("announcements_rejected_total", reason="rate_limited") == 15
    assert hearer.hearer.hear(other.peer_id, says(other)) is Verdict.ACCEPT
    await trio.sleep(1)
    verdicts = [hearer.hearer.hear(speaker.peer_id, says(speaker, seq=n)) for n in range(40, 44)]
    assert verdicts.count(Verdict.ACCEPT) == 2


@pytest.mark.parametrize("skew_ms", [-3_600_000, 3_600_000])
async def test_a_wall_clock_an_hour_off_changes_nothing(pair, autojump_clock, skew_ms):
    hearer, speaker = pair
    wall = 1_800_000_000_000 + skew_ms
    hearer.hearer.hear(speaker.peer_id, says(speaker, last_seen=wall, seq=wall))
    await trio.sleep(39)
    assert hearer.online() == {"speaker"}
    await trio.sleep(1)
    assert hearer.online() == set()


async def test_a_relayed_record_is_as_old_as_it_was(pair, autojump_clock):
    hearer, speaker = pair
    await trio.sleep(100)
    assert hearer.hearer.take_record(says(speaker), 30.0) is Observation.NEW
    assert hearer.online() == {"speaker"}
    await trio.sleep(10)
    assert hearer.online() == set()


async def test_what_a_record_told_first_is_forwarded_once_and_no_sign_of_life(pair, autojump_clock):
    """Else a ledger exchange, which outruns gossip, cuts off those who hear through this node."""
    hearer, speaker = pair
    envelope = says(speaker)
    assert hearer.hearer.take_record(envelope, age=30.0) is Observation.NEW
    await trio.sleep(9)
    assert hearer.hearer.hear(speaker.peer_id, envelope) is Verdict.ACCEPT
    assert hearer.hearer.hear(speaker.peer_id, envelope) is Verdict.IGNORE
    assert hearer.counted("announcements_total", direction="received") == 0
    assert hearer.counted("announcements_rejected_total", reason="stale") == 1
    await trio.sleep(1)
    assert hearer.online() == set()


async def test_an_older_one_than_a_record_told_is_not_forwarded(pair):
    hearer, speaker = pair
    hearer.hearer.take_record(says(speaker, seq=10), age=1.0)
    assert hearer.hearer.hear(speaker.peer_id, says(speaker, seq=9)) is Verdict.IGNORE
    assert hearer.hearer.hear(speaker.peer_id, says(speaker, seq=10)) is Verdict.ACCEPT


async def test_a_relayed_record_that_its_owner_did_not_sign_is_none(pair, make_node):
    hearer, speaker = pair
    forger = make_node("forger")
    with pytest.raises(WireError) as caught:
        hearer.hearer.take_record(says(forger, id=speaker.peer_id), 0.0)
    assert caught.value.code == "wrong_signer"


async def test_own_records_of_a_former_life_raise_the_seq(pair):
    hearer, _ = pair
    hearer.hearer.take_record(says(hearer, seq=5000), 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hearer.announcer.announce_forever)
        await trio.testing.wait_all_tasks_blocked()
        assert hearer.ledger.get(hearer.peer_id).node.seq == 5001
        nursery.cancel_scope.cancel()


async def test_silence_ends_a_peer_and_is_counted(pair, autojump_clock, nursery):
    hearer, speaker = pair
    nursery.start_soon(hearer.hearer.expire_forever)
    hearer.hearer.hear(speaker.peer_id, says(speaker))
    await trio.sleep(42)
    assert hearer.counted("ejections_total", reason="silent") == 1
    assert hearer.ledger.get(speaker.peer_id).state == "offline"
    assert hearer.hearer.hear(speaker.peer_id, says(speaker, seq=11)) is Verdict.ACCEPT
    assert hearer.online() == {"speaker"}


def seqs_heard_by(node):
    """Record (time, Seq, State) of each announcement that ``node`` hears from another."""
    heard = []
    hear = node.hearer.hear

    def note(sender, envelope):
        verdict = hear(sender, envelope)
        if verdict is Verdict.ACCEPT:
            entry = node.ledger.get(sender)
            heard.append((trio.current_time(), entry.node.seq, entry.node.state))
        return verdict

    node.mesh.subscribe(announce_topic("test"), note)
    return heard


async def test_a_node_announces_on_a_jittered_beat(make_node, start, autojump_clock):
    a = make_node("a")
    heard = seqs_heard_by(a)
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await trio.sleep(5)
    heard.clear()
    await trio.sleep(200)
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(heard)]
    assert 18 <= len(heard) <= 22
    assert all(9 <= gap <= 11 for gap in gaps)
    assert len(set(gaps)) > 10
    assert [seq for _, seq, _ in heard] == sorted({seq for _, seq, _ in heard})


async def test_changes_are_told_at_once_but_once_a_second(make_node, start, autojump_clock):
    a = make_node("a")
    heard = seqs_heard_by(a)
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await trio.sleep(5)
    heard.clear()
    begun = trio.current_time()
    for _ in range(50):
        b.announcer.changed()
        await trio.sleep(0.1)
    times = [at - begun for at, _, _ in heard]
    assert times[0] < 0.01
    assert len(times) == 5
    assert all(later - earlier >= 1 for earlier, later in pairwise(times))


async def test_draining_is_told_within_100_ms_though_the_node_has_just_spoken(
    make_node, start, autojump_clock
):
    a = make_node("a")
    heard = seqs_heard_by(a)
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await trio.sleep(5)
    for pause in (0.0, 0.01, 0.3):
        heard.clear()
        b.announcer.changed()
        await trio.sleep(pause + 0.001)
        b.announcer.changed()  # this one has to wait for the spacing
        await trio.sleep(pause)
        begun = trio.current_time()
        b.announcer.drain()
        await trio.sleep(0.1)
        assert heard[-1][2] == "draining" and heard[-1][0] - begun < 0.1
        b.announcer._state = "up"
        await trio.sleep(5)


async def test_draining_and_leaving_are_told_at_once(make_node, start, autojump_clock):
    a = make_node("a")
    heard = seqs_heard_by(a)
    b = make_node("b", bootstraps=[a.addr])
    await start(a, b)
    await trio.sleep(5)
    heard.clear()
    b.announcer.drain()
    await trio.sleep(0.1)
    await b.announcer.say_leaving()
    await trio.sleep(60)
    assert [state for _, _, state in heard] == ["draining", "leaving"]
    assert a.online() == {"a"}
    assert a.counted("ejections_total", reason="leaving") == 1


async def test_a_catalogue_too_large_for_an_announcement_is_cut_and_said_so(
    make_node, start, autojump_clock
):
    a = make_node("a")
    b = make_node("b", bootstraps=[a.addr])
    names = tuple(f"{n:0100}" for n in range(256))
    plain = b.announcer._compose

    def compose(seq, state):
        service = ServiceData(service_id="llm", models=names, loaded=names[-1:])
        return plain(seq, state).model_copy(update={"services": (service,)})

    b.announcer._compose = compose
    with capture_logs() as lines:
        await start(a, b)
        await trio.sleep(25)
    heard = a.ledger.get(b.peer_id).node.services[0]
    assert 100 < len(heard.models) < 256
    assert heard.loaded == names[-1:] and names[-1] in heard.models
    told = [line for line in lines if line["event"] == "models_not_announced"]
    assert [line["models"] for line in told] == [256 - len(heard.models)]


async def test_garbage_on_the_topic_leaves_the_node_alive(make_node, start, autojump_clock):
    a = make_node("a")
    b, c = (make_node(name, bootstraps=[a.addr]) for name in "bc")
    await start(a, b, c)
    await trio.sleep(5)
    for size in (0, 1, 100, 30_000):
        await b.mesh.publish(announce_topic("test"), bytes(size))
    await trio.sleep(20)
    assert a.online() == set("abc")
    assert a.counted("announcements_rejected_total", reason="bad_envelope") == 3
    assert a.counted("announcements_rejected_total", reason="too_large") == 1
    assert c.counted("announcements_rejected_total", reason="bad_envelope") <= 3


async def test_nodes_on_real_sockets_hear_each_other_and_the_goodbye(
    make_libp2p_node, start, wait_until
):
    with trio.fail_after(20):
        a = make_libp2p_node("a")
        await start(a)
        b, c = (make_libp2p_node(name, bootstraps=a.mesh.addrs) for name in "bc")
        await start(b, c)
        await wait_until(lambda: all(n.online() == set("abc") for n in (a, b, c)), within=10)
        await wait_until(lambda: len(b.linked()) == len(c.linked()) == 2, within=10)

        await b.announcer.say_leaving()
        assert await wait_until(lambda: a.online() == c.online() == set("ac"), within=5) < 1

        c.kill()
        assert await wait_until(lambda: a.online() == {"a"}, within=5) < 2


async def test_a_wrong_token_on_real_sockets_stops_the_joiner(make_libp2p_node, start, wait_until):
    with trio.fail_after(20):
        a = make_libp2p_node("a")
        await start(a)
        b = make_libp2p_node("b", keys=(b"w" * 32,), bootstraps=a.mesh.addrs)
        await start(b)
        assert await wait_until(lambda: b.failure is not None, within=3) < 3
        assert a.failure is None


async def test_in_a_large_mesh_load_waits_for_its_turn_and_state_does_not(
    make_node, start, autojump_clock
):
    a = make_node("a")
    heard = seqs_heard_by(a)
    b = make_node("b", bootstraps=[a.addr])
    b.announcer._nodes = lambda: 1_000
    await start(a, b)
    await trio.sleep(60)
    heard.clear()
    for second in range(60):  # free memory changes every second
        b.vram = 1 + second
        b.announcer.changed()
        await trio.sleep(1)
    beats = 60 // 10
    assert len(heard) <= beats + 4
    heard.clear()
    begun = trio.current_time()
    b.announcer.drain()
    await trio.sleep(1.1)
    assert [(state, at - begun <= 1) for at, _, state in heard] == [("draining", True)]


@pytest.mark.parametrize(("nodes", "told"), [(25, 3), (26, 1)])
async def test_only_in_a_small_mesh_each_further_link_is_told(
    make_node, start, autojump_clock, nodes, told
):
    a = make_node("a")
    a.announcer._nodes = lambda: nodes
    await start(a)
    await trio.sleep(3)
    before = a.counted("announcements_total", direction="sent")
    for name in ("b", "c", "d"):
        await start(make_node(name, bootstraps=[a.addr]))
        await trio.sleep(1.5)  # longer than the spacing, so that each link could be told
    assert len(a.mesh.links()) == 3
    # Three links within 4.5 s, and no beat of 10 s between.
    assert a.counted("announcements_total", direction="sent") - before == told
