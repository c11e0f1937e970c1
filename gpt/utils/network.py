"""This machine's address on the route to another one, and the network interface that has it."""

import socket
import struct
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SIOCGIFADDR = 0x8915
"""Request of Linux for the IPv4 address of an interface (netdevice(7))."""
IPV6_INTERFACES = Path("/proc/net/if_inet6")


def find_local_address(host: str, port: int) -> str:
    """Return this machine's address on the route to `host`; empty if there is no route. Nothing is sent."""
    try:
        targets = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, _, _, target in targets:
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(target)
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return ""


def is_loopback(address: str) -> bool:
    """Return whether other machines cannot reach an address."""
    return address.startswith("127.") or address == "::1"


def find_interface(address: str) -> str:
    """Return the name of the network interface with an address; empty if none has it, and on other systems than Linux.

    Args:
        address: IPv4 or IPv6 address; of an interface with several IPv4 addresses, its first.
    """
    if fcntl is None or not IPV6_INTERFACES.parent.is_dir():
        return ""
    if ":" in address:
        return _find_ipv6_interface(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(query, SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def _find_ipv6_interface(address: str) -> str:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    try:
        lines = IPV6_INTERFACES.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[-1] for line in lines if line.startswith(wanted)), "")
