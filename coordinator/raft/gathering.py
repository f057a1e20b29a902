"""When a leader appends what was proposed: at once, or together with more. Passive, pure.

A batch costs a sync and an append per follower, however many commands are in it, and a gRPC server takes in one call
per turn of the event loop: were each call appended at once, each would pay for all of that. So

- while a batch is on its way, what comes in gathers; it is appended when the batch is committed;
- when that has happened and something has gathered, there are several callers, and those who just got their answer may
  be back soon: the next batch waits until as many are there as were seen at once, for LINGER_S at most. Taking the
  calls in is work that is to be done anyhow, so waiting costs a busy leader nothing (PostgreSQL's `commit_delay` and
  `commit_siblings` rest on the same thought).

A caller who is alone waits for nothing. No batch is waited for longer than GATHER_S_MAX, so masters that are far apart
keep several on their way, and where no majority answers, commands reach the log all the same.

With 64 callers on two cores this took the syncs per commit from 0.96 to 0.2, the append frames from 3.1 to 0.8, and the
processor time of all processes from 1.56 ms to 0.74 ms.
"""

from __future__ import annotations

GATHER_S_MAX = 0.005
LINGER_S = 0.004


class Gathering:
    """What one leader has queued and what it has on its way. Times are seconds of its monotonic clock."""

    def __init__(self) -> None:
        self.queued = 0
        """Commands that wait for being appended."""
        self._batch = 0
        self._last_index = 0
        self._until_s = 0.0
        self._wanted = 0
        """Once the latest batch is committed: as many as the next one waits for; 0 before."""
        self.closed_until_s = 0.0
        """Nothing at all is appended before then: a follower is to have the whole log (Raft thesis 3.10)."""

    def holds(self, commit_index: int, now_s: float) -> bool:
        """True while what is queued is better not appended yet."""
        if commit_index >= self._last_index and not self._wanted:
            self._wanted = self._batch + self.queued if self.queued else 1
            self._until_s = now_s + LINGER_S
        is_early = now_s < self._until_s and (not self._wanted or self.queued < self._wanted)
        return is_early or now_s < self.closed_until_s

    def appended(self, last_index: int, now_s: float) -> None:
        """All that was queued is in the log, whose last entry is this, or was passed on to the leader."""
        if self.queued:
            self._batch, self.queued, self._wanted = self.queued, 0, 0
            self._last_index, self._until_s = last_index, now_s + GATHER_S_MAX
