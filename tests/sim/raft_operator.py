"""The operator of the simulated masters: replaces lost disks as `clusterctl masters replace` does, one at a time.

Asked again and again, the leader admits the new disk once that is connected, does not vote, and has what was committed
(server/cluster_masters.py). A disk that was thought lost may come back: before the admission it is as good as ever,
after it the masters refuse it, and the operator puts the new one in again.

No second disk is lost before the first one is seen to: two forgotten disks of three are lost data in any protocol.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from coordinator.api.v1 import command_pb2

if TYPE_CHECKING:
    from tests.sim.raft_master import Master
    from tests.sim.raft_world import World

LOOK_S = 0.1
"""How often the operator looks."""


class Operator:
    """Invariant: while `replacing` is a master, every other one has a disk that votes."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.replacing: Master | None = None
        self.replaced = 0
        """New disks that came to vote."""
        self._world = world
        self._rng = rng

    def lose_disk(self, master: Master) -> bool:
        """Takes a master's disk for an empty one; False when another one is not seen to yet."""
        if self.replacing is not None:
            return False
        master.lose_disk()
        self._begin(master)
        return True

    def bring_back_a_disk(self) -> Master | None:
        """The disk that a master had before is found again, and put in; None when there is none."""
        spares = [master for master in self._world.masters.values() if master.spare is not None]
        if self.replacing is None and spares:
            self._begin(self._rng.choice(spares))
        master = self.replacing
        if master is None or master.spare is None:
            return None
        master.swap_disks()
        return master

    def _begin(self, master: Master) -> None:
        self.replacing = master
        self._world.after(LOOK_S, self._look)

    def _look(self) -> None:
        world, master, leader = self._world, self.replacing, self._world.leader()
        assert master is not None
        if leader is not None and leader.consensus is not None:
            voters = leader.consensus.voters
            wanted, own = voters.disk_for(master.id), master.identity
            if own is None:
                pass  # It has not started with this disk yet.
            elif own.is_voter and wanted not in ("", own.disk_id):
                master.swap_disks()
                master.start()
            elif own.is_voter and not voters.has_admission_on_its_way:
                if master.consensus is not None:
                    world.note(f"{master.id} votes with the disk {own.disk_id}")
                    self.replaced += own.disk_id == wanted
                    self.replacing = None
                    return
            elif leader is not master:
                disk_id = own.disk_id
                leader.enqueue(lambda leader: self._admit(leader, master, disk_id))
        world.after(LOOK_S, self._look)

    def _admit(self, leader: Master, master: Master, disk_id: str) -> None:
        """What the leader's ReplaceMaster does when it is asked."""
        standing = leader.seat.standing(master.id)
        consensus = leader.consensus
        assert consensus is not None
        if self.replacing is not master or standing is None or standing.disk_id != disk_id:
            return
        if standing.is_learner and standing.matched_index >= consensus.commit_index:
            self._world.note(f"{leader.id} is asked to admit the disk {disk_id} of {master.id}")
            admit = command_pb2.AdmitMaster(master_id=master.id, disk_id=disk_id)
            command = command_pb2.Command(cause="replace", admit_master=admit)
            leader.propose(command, lambda result, error: None)
