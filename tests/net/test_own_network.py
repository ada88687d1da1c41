"""What a host says of its own network."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meshnode.net.own_network import NO_INTERFACE, has_way_out, own_fault

LO = ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("addresses", "up", "fine"),
    [
        ({"lo": LO, "eth0": ["10.0.0.7"]}, {"lo", "eth0"}, True),
        ({"lo": LO, "eth0": ["10.0.0.7"]}, {"lo"}, False),
        ({"lo": LO, "eth0": []}, {"lo", "eth0"}, False),
        ({"lo": LO, "eth0": ["fe80::1%eth0"]}, {"lo", "eth0"}, True),
        ({"lo": LO, "eth0": ["10.0.0.7"], "wlan0": ["10.1.0.7"]}, {"lo", "wlan0"}, True),
        ({"lo": LO}, {"lo"}, False),
        ({}, set(), False),
    ],
    ids=["cable in", "cable out", "no address", "link-local", "one of two", "loopback", "nothing"],
)
def test_a_way_out_is_an_interface_that_is_up_and_has_an_address(
    addresses: dict[str, list[str]], up: set[str], fine: bool
) -> None:
    assert has_way_out(addresses, up) is fine


def test_a_node_on_loopback_alone_blames_no_cable() -> None:
    assert own_fault(["/ip4/127.0.0.1/tcp/4201/p2p/x", "/ip6/::1/tcp/4201/p2p/x"]) is None


def test_a_host_without_a_network_says_so() -> None:
    code = (
        "from meshnode.net.own_network import own_fault;"
        "print(own_fault(['/ip4/10.0.0.7/tcp/4201/p2p/x']))"
    )
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*inside, "true"], capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    argv = [*inside, sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == NO_INTERFACE
