"""A simulated master that also controls the cluster while it leads. See raft_master.py for the rest of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from coordinator.machine.state import Transition
from coordinator.raft import RaftNode
from coordinator.raft.consensus import Consensus
from tests.sim import raft_master
from tests.sim.cluster_leader import Leader

if TYPE_CHECKING:
    from tests.sim.cluster_world import World


class Master(raft_master.Master):
    """Invariant: `leader` is of the present life."""

    leader: Leader

    @property
    def cluster(self) -> World:
        """The world, as what it is here."""
        return cast("World", self.world)

    @property
    def consensus_now(self) -> Consensus:
        """Its consensus; it runs."""
        assert self.consensus is not None
        return self.consensus

    def _make_node(self) -> RaftNode:
        node = super()._make_node()
        self.leader = Leader(self)
        node.on_leadership(self._heard(self.leader.lead))
        node.on_transition(self._heard(self._applied))
        return node

    def _heard(self, listener: Callable[..., None]) -> Callable[..., None]:
        """A node drops what a listener raises, which here would hide what the world found wrong."""

        def call(*arguments: Any) -> None:
            try:
                listener(*arguments)
            except Exception as error:
                self.world.failures.append(error)

        return call

    def _applied(self, transition: Transition) -> None:
        self.cluster.machine_moved(transition.state)
        self.leader.on_transition(transition)

    def end(self, *, is_power_cut: bool, why: str) -> None:
        super().end(is_power_cut=is_power_cut, why=why)
        self.cluster.net.end_sessions_of(self.id, is_silent=is_power_cut)
