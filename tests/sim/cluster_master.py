"""A simulated master that also controls the cluster while it leads. See raft_master.py for the rest of it.

Plays what RaftNode tells its listeners, in its order: a deposed leader hears of that before it hears what its successor
did, and a new one leads only once it has applied everything from before its term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from pysyncobj import FAIL_REASON

from coordinator.api.v1 import command_pb2
from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError, TimedOut
from coordinator.raft.consensus import Consensus
from coordinator.raft.proposals import _PROPOSE_AGAIN, RETRY_S, error_of
from tests.sim import raft_master
from tests.sim.cluster_leader import Leader

if TYPE_CHECKING:
    from tests.sim.cluster_world import World

Done = Callable[[command_pb2.CommandResult | None, CoordinatorError | None], None]


class Master(raft_master.Master):
    """Invariant: `leader` is of the present life."""

    leader: Leader
    _told_term: int | None = None

    @property
    def cluster(self) -> World:
        """The world, as what it is here."""
        return cast("World", self.world)

    @property
    def consensus_now(self) -> Consensus:
        """Its consensus; it runs."""
        assert self.consensus is not None
        return self.consensus

    def monotonic(self) -> Monotonic:
        """Its clock."""
        return Monotonic(self.monotonic_s())

    def _load(self) -> None:
        self._told_term = None
        self.leader = Leader(self)
        super()._load()

    def end(self, *, is_power_cut: bool, why: str) -> None:
        super().end(is_power_cut=is_power_cut, why=why)
        self.cluster.net.end_sessions_of(self.id, is_silent=is_power_cut)

    def _step(self) -> None:
        self._is_step_due = False
        consensus = self.consensus_now
        consensus.step()
        self.seat.look()
        term = consensus.term if consensus.leads_whole else None
        if term != self._told_term:
            self._set_leadership(None)
        for transition in consensus.take_transitions():
            self.cluster.machine_moved(transition.state)
            self.leader.on_transition(transition)
        self._set_leadership(term)
        if consensus.wants_step:
            self.schedule_step()

    def _set_leadership(self, term: int | None) -> None:
        before, self._told_term = self._told_term, term
        if before == term:
            return
        if before is not None:
            self.leader.lead(False, before)
        if term is not None:
            self.leader.lead(True, term)

    def submit(self, payload: bytes, timeout_s: float, done: Done) -> None:
        """Proposes until it is known what became of it, as raft/proposals.py does.

        Whoever awaits that goes on in a later turn of the loop: the step in which it was applied has told everybody.
        """
        give_up_at_s = self.monotonic_s() + timeout_s
        is_done: list[bool] = []

        def end(result: command_pb2.CommandResult | None, error: CoordinatorError | None) -> None:
            if not is_done:
                is_done.append(True)
                self.enqueue_later(0.0, lambda _: done(result, error))

        def answered(result: command_pb2.CommandResult | None, reason: int) -> None:
            if reason == FAIL_REASON.SUCCESS and result is not None:
                end(result, None)
            elif reason in _PROPOSE_AGAIN and self.monotonic_s() + RETRY_S < give_up_at_s:
                self.enqueue_later(RETRY_S / self.rate, lambda _: attempt())
            else:
                end(None, error_of(reason))

        def attempt() -> None:
            if not is_done:
                self.consensus_now.propose(payload, answered)
                self.schedule_step()

        attempt()
        late = TimedOut("no answer within the deadline; the command may be applied")
        self.enqueue_later(timeout_s / self.rate, lambda _: end(None, late))
