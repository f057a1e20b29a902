"""The half of ClusterService that changes something.

Every change is one command with the request's id, so that a retry applies once, whichever master gets it. What is
checked here beforehand spares the log a refusal or needs more than the machine knows (is a drain safe?); the machine
decides again, from the state at the command's place in the log.
"""

from __future__ import annotations

import asyncio
import uuid

from coordinator.api.v1 import cluster_pb2, command_pb2
from coordinator.machine.codec import settings_to_proto
from coordinator.model import MovePhase
from coordinator.model.errors import RefusalReason, Refused, TimedOut
from coordinator.server.cluster_parts import ClusterParts, not_found, planned_move_to_proto
from coordinator.server.context import Call, time_left_s

LINEARIZABLE = cluster_pb2.CONSISTENCY_LINEARIZABLE
MOVE_POLL_S = 0.02
"""How often a split or a merge is looked at by who waits for its end; a look costs one read of a map."""


class ClusterWrites:
    """Changes of the cluster."""

    def __init__(self, parts: ClusterParts) -> None:
        self._parts = parts
        self._master = parts.master
        self._changing_settings = asyncio.Lock()

    # Workers

    async def DrainNode(self, request: cluster_pb2.DrainNodeRequest, context: Call) -> cluster_pb2.DrainNodeResponse:
        async def here() -> cluster_pb2.DrainNodeResponse:
            return await self._drain(request, context)

        _name(request)
        return await self._parts.forwarder.answer(context, here, "DrainNode", request)

    async def _drain(self, request: cluster_pb2.DrainNodeRequest, context: Call) -> cluster_pb2.DrainNodeResponse:
        state = await self._master.read(LINEARIZABLE, context)
        node = state.nodes.get(request.node_id)
        if node is None:
            raise not_found(f"worker {request.node_id!r}", "`clusterctl nodes list` names those that exist")
        check = self._parts.planner.drain_check(state, request.node_id, self._master.clock.wall_ms())
        if not request.dry_run:
            # A drain that was asked for already is not refused halfway: whoever retries wants it to go on.
            if not check.safe and not node.drain_requested:
                raise Refused(
                    RefusalReason.PRECONDITION,
                    f"worker {request.node_id} cannot be drained safely: {'; '.join(check.problems)}",
                )
            command = command_pb2.Command(drain_node=command_pb2.DrainNode(node_id=request.node_id))
            await self._master.submit(command, request.request_id, context)
        return cluster_pb2.DrainNodeResponse(
            safe=check.safe, problems=check.problems, moves=[planned_move_to_proto(move) for move in check.moves]
        )

    async def UndrainNode(
        self, request: cluster_pb2.UndrainNodeRequest, context: Call
    ) -> cluster_pb2.UndrainNodeResponse:
        command = command_pb2.Command(undrain_node=command_pb2.UndrainNode(node_id=request.node_id))
        await self._master.submit(command, request.request_id, context)
        return cluster_pb2.UndrainNodeResponse()

    async def RemoveNode(self, request: cluster_pb2.RemoveNodeRequest, context: Call) -> cluster_pb2.RemoveNodeResponse:
        command = command_pb2.Command(remove_node=command_pb2.RemoveNode(node_id=request.node_id))
        await self._master.submit(command, request.request_id, context)
        return cluster_pb2.RemoveNodeResponse()

    async def SetNodeWeight(
        self, request: cluster_pb2.SetNodeWeightRequest, context: Call
    ) -> cluster_pb2.SetNodeWeightResponse:
        change = command_pb2.SetNodeWeight(node_id=request.node_id, weight=request.weight)
        await self._master.submit(command_pb2.Command(set_node_weight=change), request.request_id, context)
        return cluster_pb2.SetNodeWeightResponse()

    # Shards and moves

    async def SplitShard(self, request: cluster_pb2.SplitShardRequest, context: Call) -> cluster_pb2.SplitShardResponse:
        async def here() -> cluster_pb2.SplitShardResponse:
            return await self._split(request, context)

        _name(request)
        return await self._parts.forwarder.answer(context, here, "SplitShard", request)

    async def _split(self, request: cluster_pb2.SplitShardRequest, context: Call) -> cluster_pb2.SplitShardResponse:
        state = await self._master.read(LINEARIZABLE, context)
        shard = state.shards.get(request.shard_id)
        control = self._parts.driver.control
        figure = control.figure(shard) if control is not None and shard is not None and not request.at else None
        is_inside = figure is not None and shard is not None and shard.lo < figure.median_hash < shard.hi
        # Without the shard it may still be the retry of a split that was made; the machine remembers those.
        split = command_pb2.SplitShard(
            shard_id=request.shard_id,
            at=figure.median_hash if figure is not None and is_inside else request.at,
            expected_epoch=shard.epoch if shard is not None else 0,
            reason="an operator asked for it",
        )
        applied = await self._master.submit(command_pb2.Command(split_shard=split), request.request_id, context)
        lower_shard_id, upper_shard_id = await self._created(applied, context)
        return cluster_pb2.SplitShardResponse(lower_shard_id=lower_shard_id, upper_shard_id=upper_shard_id)

    async def MergeShards(
        self, request: cluster_pb2.MergeShardsRequest, context: Call
    ) -> cluster_pb2.MergeShardsResponse:
        merge = command_pb2.MergeShards(
            lower_shard_id=request.lower_shard_id,
            upper_shard_id=request.upper_shard_id,
            reason="an operator asked for it",
        )
        applied = await self._master.submit(command_pb2.Command(merge_shards=merge), request.request_id, context)
        (shard_id,) = await self._created(applied, context)
        return cluster_pb2.MergeShardsResponse(shard_id=shard_id)

    async def _created(self, applied: command_pb2.Applied, context: Call) -> tuple[int, ...]:
        """The shards that a split or a merge made, once it has. Raises Refused when it is rolled back."""
        if not applied.move_id:
            return tuple(applied.created_ids)
        give_up_at_s = asyncio.get_running_loop().time() + time_left_s(context)
        while (move := self._master.raft.state.ended_moves.get(applied.move_id)) is None:
            if asyncio.get_running_loop().time() >= give_up_at_s:
                raise TimedOut(
                    f"move {applied.move_id} has started and goes on; `clusterctl moves show {applied.move_id}` "
                    "says how it ends"
                )
            await asyncio.sleep(MOVE_POLL_S)
        if move.phase is not MovePhase.DONE:
            raise Refused(RefusalReason.PRECONDITION, f"nothing was cut or joined: {move.outcome}")
        # Whoever goes on at once with what was made finds it ready; what is still not by the deadline will be.
        while (  # noqa: ASYNC110 - no event for one shard
            self._are_in_the_making(move.created_shard_ids) and asyncio.get_running_loop().time() < give_up_at_s
        ):
            await asyncio.sleep(MOVE_POLL_S)
        return move.created_shard_ids

    def _are_in_the_making(self, shard_ids: tuple[int, ...]) -> bool:
        """True while a worker still makes its store of one of them."""
        shards = [self._master.raft.state.shards.get(shard_id) for shard_id in shard_ids]
        return any(shard is not None and shard.parents for shard in shards)

    async def ReleaseShard(
        self, request: cluster_pb2.ReleaseShardRequest, context: Call
    ) -> cluster_pb2.ReleaseShardResponse:
        command = command_pb2.Command(release_shard=command_pb2.ReleaseShard(shard_id=request.shard_id))
        await self._master.submit(command, request.request_id, context)
        return cluster_pb2.ReleaseShardResponse()

    async def AbortMove(self, request: cluster_pb2.AbortMoveRequest, context: Call) -> cluster_pb2.AbortMoveResponse:
        reason = request.reason or "aborted by an operator"
        abort = command_pb2.AbortMove(move_id=request.move_id, reason=reason)
        await self._master.submit(command_pb2.Command(abort_move=abort), request.request_id, context)
        return cluster_pb2.AbortMoveResponse()

    # Settings

    async def ChangeSettings(
        self, request: cluster_pb2.ChangeSettingsRequest, context: Call
    ) -> cluster_pb2.ChangeSettingsResponse:
        async def here() -> cluster_pb2.ChangeSettingsResponse:
            # The command replaces all settings. One change after the other, all at the leader, so that two people who
            # change different settings at the same time both get what they asked for.
            async with self._changing_settings:
                return await self._change_settings(request, context)

        _name(request)
        return await self._parts.forwarder.answer(context, here, "ChangeSettings", request)

    async def _change_settings(
        self, request: cluster_pb2.ChangeSettingsRequest, context: Call
    ) -> cluster_pb2.ChangeSettingsResponse:
        state = await self._master.read(LINEARIZABLE, context)
        settings = settings_to_proto(state.settings)
        if request.HasField("rebalance_paused"):
            settings.rebalance_paused = request.rebalance_paused
        if request.HasField("cron_paused"):
            settings.cron_paused = request.cron_paused
        if request.HasField("replicas"):
            settings.replicas = request.replicas
        if request.HasField("copy_bytes_per_s"):
            settings.copy_bytes_per_s = request.copy_bytes_per_s
        change = command_pb2.ChangeSettings(settings=settings)
        await self._master.submit(command_pb2.Command(change_settings=change), request.request_id, context)
        return cluster_pb2.ChangeSettingsResponse(settings=settings_to_proto(self._master.raft.state.settings))


def _name(
    request: cluster_pb2.DrainNodeRequest | cluster_pb2.ChangeSettingsRequest | cluster_pb2.SplitShardRequest,
) -> None:
    """Gives a request without an id one before it is passed on, since it may be passed on more than once."""
    request.request_id = request.request_id or uuid.uuid4().hex
