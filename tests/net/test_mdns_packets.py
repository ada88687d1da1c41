"""What goes out is read by an independent DNS library, what comes in was put together by hand."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from time import perf_counter

import dns.flags
import dns.message
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.errors import ConfigError
from meshnode.net import mdns_packets as packets

SERVICE = packets.Service("0123456789abcdef", "ours")
NAME = "_p2p-0123456789abcdef._udp.local"
ID = "12D3KooWJWUxdRrmhZAQ2dVbTfWjJyHfJkRk9zvsBHEcvGZ7Jv3d"
OTHER_ID = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
ADDR = f"/ip4/192.168.1.20/tcp/4201/p2p/{ID}"
PTR, TXT, SRV, A, ANY = 12, 16, 33, 1, 255


def name(text: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in text.split(".")) + b"\0"


def record(owner: bytes, kind: int, data: bytes, *, ttl: int = 120, rdclass: int = 1) -> bytes:
    return owner + struct.pack("!HHIH", kind, rdclass, ttl, len(data)) + data


def strings(*texts: str) -> bytes:
    return b"".join(bytes([len(text)]) + text.encode() for text in texts)


def response(answers: Sequence[bytes], additionals: Sequence[bytes] = ()) -> bytes:
    header = struct.pack("!HHHHHH", 0, 0x8400, 0, len(answers), 0, len(additionals))
    return header + b"".join(answers) + b"".join(additionals)


def found(data: bytes) -> tuple[packets.Found, ...]:
    return packets.parse(data, SERVICE).found


def instance(
    *addrs: str, peer: str = "theirs", ttl: int = 120, rdclass: int = 1
) -> tuple[bytes, bytes]:
    owner = f"{peer}.{NAME}"
    return (
        record(name(NAME), PTR, name(owner), ttl=ttl),
        record(
            name(owner), TXT, strings(*(f"dnsaddr={a}" for a in addrs)), ttl=ttl, rdclass=rdclass
        ),
    )


# Going out


def test_the_question_is_one_ptr_question_for_the_networks_own_service_name():
    message = dns.message.from_wire(packets.query(SERVICE))
    [question] = message.question
    assert message.id == 0
    assert (question.name.to_text(), question.rdtype) == (NAME + ".", dns.rdatatype.PTR)


def test_the_answer_names_the_peer_by_ptr_and_tells_its_addresses_beside_it():
    data = packets.answer(SERVICE, (ADDR, f"/ip6/fd00::2/tcp/4201/p2p/{ID}"), host_ip="192.0.2.7")
    assert data is not None
    message = dns.message.from_wire(data)
    assert message.flags == dns.flags.QR | dns.flags.AA
    assert [rrset.to_text() for rrset in message.answer] == [f"{NAME}. 120 IN PTR ours.{NAME}."]
    told = {rrset.to_text() for rrset in message.additional}
    assert told == {
        f'ours.{NAME}. 120 IN TXT "dnsaddr={ADDR}" "dnsaddr=/ip6/fd00::2/tcp/4201/p2p/{ID}"',
        f"ours.{NAME}. 120 IN SRV 0 0 4201 ours.local.",
        "ours.local. 120 IN A 192.0.2.7",
    }


def test_others_read_our_answer_as_we_meant_it():
    data = packets.answer(SERVICE, (ADDR,), host_ip="192.0.2.7")
    reader = packets.Service(SERVICE.fingerprint, "theirs")
    assert data is not None
    assert packets.parse(data, reader).found == (packets.Found(ID, (ADDR,), is_leaving=False),)
    assert packets.parse(data, SERVICE).found == ()  # its own
    assert packets.parse(data, packets.Service("fedcba9876543210", "theirs")).found == ()


def test_a_goodbye_has_ttl_0_and_is_read_as_one():
    data = packets.answer(SERVICE, (ADDR,), host_ip=None, ttl=0)
    assert data is not None
    [peer] = packets.parse(data, packets.Service(SERVICE.fingerprint, "theirs")).found
    assert peer.is_leaving


def test_an_answer_fits_one_ethernet_frame_however_many_addresses_there_are():
    addrs = [f"/ip4/192.168.100.{n}/tcp/54201/p2p/{ID}" for n in range(100, 200)]
    data = packets.answer(SERVICE, addrs, host_ip="192.0.2.7")
    assert data is not None
    assert len(data) < 1400


def test_without_an_address_that_fits_there_is_no_answer():
    assert packets.answer(SERVICE, (), host_ip="192.0.2.7") is None
    assert packets.answer(SERVICE, ("/dns4/" + "a" * 260 + "/tcp/1",), host_ip=None) is None


def test_addresses_told_need_no_trust_in_their_letters():
    addr = '/dns4/quote".back\\slash/tcp/1/p2p/' + ID
    data = packets.answer(SERVICE, (addr,), host_ip=None)
    assert data is not None
    assert f"dnsaddr={addr}".encode() in data


def test_a_peer_name_has_32_to_63_letters_and_differs_from_run_to_run():
    names = {packets.new_peer_name(random.Random(seed)) for seed in range(100)}
    assert len(names) == 100
    assert all(32 <= len(each) <= 63 and each.isalnum() for each in names)


@pytest.mark.parametrize("fingerprint", ["", "xyz", "ABCDEF", "a" * 59, "a.b"])
def test_a_fingerprint_that_is_no_label_is_refused(fingerprint):
    with pytest.raises(ConfigError, match="DNS label"):
        packets.Service(fingerprint, "ours")


def test_loopback_is_told_on_loopback_alone_and_an_interfaces_own_address_first():
    addrs = (
        "/ip4/10.0.0.1/tcp/1/p2p/x",
        "/ip4/192.168.1.2/tcp/1/p2p/x",
        "/dns4/gpu.lan/tcp/1/p2p/x",
        "/ip4/127.0.0.1/tcp/1/p2p/x",
    )
    assert packets.addrs_for(addrs, "192.168.1.2") == (addrs[1], addrs[0], addrs[2])
    assert packets.addrs_for(addrs, "127.0.0.1") == (addrs[3], *addrs[:3])


def test_what_a_peer_told_is_tried_from_where_it_spoke_and_its_loopback_never_from_afar():
    addrs = tuple(f"/ip4/{ip}/tcp/1/p2p/x" for ip in ("127.0.0.1", "172.17.0.1", "10.0.0.9"))
    assert packets.addrs_from(addrs, "10.0.0.9", is_same_host=False) == (addrs[2], addrs[1])
    assert packets.addrs_from(addrs, "10.0.0.9", is_same_host=True) == (addrs[2], *addrs[:2])


# Coming in


def test_js_libp2p_puts_one_txt_record_per_address_among_the_answers_and_no_srv():
    ptr, first = instance(ADDR)
    _, second = instance(f"/ip4/10.0.0.3/tcp/9/p2p/{ID}")
    assert found(response([ptr, first, second])) == (
        packets.Found(ID, (ADDR, f"/ip4/10.0.0.3/tcp/9/p2p/{ID}"), is_leaving=False),
    )


def test_go_libp2p_sends_srv_txt_and_host_beside_the_ptr_with_the_cache_flush_bit():
    ptr, txt = instance(ADDR, f"/ip4/192.168.1.20/udp/1/quic-v1/p2p/{ID}", rdclass=0x8001)
    srv = record(
        name(f"theirs.{NAME}"), SRV, struct.pack("!HHH", 0, 0, 4001) + name("theirs.local")
    )
    host = record(name("theirs.local"), A, bytes([192, 168, 1, 20]), rdclass=0x8001)
    browse = record(name("_services._dns-sd._udp.local"), PTR, name(NAME))
    assert found(response([browse, ptr], [srv, txt, host])) == (
        packets.Found(ID, (ADDR,), is_leaving=False),
    )


def test_names_may_be_compressed_as_zeroconf_libraries_do():
    owner = name(NAME)  # at byte 12
    pointer = b"\xc0\x0c"
    ptr = record(owner, PTR, b"\x06theirs" + pointer)
    where = 12 + len(owner) + 10
    txt = record(struct.pack("!H", 0xC000 | where), TXT, strings(f"dnsaddr={ADDR}"))
    assert found(response([ptr, txt])) == (packets.Found(ID, (ADDR,), is_leaving=False),)


def test_the_txt_record_may_come_before_its_ptr_and_names_may_be_in_capitals():
    ptr = record(name(NAME.upper()), PTR, name(f"THEIRS.{NAME}"))
    _, txt = instance(ADDR)
    assert found(response([txt, ptr])) == (packets.Found(ID, (ADDR,), is_leaving=False),)


def test_one_packet_may_tell_of_several_peers_but_not_of_many():
    one = instance(ADDR)
    two = instance(f"/ip4/10.0.0.3/tcp/9/p2p/{OTHER_ID}", peer="second")
    assert {peer.peer_id for peer in found(response([*one, *two]))} == {ID, OTHER_ID}
    letters = "ABCDEFGHJKLMNPQRSTUVWX"
    many = [f"/ip4/10.0.0.3/tcp/9/p2p/{letter * 46}" for letter in letters]
    ptr, txts = instance()[0], [instance(addr)[1] for addr in many]
    assert len(found(response([ptr, *txts]))) == packets.MAX_PEERS


def test_addresses_of_one_peer_are_bounded_and_each_counts_once():
    ptr, _ = instance()
    addrs = [f"/ip4/10.0.0.{n // 2}/tcp/9/p2p/{ID}" for n in range(60)]
    txts = [instance(*addrs[n : n + 3])[1] for n in range(0, 60, 3)]
    [peer] = found(response([ptr, *txts]))
    assert len(peer.addrs) == packets.MAX_ADDRS
    assert len(set(peer.addrs)) == packets.MAX_ADDRS


def test_more_records_than_any_peer_sends_are_not_read():
    assert found(response([*instance(ADDR)] * 17)) == ()


def test_a_txt_record_without_its_ptr_tells_nothing():
    assert found(response([instance(ADDR)[1]])) == ()


@pytest.mark.parametrize(
    "addr",
    [
        "",
        "/ip4/1.2.3.4/tcp/1",
        f"/ip4/1.2.3/tcp/1/p2p/{ID}",
        f"/ip4/0.0.0.0/tcp/1/p2p/{ID}",
        f"/ip4/224.0.0.251/tcp/1/p2p/{ID}",
        f"/ip6/1.2.3.4/tcp/1/p2p/{ID}",
        f"/ip6/fe80::1/tcp/1/p2p/{ID}",
        f"/ip6/fd00::1%eth0/tcp/1/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/0/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/65536/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/٣/p2p/{ID}",
        f"/ip4/1.2.3.4/udp/1/quic-v1/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/1/ws/p2p/{ID}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{ID}/p2p-circuit/p2p/{ID}",
        f"/dns4/internal.example/tcp/1/p2p/{ID}",
        "/ip4/1.2.3.4/tcp/1/p2p/0OIl",
        f"/ip4/1.2.3.4/tcp/1/p2p/{ID}\n",
    ],
)
def test_what_is_no_ip_and_tcp_port_of_a_peer_is_left_out(addr):
    assert packets.parse_addr(f"dnsaddr={addr}".encode()) is None


def test_the_older_word_for_a_peer_id_is_understood_and_mended():
    old = f"dnsaddr=/ip4/1.2.3.4/tcp/01/ipfs/{ID}".encode()
    assert packets.parse_addr(old) == (ID, f"/ip4/1.2.3.4/tcp/1/p2p/{ID}")


@pytest.mark.parametrize(
    ("kind", "service", "asks"),
    [
        (PTR, NAME, True),
        (ANY, NAME, True),
        (PTR, NAME.upper(), True),
        (TXT, NAME, False),
        (PTR, "_p2p._udp.local", False),
        (PTR, "_p2p-fedcba9876543210._udp.local", False),
        (PTR, f"theirs.{NAME}", False),
    ],
)
def test_only_a_ptr_question_for_this_network_asks(kind, service, asks):
    header = struct.pack("!HHHHHH", 0, 0, 2, 0, 0, 0)
    printer = name("_ipp._tcp.local") + struct.pack("!HH", PTR, 1)
    question = name(service) + struct.pack("!HH", kind, 0x8001)  # wants a unicast answer, too
    assert packets.parse(header + printer + question, SERVICE).asks is asks


def test_answers_that_an_asker_already_knows_do_not_spoil_its_question():
    ptr, _ = instance(ADDR)
    header = struct.pack("!HHHHHH", 0, 0, 1, 500, 0, 0)
    question = name(NAME) + struct.pack("!HH", PTR, 1)
    assert packets.parse(header + question + ptr * 100, SERVICE) == packets.Packet(asks=True)


# Hostile


def whole() -> bytes:
    data = packets.answer(
        packets.Service(SERVICE.fingerprint, "theirs"), (ADDR,), host_ip="10.0.0.1"
    )
    assert data is not None
    return data


def test_an_answer_cut_anywhere_never_raises():
    data = whole()
    for end in range(len(data)):
        packets.parse(data[:end], SERVICE)
    assert found(data)


@settings(max_examples=300)
@given(st.data())
def test_an_answer_with_any_bytes_changed_never_raises(data):
    packet = bytearray(whole())
    for _ in range(data.draw(st.integers(1, 8))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    packets.parse(bytes(packet), SERVICE)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_garbage_around_the_service_name_never_raises(before, after):
    packets.parse(before + SERVICE.label.encode() + after, SERVICE)


def test_a_name_that_points_at_itself_is_dropped():
    for where in (12, 13, 200):
        loop = response([record(struct.pack("!H", 0xC000 | where), PTR, name(NAME))])
        assert found(loop) == ()


def test_a_packet_over_9000_bytes_is_not_looked_at():
    padding = [record(name("x"), A, b"\0" * 9000)]
    assert found(response([*instance(ADDR)], padding)) == ()


def test_the_costliest_packet_is_read_within_15_ms():
    # Names of 120 labels, each reached through a pointer, in as many records as are read.
    long_name = b"\x01a" * 110 + name(NAME)
    first = record(long_name, PTR, name(NAME))
    others = [record(b"\xc0\x0c", PTR, b"\xc0\x0c") for _ in range(packets.MAX_RECORDS - 1)]
    packet = response([first, *others])
    took = []
    for _ in range(5):
        began = perf_counter()
        packets.parse(packet, SERVICE)
        took.append(perf_counter() - began)
    print(f"the costliest packet took {min(took) * 1000:.2f} ms")
    assert min(took) < 0.015
