"""What one worker shall hold, as of one state.

The generation of an assignment is the Raft index of the state that it was built from. Indexes only grow, also from one
leader to the next, and one index has one state; so a worker that ignores lower generations never goes back, and two
assignments of one generation are equal. A leader builds only from states that it has applied, and sends again whenever
something of the worker's changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.api.v1 import session_pb2
from coordinator.machine.codec import shard_to_proto
from coordinator.machine.state import (
    Change,
    JobChanged,
    MoveChanged,
    NodeChanged,
    SettingsChanged,
    ShardChanged,
    State,
)
from coordinator.model import CronJob, Move, MovePhase, Shard


class AssignmentIndex:
    """Which shards and jobs concern which worker, kept up with each change.

    A scan of 65,536 shards takes tens of milliseconds; a change concerns two or three workers and a look-up takes none.
    Invariant: `_shards[n]` is the set of shards with n among their replicas, and `_jobs[n]` that of jobs with n as
    owner or backup, as of the last state taken in.

    A line of an assignment is made once for each worker, shard and move: of 256 shards one has changed, mostly.
    """

    def __init__(self, state: State) -> None:
        self._shards: dict[str, set[int]] = {}
        self._jobs: dict[str, set[str]] = {}
        self._lines: dict[str, dict[int, tuple[Shard, Move | None, session_pb2.ShardAssignment]]] = {}
        """By worker and shard, with what it was made of."""
        for shard in state.shards.values():
            for node_id in shard.replicas:
                self._shards.setdefault(node_id, set()).add(shard.id)
        for job in state.jobs.values():
            for node_id in job_nodes(job):
                self._jobs.setdefault(node_id, set()).add(job.id)

    def shards_of(self, node_id: str) -> frozenset[int]:
        """Ids of the shards that the worker holds or receives."""
        return frozenset(self._shards.get(node_id, ()))

    def jobs_of(self, node_id: str) -> frozenset[str]:
        """Ids of the jobs that the worker owns or backs up."""
        return frozenset(self._jobs.get(node_id, ()))

    def holds_nothing(self, node_id: str) -> bool:
        """True when the worker has no copy of any shard, nor receives one."""
        return not self._shards.get(node_id)

    def line(self, state: State, shard: Shard, node_id: str) -> session_pb2.ShardAssignment:
        """What the assignment says of one shard of the worker; nobody may change it."""
        move = state.moves.get(state.move_of_shard.get(shard.id, 0))
        lines = self._lines.setdefault(node_id, {})
        known = lines.get(shard.id)
        # Shards and moves are never changed, only replaced: the same object says the same.
        if known is None or known[0] is not shard or known[1] is not move:
            known = lines[shard.id] = (shard, move, _shard_assignment(shard, move, node_id))
        return known[2]

    def take(self, state: State, changes: Iterable[Change]) -> set[str]:
        """Takes the changes of one log entry in; returns the workers whose assignment is another one now."""
        concerned: set[str] = set()
        for change in changes:
            if isinstance(change, ShardChanged):
                concerned |= self._take_shard(change.before, change.after)
            elif isinstance(change, JobChanged):
                concerned |= self._take_job(change.before, change.after)
            elif isinstance(change, MoveChanged):
                # A role is handed over without a change of the replica set: only the move tells the primary to cede.
                for shard_id in change.after.shard_ids:
                    shard = state.shards.get(shard_id)
                    concerned.update(shard.replicas if shard is not None else ())
            elif isinstance(change, NodeChanged):
                concerned |= self._take_node(state, change)
            elif isinstance(change, SettingsChanged):
                if change.before.copy_bytes_per_s != change.after.copy_bytes_per_s:
                    concerned.update(state.nodes)
        return concerned

    def _take_node(self, state: State, change: NodeChanged) -> set[str]:
        """Who shares a shard with a worker that has another address now."""
        before, after = change.before, change.after
        if before is None or after is None or before.grpc_address == after.grpc_address:
            return set()
        shards = (state.shards.get(shard_id) for shard_id in self._shards.get(after.id, ()))
        return {name for shard in shards if shard is not None for name in shard.replicas}

    def _take_shard(self, before: Shard | None, after: Shard | None) -> set[str]:
        nodes_before = set(before.replicas) if before is not None else set()
        nodes_after = set(after.replicas) if after is not None else set()
        shard_id = before.id if before is not None else after.id if after is not None else 0
        for node_id in nodes_before - nodes_after:
            self._shards[node_id].discard(shard_id)
            self._lines.get(node_id, {}).pop(shard_id, None)
        for node_id in nodes_after - nodes_before:
            self._shards.setdefault(node_id, set()).add(shard_id)
        if before is not None and after is not None and _is_same_to_workers(before, after):
            return set()
        return nodes_before | nodes_after

    def _take_job(self, before: CronJob | None, after: CronJob | None) -> set[str]:
        ranks_before = job_nodes(before) if before is not None else ()
        ranks_after = job_nodes(after) if after is not None else ()
        if ranks_before == ranks_after:
            return set()
        job_id = before.id if before is not None else after.id if after is not None else ""
        for node_id in set(ranks_before) - set(ranks_after):
            self._jobs[node_id].discard(job_id)
        for node_id in set(ranks_after) - set(ranks_before):
            self._jobs.setdefault(node_id, set()).add(job_id)
        return {*ranks_before, *ranks_after}


def _is_same_to_workers(before: Shard, after: Shard) -> bool:
    """True when only the masters' own notes on the shard differ."""
    return _seen_by_workers(before) == _seen_by_workers(after)


def _seen_by_workers(shard: Shard) -> tuple[object, ...]:
    return (
        shard.lo,
        shard.hi,
        shard.epoch,
        shard.primary,
        shard.in_sync,
        shard.joining,
        shard.is_formed,
        shard.parents,
    )


def job_nodes(job: CronJob) -> tuple[str, ...]:
    """The job's workers by rank: the owner, then the backups."""
    return (job.owner, *job.backups) if job.owner else job.backups


def build_assignment(state: State, node_id: str, index: AssignmentIndex | None = None) -> session_pb2.Assignment:
    """Everything that the worker shall hold as of `state`, sorted by shard and job.

    `index` saves a scan of all shards and jobs; it must have taken in every change up to `state`.
    """
    index = index if index is not None else AssignmentIndex(state)
    shards = [state.shards[shard_id] for shard_id in sorted(index.shards_of(node_id))]
    others = {name for shard in shards for name in shard.replicas} - {node_id}
    return session_pb2.Assignment(
        generation=state.index,
        shards=[index.line(state, shard, node_id) for shard in shards],
        peers=[
            session_pb2.Peer(node_id=name, grpc_address=state.nodes[name].grpc_address) for name in sorted(others)
        ],
        copy_bytes_per_s=state.settings.copy_bytes_per_s,
        jobs=[
            session_pb2.JobAssignment(job_id=job_id, rank=_rank(state.jobs[job_id], node_id))
            for job_id in sorted(index.jobs_of(node_id))
        ],
    )


def _rank(job: CronJob, node_id: str) -> int:
    """0 for the owner; backups count from 1, also while there is no owner."""
    return 0 if job.owner == node_id else 1 + job.backups.index(node_id)


def _shard_assignment(shard: Shard, move: Move | None, node_id: str) -> session_pb2.ShardAssignment:
    if node_id == shard.primary:
        role = session_pb2.REPLICA_ROLE_PRIMARY
    elif node_id in shard.in_sync:
        role = session_pb2.REPLICA_ROLE_IN_SYNC
    else:
        role = session_pb2.REPLICA_ROLE_JOINING
    cedes = move is not None and move.phase is MovePhase.CEDING and node_id == move.source == shard.primary
    seals = move is not None and move.kind.is_reshape and node_id == shard.primary
    return session_pb2.ShardAssignment(
        shard=shard_to_proto(shard),
        role=role,
        cede_to=move.target if cedes and move is not None else "",
        move_id=move.id if move is not None else 0,
        seal=seals,
        parents=shard.parents,
        formed=shard.is_formed,
    )
