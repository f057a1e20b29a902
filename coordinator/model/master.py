"""A master whose disk took the place of an older one."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model.clock import WallMs


@dataclass(frozen=True, slots=True)
class AdmittedMaster:
    """Which disk counts for a master. A master that is not listed has the one that it was founded with."""

    id: str
    disk_id: str
    """Random name of its data directory."""
    peer_address: str
    """host:port of its peer port; empty for the configuration's."""
    admitted_ms: WallMs
