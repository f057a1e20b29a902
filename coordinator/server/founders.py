"""The leader admits masters that missed the founding, though they were there.

A new disk votes by itself only while nobody has any history (raft/voters.py, rule 2). Who sees the last of the others
some milliseconds too late, at the first start of a cluster, would stay a learner until somebody told the leader to
admit it, and until then a cluster of three could not do without either of the two that vote. So a leader that was
founded itself in the life of this process admits those whose disk it saw, empty, at that moment. An admission is safe
whichever disk it names (rule 3); that nobody has to be asked is because this disk takes nobody's place.
"""

from __future__ import annotations

import asyncio
import logging

from coordinator.api.v1 import command_pb2
from coordinator.model.errors import CoordinatorError
from coordinator.server.context import MasterContext

LOOK_S = 0.5

_log = logging.getLogger(__name__)


async def admit_founders(master: MasterContext) -> None:
    """Looks for them as long as this master leads; whoever calls cancels it with that."""
    raft = master.raft
    while True:
        for other in master.config.masters:
            standing = raft.standing(other.id) if other.id != master.self_id else None
            if standing is None or not (standing.is_founder and standing.is_learner and standing.matched_index):
                continue
            if other.id not in raft.state.masters:
                _log.info("%s was there at the founding, but too late to vote: admitting it", other.id)
                admit = command_pb2.AdmitMaster(master_id=other.id, disk_id=standing.disk_id)
                try:
                    await raft.propose(command_pb2.Command(cause="founding", admit_master=admit))
                except CoordinatorError as error:
                    _log.info("%s is not admitted yet: %s", other.id, error)
        await asyncio.sleep(LOOK_S)
