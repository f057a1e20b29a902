"""Figures of one master's consensus for those who watch it; counting costs an addition where the thing happens."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from coordinator.raft.clocks import ClockFigures
from coordinator.raft.frames import Message

SYNC_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper bounds of the histogram of syncs: 0.1 ms is a good NVMe disk, 10 ms a spinning one, 1 s a failing one."""


class Durations:
    """A histogram of durations in seconds. Invariant: `counts` has one place more than `bounds`, for what is longer."""

    def __init__(self, bounds: tuple[float, ...] = SYNC_BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and how many took at most that long, ascending; the last bound is "+Inf"."""
        total = 0
        found: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found


def kind_of(message: Message) -> str:
    """The name of a message's frame; PySyncObj calls two of them the same."""
    return "install_snapshot" if "serialized" in message else str(message["type"])


@dataclass(slots=True)
class Traffic:
    """Messages that one master exchanged with its peers, by kind."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class SnapshotFigures:
    """The newest snapshot on disk."""

    index: int = 0
    """Log index that it includes; 0 for none."""
    size_bytes: int = 0
    state_unix_s: float = 0.0
    """Time of the newest log entry that it includes."""


@dataclass(frozen=True, slots=True)
class RaftFigures:
    """What RaftStatus leaves to those who draw graphs."""

    last_index: int
    """Last entry of the log."""
    commit_index: int
    applied_index: int
    has_lease: bool
    elections: int
    """Elections that this master has held since it started."""
    pre_votes: int
    """Times that it has asked beforehand whether it would win one."""
    syncs: Durations
    """How long the journal's syncs took."""
    traffic: Traffic
    proposals: int
    """Commands of this master's callers that wait for their outcome."""
    queued_bytes: dict[str, int]
    """What waits for each connected peer to read it, by its id."""
    behind: dict[str, int]
    """At a leader: entries that each other master is not known to have, by its id; empty elsewhere."""
    snapshot: SnapshotFigures
    clocks: ClockFigures
