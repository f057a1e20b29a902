"""What a master does about its wall clock: it does not stand for election, or hands its leadership on. Passive.

Order rules:

1. The clock is looked at when a majority has said that it would vote (pre-vote): those answers tell the clocks, so a
   master that refuses still asks, and still tells its own. It does not stand.
2. While a connected peer's clock is not known, as after a start of all masters, it is waited for, an election timeout
   at most: otherwise a master with a bad clock could win before it hears that.
3. Leadership is more than a clock. Who refused for REFUSALS election timeouts while nobody else was elected stands all
   the same: it may be the only one with the whole log. It hands over as soon as another has it.
4. A leader that refuses asks the follower with the best clock among those with the longest log to take over, at every
   step for ATTEMPT election timeouts (nothing is appended meanwhile, so that the follower gets everything), then lets
   commands through for PAUSE_S, and so on. Without a follower whose clock is good it leads on. It looks at its clock
   before commands are appended in the same step, so that no entry gets the time of a clock that just stepped: the
   time in the log never goes back, and what is remembered for so long (answers by request id) would be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pysyncobj import FAIL_REASON
from pysyncobj.node import Node

from coordinator.config import RaftSettings
from coordinator.raft.clocks import Clocks, Verdict
from coordinator.raft.engine import SyncEngine, now_s

REFUSALS = 8
ATTEMPT = 1
PAUSE_S = 1.0
ASKED = 3
"""Election timeouts for a follower that was asked; after two without an outcome the leader steps down anyhow."""
LOOK_S = 0.02
"""A leader compares its clock with the others' so often, and at once when its own has stepped."""
STEP_S = 0.1


class ClockDuty:
    """One master's. `speaks` tells whether a peer's disk votes."""

    def __init__(
        self,
        engine: SyncEngine,
        others: Sequence[Node],
        settings: RaftSettings,
        clocks: Clocks,
        may_speak: Callable[[str], bool],
    ) -> None:
        self.clocks = clocks
        self._engine = engine
        self._others = others
        self._election_s = settings.election_timeout_s_max
        self._may_speak = may_speak
        self._refused_since_s: float | None = None
        self._look_at_s = 0.0
        self._own_s = 0.0
        """The wall clock minus the monotonic one, at the latest look."""
        self._attempt_until_s = 0.0

    # Standing for election

    def heard_leader(self) -> None:
        """Somebody leads."""
        self._refused_since_s = None

    def may_stand(self, *, has_waited: bool) -> bool:
        """False for a master whose clock forbids it, or that should hear more clocks first (order rules 1 to 3)."""
        at_s = now_s()
        if not self.clocks.verdict(at_s).refuses:
            return has_waited or all(
                self.clocks.knows(str(node.id), at_s) for node in self._others if self._engine.isNodeConnected(node)
            )
        if self._refused_since_s is None:
            self._refused_since_s = at_s
        return has_waited and at_s - self._refused_since_s > REFUSALS * self._election_s

    # Leading

    def hand_over(self, transfer: Callable[[str], int]) -> None:
        """To be called at every step: a leader that refuses has a follower take over (order rule 4)."""
        at_s = now_s()
        if not self._engine._isLeader():
            return
        own_s = self.clocks.own_s(at_s)
        if at_s < self._look_at_s and abs(own_s - self._own_s) < STEP_S:
            return
        self._refused_since_s, self._own_s = None, own_s
        if not self.clocks.verdict(at_s).refuses:
            self._look_at_s, self._attempt_until_s = at_s + LOOK_S, 0.0
            return
        followers = self._good(at_s)
        if not self._attempt_until_s:
            self._attempt_until_s = at_s + ATTEMPT * self._election_s
        if at_s >= self._attempt_until_s or not followers:
            self._look_at_s, self._attempt_until_s = at_s + PAUSE_S, 0.0
        elif transfer(followers[0]) == FAIL_REASON.SUCCESS:
            # Asking again would put off that it steps down when that one does not take over (elections.py, rule 4).
            self._look_at_s, self._attempt_until_s = at_s + ASKED * self._election_s, 0.0

    def _good(self, at_s: float) -> list[str]:
        """Connected followers with good clocks that may lead: those with the longest log first, then the best clock."""
        connected = {str(node.id): node for node in self._others if self._engine.isNodeConnected(node)}
        verdicts = self.clocks.verdicts(at_s)
        good = [
            id
            for id, verdict in verdicts.items()
            if id in connected and not verdict.refuses and self._may_speak(id)
        ]
        return sorted(good, key=lambda id: -self._engine.match_index(connected[id]))

    def choose(self, target_id: str | None) -> str | None:
        """Who is to take over: as asked; with nobody named, one with a good clock if others refuse, else any (None)."""
        at_s = now_s()
        if target_id is not None or not any(verdict.refuses for verdict in self.clocks.verdicts(at_s).values()):
            return target_id
        return next(iter(self._good(at_s)), None)

    def refusal_of(self, id: str) -> Verdict | None:
        """The verdict on a peer that is not to lead; None for any other."""
        verdict = self.clocks.verdicts(now_s()).get(id)
        return verdict if verdict is not None and verdict.refuses else None
