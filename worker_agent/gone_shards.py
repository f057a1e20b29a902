"""Where to ask for what this worker does not hold any more. Passive.

Invariant: no two ranges overlap, and the latest that was given up is the one that counts: where a shard was cut and a
part of it has moved on since, the part knows where it went, the whole does not. So there are at most as many as shards.
"""

from __future__ import annotations

from worker_agent.state_interface import Elsewhere


class GoneShards:
    """Shards that this worker held, by their ranges."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int, Elsewhere]] = {}

    def add(self, lo: int, hi: int, elsewhere: Elsewhere) -> None:
        """A shard of hashes from `lo` to below `hi` was given up."""
        for shard_id in [id for id, (other_lo, other_hi, _) in self._places.items() if other_lo < hi and lo < other_hi]:
            del self._places[shard_id]
        self._places[elsewhere.shard_id] = (lo, hi, elsewhere)

    def remove(self, shard_id: int) -> None:
        """It is held again."""
        self._places.pop(shard_id, None)

    def locate(self, key_hash: int) -> Elsewhere:
        """Where the shard that has the hash was last known to be."""
        for lo, hi, elsewhere in self._places.values():
            if lo <= key_hash < hi:
                return elsewhere
        return Elsewhere()
