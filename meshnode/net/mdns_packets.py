"""What nodes say on the local network to be found, as bytes: no socket, no clock.

The libp2p mDNS specification: a PTR question for the service is answered with a PTR to a random
peer name and, beside it, a TXT record of ``dnsaddr=<multiaddr>`` strings. A private network asks
for a name of its own, made of its fingerprint, so that only its members meet. Others on the port
are printers and telephones: whatever is not about the service is dropped before it is parsed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.wire
from dns.exception import DNSException
from dns.rdtypes.ANY.TXT import TXT

from meshnode.errors import ConfigError
from meshnode.net.rng import Rng

MAX_PACKET = 9000  # bytes; RFC 6762 section 17
# Ours has four records, js-libp2p's one for each address.
MAX_RECORDS = 32
MAX_ADDRS = 16  # per peer and packet; an announcement has no more
MAX_PEERS = 8  # per packet; one instance answers for one peer, gateways for a few
TTL = 120  # seconds, as RFC 6762 and the other libp2p implementations have it
# Some 90 bytes each, so that an answer stays within one Ethernet frame.
_MAX_SENT_ADDRS = 10
_MAX_STRING = 255  # bytes of one string in a TXT record
_MAX_LABEL = 63
_PREFIX = b"dnsaddr="
_PEER_NAME_LENGTH = 40  # the specification wants 32 to 63
_PEER_NAME_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,128}")
_HEADER = "!HHHHHH"
_RECORD = "!HHIH"  # type, class, TTL, length of the data
_CACHE_FLUSH = 0x8000


@dataclass(frozen=True, slots=True)
class Found:
    """A peer that answered."""

    peer_id: str
    addrs: tuple[str, ...]  # multiaddrs over TCP, each ending in /p2p/<peer_id>
    is_leaving: bool  # its records are taken back


@dataclass(frozen=True, slots=True)
class Packet:
    """What one packet says of the service."""

    asks: bool = False
    found: tuple[Found, ...] = ()


_NOTHING = Packet()


@dataclass(frozen=True, slots=True)
class Service:
    """The service name of one network, and this node's instance of it.

    Args:
        fingerprint: hexadecimal digits that tell networks apart and nothing of the key.
        peer_name: random, so that a name taken on another host is no collision.

    Raises:
        ConfigError: the fingerprint does not fit a DNS label.
    """

    fingerprint: str
    peer_name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{1,58}", self.fingerprint):
            raise ConfigError(
                f"the fingerprint {self.fingerprint[:80]!r} does not fit the DNS label _p2p-X: "
                f"it must be 1 to {_MAX_LABEL - len('_p2p-')} hexadecimal digits"
            )

    @property
    def label(self) -> str:
        return f"_p2p-{self.fingerprint}"

    @property
    def name(self) -> dns.name.Name:
        return dns.name.Name((self.label.encode(), b"_udp", b"local", b""))

    @property
    def instance(self) -> dns.name.Name:
        return dns.name.Name((self.peer_name.encode(), *self.name.labels))


def new_peer_name(rng: Rng) -> str:
    """Return a random name for one run of one node."""
    return "".join(rng.choice(_PEER_NAME_LETTERS) for _ in range(_PEER_NAME_LENGTH))


def query(service: Service) -> bytes:
    """Return the question who is there."""
    message = dns.message.QueryMessage(id=0)
    message.question.append(dns.rrset.RRset(service.name, dns.rdataclass.IN, dns.rdatatype.PTR))
    return message.to_wire(max_size=MAX_PACKET)


def answer(
    service: Service, addrs: Sequence[str], *, host_ip: str | None, ttl: int = TTL
) -> bytes | None:
    """Return this node's answer, or None if it has no address to tell.

    Args:
        addrs: multiaddrs ending in ``/p2p/<peer ID>``, best first; surplus ones are left out.
        host_ip: of the interface that it goes out by. Nobody dials it, but libraries made for
            printers, which go-libp2p and py-libp2p use, ignore an instance without a host.
        ttl: seconds; 0 takes the records back.
    """
    strings = [string for addr in addrs if len(string := _PREFIX + addr.encode()) <= _MAX_STRING]
    if not strings:
        return None
    message = dns.message.QueryMessage(id=0)
    message.flags = dns.flags.QR | dns.flags.AA
    message.answer.append(_record(service.name, ttl, "PTR", service.instance.to_text()))
    instance, host = service.instance, dns.name.Name((service.peer_name.encode(), b"local", b""))
    # One record with all strings: go-libp2p keeps only the last TXT record of an instance.
    text = TXT(dns.rdataclass.IN, dns.rdatatype.TXT, strings[:_MAX_SENT_ADDRS])
    message.additional.append(dns.rrset.from_rdata(instance, ttl, text))
    port = next((found[1].decode() for found in re.finditer(rb"/tcp/(\d{1,5})/", strings[0])), "0")
    message.additional.append(_record(instance, ttl, "SRV", f"0 0 {port} {host.to_text()}"))
    if host_ip is not None:
        kind = "AAAA" if ":" in host_ip else "A"
        message.additional.append(_record(host, ttl, kind, host_ip))
    return message.to_wire(max_size=MAX_PACKET)


def _record(name: dns.name.Name, ttl: int, kind: str, data: str) -> dns.rrset.RRset:
    return dns.rrset.from_text(name, ttl, dns.rdataclass.IN, kind, data)


def parse(data: bytes, service: Service) -> Packet:
    """Return what a packet says of the service; nothing, for whatever can't be understood.

    It never raises, and its work is bounded: it comes from anybody on the local network.
    """
    if len(data) > MAX_PACKET or service.label.encode() not in data.lower():
        return _NOTHING
    try:
        return _parse(dns.wire.Parser(data), service)
    except DNSException:
        return _NOTHING


def _parse(parser: dns.wire.Parser, service: Service) -> Packet:
    _, flags, questions, *sections = parser.get_struct(_HEADER)
    if flags & dns.flags.QR:
        # Questions may be repeated in an answer.
        if questions + sum(sections) > MAX_RECORDS:
            return _NOTHING
        for _ in range(questions):
            _read_question(parser)
        return Packet(found=_found(_instances(parser, sum(sections), service)))
    asks = any(
        kind in (dns.rdatatype.PTR, dns.rdatatype.ANY) and name == service.name
        for name, kind in (_read_question(parser) for _ in range(min(questions, MAX_RECORDS)))
    )
    return Packet(asks=asks)


def _read_question(parser: dns.wire.Parser) -> tuple[dns.name.Name, int]:
    name = parser.get_name(decompress=True)
    kind, _ = parser.get_struct("!HH")
    return name, kind


def _instances(
    parser: dns.wire.Parser, records: int, service: Service
) -> Iterable[tuple[bool, list[bytes]]]:
    """Return (is leaving, its TXT strings) of each instance of the service but our own."""
    instances: dict[dns.name.Name, tuple[bool, list[bytes]]] = {}
    texts: dict[dns.name.Name, list[bytes]] = {}
    for _ in range(records):
        name = parser.get_name(decompress=True)
        kind, rdclass, ttl, length = parser.get_struct(_RECORD)
        with parser.restrict_to(length):
            if rdclass & ~_CACHE_FLUSH == dns.rdataclass.IN:
                if kind == dns.rdatatype.PTR and name == service.name:
                    instance = parser.get_name(decompress=True)
                    instances[instance] = (ttl == 0, texts.setdefault(instance, []))
                elif kind == dns.rdatatype.TXT:
                    texts.setdefault(name, []).extend(_strings(parser))
            parser.get_remaining()
    instances.pop(service.instance, None)
    return instances.values()


def _strings(parser: dns.wire.Parser) -> Iterator[bytes]:
    while parser.remaining() > 0:
        yield parser.get_counted_bytes()


def _found(instances: Iterable[tuple[bool, list[bytes]]]) -> tuple[Found, ...]:
    found = []
    for is_leaving, strings in instances:
        addrs: dict[str, list[str]] = {}
        for string in strings:
            if (parsed := parse_addr(string)) is not None:
                peer_id, addr = parsed
                addrs.setdefault(peer_id, []).append(addr)
        for peer_id, theirs in addrs.items():
            unique = tuple(dict.fromkeys(theirs))[:MAX_ADDRS]
            found.append(Found(peer_id, unique, is_leaving))
    return tuple(found[:MAX_PEERS])


def parse_addr(string: bytes) -> tuple[str, str] | None:
    """Return (peer ID, multiaddr) of a ``dnsaddr=`` string that names an IP and a TCP port."""
    if not string.startswith(_PREFIX) or not string.isascii():
        return None
    addr = string.removeprefix(_PREFIX).decode("ascii")
    match addr.split("/"):
        case ["", ("ip4" | "ip6") as family, host, "tcp", port, "p2p" | "ipfs", peer_id]:
            if _is_host(family, host) and _is_port(port) and _PEER_ID.fullmatch(peer_id):
                return peer_id, f"/{family}/{host}/tcp/{int(port)}/p2p/{peer_id}"
    return None  # another transport, a relay's, or no multiaddr at all


def _is_host(family: str, host: str) -> bool:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    # A link-local IPv6 address means nothing without its interface, which no multiaddr names.
    unusable = ip.is_unspecified or ip.is_multicast or (ip.version == 6 and ip.is_link_local)
    return f"ip{ip.version}" == family and not unusable and "%" not in host


def _is_port(text: str) -> bool:
    return text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def addrs_for(addrs: Sequence[str], interface_ip: str) -> tuple[str, ...]:
    """Return which of this node's addresses to tell on an interface, its own first."""
    on_loopback = _is_loopback(interface_ip)
    told = [
        addr
        for addr in addrs
        # On one network nobody needs a relay.
        if "/p2p-circuit/" not in addr and (on_loopback or not _is_loopback(_host(addr)))
    ]
    return tuple(sorted(told, key=lambda addr: _host(addr) != interface_ip))


def addrs_from(addrs: Sequence[str], source: str, *, is_same_host: bool) -> tuple[str, ...]:
    """Return which of a peer's addresses can lead to it, the one it spoke from first."""
    usable = [addr for addr in addrs if is_same_host or not _is_loopback(_host(addr))]
    return tuple(sorted(usable, key=lambda addr: _host(addr) != source))


def _host(addr: str) -> str:
    return addr.split("/")[2]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a DNS name
