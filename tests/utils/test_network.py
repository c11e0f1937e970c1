import socket

import pytest

from gpt.utils.network import IPV6_INTERFACES, find_interface, find_local_address, is_loopback

NAMES = {name for _, name in socket.if_nameindex()}


@pytest.mark.skipif("lo" not in NAMES or not IPV6_INTERFACES.parent.is_dir(), reason="needs Linux and its interface lo")
def test_interface_is_found_by_its_address() -> None:
    address = find_local_address("127.0.0.1", 29500)
    assert address == "127.0.0.1"
    assert find_interface(address) == "lo"
    assert find_interface("203.0.113.1") == ""
    if IPV6_INTERFACES.exists() and "lo" in IPV6_INTERFACES.read_text():
        assert find_interface("::1") == "lo"


def test_name_without_an_address_has_no_route() -> None:
    assert find_local_address("no-such-host.invalid", 29500) == ""


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("", False)]
)
def test_loopback_addresses(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
