"""A contiguous range of the key-hash space and the workers that hold it."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model.clock import NEVER_MS, WallMs


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard.

    Invariant: 0 <= lo < hi <= 2^64; primary is in `in_sync` or both are empty; `in_sync`, `joining` and `absent` are
    sorted and share no worker.
    """

    id: int
    lo: int
    hi: int
    epoch: int = 0
    primary: str = ""
    in_sync: tuple[str, ...] = ()
    joining: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Workers that fell out of `in_sync` by a fault; their place is kept until the shard is whole without them."""
    generation: int = 0
    moved_ms: WallMs = NEVER_MS

    @property
    def replicas(self) -> tuple[str, ...]:
        """Workers that hold or receive a copy: in sync first, then joining."""
        return self.in_sync + self.joining

    @property
    def key_share(self) -> float:
        """Share of the key-hash space, above 0, at most 1."""
        return (self.hi - self.lo) / (1 << 64)
