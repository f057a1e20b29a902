"""What the daemons ask of a discovery backend: who the masters are, who is healthy, and to be seen themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class MasterAddress:
    """Where one master answers."""

    id: str
    grpc_address: str
    is_leader: bool = False
    """True when the backend says so; a hint, never a proof."""


@dataclass(frozen=True, slots=True)
class Registration:
    """How a daemon wants to be seen."""

    service: str
    """Name of the service: "coordinator" or "worker-agent"."""
    id: str
    grpc_address: str
    http_address: str
    tags: tuple[str, ...] = ()
    meta: tuple[tuple[str, str], ...] = ()
    """Sorted pairs of name and value."""


@dataclass(frozen=True, slots=True)
class HealthySet:
    """Ids of one service's instances whose checks pass; `known` is False when the backend cannot be asked."""

    known: bool
    ids: frozenset[str] = field(default_factory=frozenset)


class Discovery(Protocol):
    """One backend. Nothing here raises because the backend is away: a daemon that is in stays in."""

    async def start(self) -> None:
        """Begins the background work; returns at once, also when the backend is away."""
        ...

    async def stop(self) -> None:
        """Takes the registration back (best effort, bounded in time) and ends the background work."""
        ...

    async def masters(self) -> tuple[MasterAddress, ...]:
        """The masters as known now, the leader first where known; the last known ones while the backend is away."""
        ...

    async def register(self, registration: Registration) -> None:
        """Makes this daemon visible, or changes how; kept up by the background work until `stop`."""
        ...

    def healthy(self, service: str) -> HealthySet:
        """The latest view of a service's healthy instances, from memory."""
        ...
