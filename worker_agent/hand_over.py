"""Before a clean stop: a primary ends, so that the next one need not wait for leases to run out."""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import replication_pb2
from worker_agent.replica_primary import State
from worker_agent.shard import Shard
from worker_agent.shard_context import ShardContext
from worker_agent.shard_interface import Assigned


async def hand_over(shard: Shard, context: ShardContext) -> None:
    """Has a primary stop for good in its epoch, everything applied everywhere, and tells the replicas so.

    It is sealed as before a cut (replica_primary.py). A replica that hears that its primary has ceded forgets the lease
    that it gave. The last copy of a shard serves to the end: nobody can take over.
    """
    if not shard.is_serving or len(shard.view.in_sync) < 2:
        return
    shard.view = replace(shard.view, is_sealed=True)
    shard.feed(Assigned(shard.view))
    # It serves on until its epoch is on disk, where that is not yet so.
    while shard.state in (State.SERVING.value, State.CEDING.value) and shard.view.is_sealed:
        await context.changed()
    if shard.state != State.CEDED.value:
        return
    ceded = replication_pb2.Ceded(last_sequence=shard.last_sequence)
    message = replication_pb2.ShardMessage(shard_id=shard.shard_id, epoch=shard.view.epoch, ceded=ceded)
    for peer in shard.view.in_sync:
        if peer != context.node_id:
            context.send(peer, message, False)
