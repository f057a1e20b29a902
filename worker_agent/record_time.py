"""The time that a primary writes into its records, by which request ids are forgotten. Passive.

Every replica forgets by the times in the log alone, so that all forget the same; the time must therefore not run ahead
of what has passed. Wall clocks do: a worker whose clock is an hour fast would have ids of an hour ago forgotten with
its first write, and those of the next hour, written by others, at once. So the time never goes back, and gains on the
log's latest at most what this worker has seen pass as primary. It may fall behind the wall clock, over a failover or a
restart: then ids are remembered longer.
"""

from __future__ import annotations

from coordinator.model import Monotonic, WallMs


class RecordTime:
    """Of one shard on one worker."""

    def __init__(self) -> None:
        self._last_ms = WallMs(0)
        self._base = (WallMs(0), Monotonic(0.0))
        """A time in the log, and when this worker went on from there."""

    def next_ms(self, now: Monotonic, wall_ms: WallMs, newest_ms: int) -> WallMs:
        """The time of the next record; `newest_ms` is the latest that is applied, 0 for none."""
        if newest_ms > self._last_ms:
            self._last_ms = WallMs(newest_ms)
            self._base = (self._last_ms, now)
        elif not self._last_ms:
            self._last_ms = wall_ms
            self._base = (wall_ms, now)
        since_ms, since = self._base
        passed_ms = int((now - since) * 1_000)
        self._last_ms = max(self._last_ms, min(wall_ms, WallMs(since_ms + passed_ms)))
        return self._last_ms
