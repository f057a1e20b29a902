"""What an address of the configuration may be."""

from __future__ import annotations

import ipaddress
import re

_HOST_PATTERN = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")


def check_address(value: str, port_min: int = 1) -> str | None:
    """What is wrong with a `host:port` that others connect to; None when it can be used."""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port:
        return 'is not an address; use "host:port"'
    if not (port.isascii() and port.isdigit() and port_min <= int(port) <= 65_535):
        return f"has no usable port; use a port from {port_min} to 65535"
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        parsed = ipaddress.ip_address(bare)
    except ValueError:
        if ":" in host or "[" in host or re.fullmatch(r"[0-9.]+", host) or not _HOST_PATTERN.fullmatch(host):
            return "has no usable host; use a name, an IPv4 address, or an IPv6 address in brackets"
        return None
    if parsed.version == 6 and bare == host:
        return f'has an IPv6 address without brackets; use "[{host}]:{port}"'
    if parsed.is_unspecified:
        return "is a place to listen on, but nobody can connect to it; use this machine's name or address"
    return None


def is_loopback(address: str) -> bool:
    """True when only this machine can connect to a `host:port`; a name counts only when it is "localhost"."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("", "localhost")
