"""The part of ClusterService about the masters themselves: who leads, whose disk votes, and backups.

A backup is made by the master that is asked, from its own state after a read barrier, so it shows everything that was
acknowledged before the call, whoever leads. States are immutable, so it is encoded in a thread while the machine goes
on; what is sent is the whole file with its checksum, which the caller writes down as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from coordinator import __version__
from coordinator.api.v1 import cluster_pb2, command_pb2, snapshot_pb2
from coordinator.machine.backup import encode_backup
from coordinator.model import AdmittedMaster
from coordinator.model.errors import ConfigError, InvalidRequest, Overloaded, RefusalReason, Refused
from coordinator.server.cluster_parts import ClusterParts
from coordinator.server.context import LEADER_POLL_S, Call, time_left_s

CHUNK_BYTES = 256 << 10
BACKUPS_MAX = 2
"""Backups that one master makes at a time: each holds the encoded state."""
CATCH_UP_S = 1.0
"""How long a transfer waits for the target to have the whole log, while others go on writing."""
WAIT_SHARE = 0.8
"""Share of a caller's deadline that a replacement may wait, so that its refusal is heard."""


class ClusterMasters:
    """Questions and orders to the masters."""

    def __init__(self, parts: ClusterParts) -> None:
        self._parts = parts
        self._master = parts.master
        self._backups = 0
        self._replacing = asyncio.Lock()

    # The leadership

    async def TransferLeadership(
        self, request: cluster_pb2.TransferLeadershipRequest, context: Call
    ) -> cluster_pb2.TransferLeadershipResponse:
        async def here() -> cluster_pb2.TransferLeadershipResponse:
            return await self._transfer(request, context)

        known = [master.id for master in self._master.config.masters]
        for master_id in (request.target_id, request.leader_id):
            if master_id and master_id not in known:
                raise InvalidRequest(f"there is no master {master_id!r}; use one of {', '.join(known)}")
        if not request.leader_id:
            # Named before it is passed on, since it may be passed on twice: the second leader must not hand on again.
            request.leader_id = await self._master.wait_for_leader(time_left_s(context))
        return await self._parts.forwarder.answer(context, here, "TransferLeadership", request)

    async def _transfer(
        self, request: cluster_pb2.TransferLeadershipRequest, context: Call
    ) -> cluster_pb2.TransferLeadershipResponse:
        raft, self_id = self._master.raft, self._master.self_id
        if request.leader_id == self_id != request.target_id:
            if len(self._master.config.masters) == 1:
                raise Refused(RefusalReason.PRECONDITION, f"{self_id} is the only master; there is nobody to take over")
            await self._hand_over(request.target_id or None)
        leader_id = await self._master.wait_for_leader(time_left_s(context))
        return cluster_pb2.TransferLeadershipResponse(leader_id=leader_id, term=raft.term)

    async def _hand_over(self, target_id: str | None) -> None:
        """Under load a follower lacks the newest entries most of the time, and has them all some of the time."""
        loop = asyncio.get_running_loop()
        give_up_at_s = loop.time() + CATCH_UP_S
        while True:
            try:
                return await self._master.raft.transfer_leadership(target_id)
            except Refused:
                if loop.time() >= give_up_at_s:
                    raise
            await asyncio.sleep(LEADER_POLL_S / 4)

    # Disks

    async def ReplaceMaster(
        self, request: cluster_pb2.ReplaceMasterRequest, context: Call
    ) -> cluster_pb2.ReplaceMasterResponse:
        async def here() -> cluster_pb2.ReplaceMasterResponse:
            # What is repeated finds the disk admitted already.
            async with self._replacing:
                return await self._replace(request, context)

        known = [master.id for master in self._master.config.masters]
        if request.master_id not in known:
            raise InvalidRequest(f"there is no master {request.master_id!r}; use one of {', '.join(known)}")
        return await self._parts.forwarder.answer(context, here, "ReplaceMaster", request)

    async def _replace(
        self, request: cluster_pb2.ReplaceMasterRequest, context: Call
    ) -> cluster_pb2.ReplaceMasterResponse:
        raft, id = self._master.raft, request.master_id
        if id == self._master.self_id:
            raise Refused(RefusalReason.PRECONDITION, f"{id} leads, so its disk is in use; nothing is to be replaced")
        before = raft.state.masters.get(id)
        old_address = before.peer_address if before is not None else ""
        if request.peer_address:
            try:
                raft.move_peer(id, request.peer_address)
            except ConfigError as error:
                raise InvalidRequest(str(error)) from None
        is_admitted = False
        try:
            give_up_at_s = asyncio.get_running_loop().time() + time_left_s(context) * WAIT_SHARE
            disk_id = await self._wait_for_learner(id, give_up_at_s, raft.state.masters.get(id))
            admitted = raft.state.masters.get(id)
            if admitted is None or admitted.disk_id != disk_id:
                admit = command_pb2.AdmitMaster(
                    master_id=id, disk_id=disk_id, peer_address=request.peer_address or old_address
                )
                await self._master.submit(command_pb2.Command(admit_master=admit), "", context)
            is_admitted = True
        finally:
            if request.peer_address and not is_admitted:
                raft.move_peer(id, old_address)
        await self._wait(lambda: self._votes(id), give_up_at_s)
        return cluster_pb2.ReplaceMasterResponse(disk_id=disk_id)

    async def _wait_for_learner(self, id: str, give_up_at_s: float, admitted: AdmittedMaster | None) -> str:
        """The disk of a master that is connected, does not vote, and has all that was committed when it was asked."""
        raft = self._master.raft
        wanted_index = raft.status().commit_index

        def is_there() -> bool:
            standing = raft.standing(id)
            return standing is not None and standing.is_learner and standing.matched_index >= wanted_index

        await self._wait(lambda: is_there() or self._votes(id), give_up_at_s)
        standing = raft.standing(id)
        if standing is None:
            raise Refused(
                RefusalReason.PRECONDITION,
                f"{id} is not connected to the leader {self._master.self_id}; start it with an empty data directory, "
                "with --with HOST:PORT when its peer port is at another place now",
            )
        if not standing.is_learner and (admitted is None or admitted.disk_id != standing.disk_id):
            raise Refused(
                RefusalReason.PRECONDITION,
                f"the disk of {id} votes, there is nothing to replace; if it is to begin anew, stop {id} and move its "
                "data directory away first",
            )
        if standing.is_learner and standing.matched_index < wanted_index:
            raise Refused(
                RefusalReason.PRECONDITION,
                f"{id} still lacks {wanted_index - standing.matched_index} entries of the log; repeat this in a while",
            )
        return standing.disk_id

    def _votes(self, id: str) -> bool:
        standing = self._master.raft.standing(id)
        return standing is not None and not standing.is_learner and standing.matched_index > 0

    @staticmethod
    async def _wait(condition: Callable[[], bool], give_up_at_s: float) -> None:
        loop = asyncio.get_running_loop()
        while not condition() and loop.time() < give_up_at_s:  # noqa: ASYNC110 - several conditions, no event
            await asyncio.sleep(LEADER_POLL_S)

    # Backups

    async def Backup(
        self, request: cluster_pb2.BackupRequest, context: Call
    ) -> AsyncIterator[cluster_pb2.BackupResponse]:
        if self._backups >= BACKUPS_MAX:
            raise Overloaded(f"{self._backups} backups are being made at {self._master.self_id}; try again later")
        self._backups += 1
        try:
            data, first = await self._make_backup(context)
            first.data = data[:CHUNK_BYTES]
            yield first
            for offset in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
                yield cluster_pb2.BackupResponse(data=data[offset : offset + CHUNK_BYTES])
        finally:
            self._backups -= 1

    async def _make_backup(self, context: Call) -> tuple[bytes, cluster_pb2.BackupResponse]:
        master = self._master
        state = await master.read(cluster_pb2.CONSISTENCY_LINEARIZABLE, context)
        if not state.cluster_id:
            raise Refused(RefusalReason.PRECONDITION, "the cluster is not founded yet; there is nothing to back up")
        header = snapshot_pb2.BackupHeader(
            cluster_name=master.config.name,
            term=master.raft.term,
            taken_unix_ms=master.clock.wall_ms(),
            master_id=master.self_id,
            software_version=__version__,
        )
        data = await asyncio.to_thread(encode_backup, header, state)
        return data, cluster_pb2.BackupResponse(
            file_bytes=len(data), index=state.index, cluster_id=state.cluster_id
        )
