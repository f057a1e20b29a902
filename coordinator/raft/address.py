"""Where a master's peer port is."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a master's peer port is."""

    id: str
    host: str
    port: int


def parse_address(id: str, address: str) -> PeerAddress:
    """Reads "host:port"; an IPv6 host stands in brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ConfigError([f"peer address {address!r} of master {id} is not host:port"])
    return PeerAddress(id, host.strip("[]"), int(port))
