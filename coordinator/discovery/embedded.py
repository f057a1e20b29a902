"""Discovery without another server: the masters are those of the configuration, and sessions alone say who is there."""

from __future__ import annotations

from coordinator.config import MasterSettings
from coordinator.discovery.interface import HealthySet, MasterAddress, Registration


class EmbeddedDiscovery:
    """The masters table. It has no opinion on health, so nobody is dropped or kept out by it."""

    def __init__(self, masters: tuple[MasterSettings, ...]) -> None:
        self._masters = tuple(MasterAddress(master.id, master.grpc_address) for master in masters)
        self.registration: Registration | None = None
        """What this daemon last wanted to be seen as; kept, shown to nobody."""

    async def start(self) -> None:
        """Nothing to begin."""

    async def stop(self) -> None:
        """Nothing to end."""
        self.registration = None

    async def masters(self) -> tuple[MasterAddress, ...]:
        """The masters of the configuration, in its order; who leads is not known here."""
        return self._masters

    async def register(self, registration: Registration) -> None:
        """Keeps it; workers become known through their session with the leader."""
        self.registration = registration

    def healthy(self, service: str) -> HealthySet:
        """No opinion."""
        return HealthySet(known=False)
