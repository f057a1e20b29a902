"""Says when a master stood still for so long that an election may follow, and what for. Passive.

Elections that nobody asked for have three causes: the disk, a machine that has no time for the process, and this
process itself. The line that is logged tells them apart, as etcd's warnings about slow syncs and late heartbeats do.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Stalls:
    """Is told of each tick. All times are seconds; `sync_s` and `computing_s` count since the start of the process."""

    period_s: float
    """Between two ticks, when nothing stands still."""
    election_s: float
    """Without a leader for so long, others stand for election."""
    _ticked_s: float | None = None
    _sync_s: float = 0.0
    _computing_s: float = 0.0

    def ticked(self, now_s: float, sync_s: float, computing_s: float) -> str | None:
        """What is to be logged, when the tick came late by half an election timeout."""
        before_s, self._ticked_s = self._ticked_s, now_s
        synced_s, self._sync_s = sync_s - self._sync_s, sync_s
        computed_s, self._computing_s = computing_s - self._computing_s, computing_s
        if before_s is None or now_s - before_s - self.period_s < self.election_s / 2:
            return None
        stood_s = now_s - before_s
        waited_s = max(0.0, stood_s - synced_s - computed_s)
        return (
            f"stood still for {stood_s:.2f} s: {synced_s:.2f} s for the disk to sync, {computed_s:.2f} s computing, "
            f"{waited_s:.2f} s waiting for a processor or other files; "
            f"after {self.election_s:g} s others may elect a leader"
        )
