"""A contiguous range of the key-hash space and the workers that hold it."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model.clock import NEVER_MS, WallMs


@dataclass(frozen=True, slots=True)
class LostPrimary:
    """A worker that was lost while it was primary of a shard."""

    node_id: str
    at_ms: WallMs


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard.

    Invariant: 0 <= lo < hi <= 2^64; primary is in `in_sync` or both are empty; `in_sync`, `joining` and `absent` are
    sorted and share no worker; only a formed shard has parents.
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
    is_formed: bool = False
    """True once every first replica has made its store: nothing is served before, a store that is missing after is a
    loss."""
    parents: tuple[int, ...] = ()
    """Shards that it was cut or joined from, by range, until every replica has made its store of theirs."""
    lost_primaries: tuple[LostPrimary, ...] = ()
    """Workers that were lost while they were its primary, each once, the latest last; bounded."""
    quarantine: str = ""
    """Why it is neither moved nor given to further workers; empty when it is not in quarantine."""

    @property
    def replicas(self) -> tuple[str, ...]:
        """Workers that hold or receive a copy: in sync first, then joining."""
        return self.in_sync + self.joining

    @property
    def may_change(self) -> bool:
        """True when its replicas may be moved: it is formed, and not in quarantine."""
        return self.is_formed and not self.quarantine

    @property
    def key_share(self) -> float:
        """Share of the key-hash space, above 0, at most 1."""
        return (self.hi - self.lo) / (1 << 64)
