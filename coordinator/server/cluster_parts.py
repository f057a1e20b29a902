"""What the halves of ClusterService share: reads in cluster_reads.py, changes in cluster_writes.py."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.control.figures import CopyProgress
from coordinator.discovery.interface import Discovery
from coordinator.model.errors import RefusalReason, Refused
from coordinator.placement import Planner
from coordinator.placement.plan import PlannedMove
from coordinator.server.context import MasterContext
from coordinator.server.forward import Forwarder, MasterChannels
from coordinator.server.leader import LeaderDriver
from coordinator.server.story import Story


@dataclass(frozen=True, slots=True)
class ClusterParts:
    """The parts of one master that answer for the cluster."""

    master: MasterContext
    driver: LeaderDriver
    forwarder: Forwarder
    channels: MasterChannels
    story: Story
    discovery: Discovery
    planner: Planner


def planned_move_to_proto(move: PlannedMove) -> cluster_pb2.PlannedMove:
    """A move of a plan as the API shows it."""
    return cluster_pb2.PlannedMove(
        shard_id=move.shard_id,
        source=move.source,
        target=move.target,
        kind=types_pb2.MoveKind.ValueType(move.kind.value),
        reason=move.reason,
        within_budget=move.within_budget,
    )


def progress_to_proto(progress: CopyProgress) -> cluster_pb2.MoveProgress:
    """How far a copy is, as the API shows it."""
    return cluster_pb2.MoveProgress(
        move_id=progress.move_id,
        copied_rows=progress.copied_rows,
        copied_bytes=progress.copied_bytes,
        copy_rows=progress.copy_rows,
        bytes_per_s=progress.bytes_per_s,
        remaining_s=progress.remaining_s,
    )


def not_found(what: str, known: str) -> Refused:
    """A refusal for a name that nothing has; `known` tells how to find those that exist."""
    return Refused(RefusalReason.NOT_FOUND, f"there is no {what}; {known}")
