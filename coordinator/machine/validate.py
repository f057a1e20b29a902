"""What must hold in every state, checked. Every state-machine test ends with it; the cost is linear in the state."""

from __future__ import annotations

from itertools import pairwise

from coordinator.machine.passed import PASSED_MAX
from coordinator.machine.snapshot import launch_counts, launch_times
from coordinator.machine.state import State
from coordinator.model import HASH_SPACE, LaunchState, Move, MoveKind, MovePhase, NodeState, Shard


def validate(state: State) -> None:
    """Raises AssertionError, naming what is wrong, unless every invariant of the state holds."""
    _check_ranges(state)
    for shard in state.shards.values():
        _check_shard(state, shard)
    _check_moves(state)
    _check_nodes(state)
    _check_cron(state)
    _check_story(state)


def validate_step(before: State, after: State) -> None:
    """Raises AssertionError unless what may only grow has not shrunk."""
    assert after.index > before.index, (before.index, after.index)
    assert after.time_ms >= before.time_ms, (before.time_ms, after.time_ms)
    for shard_id, shard in after.shards.items():
        old = before.shards.get(shard_id)
        if old is None:
            assert shard_id >= before.next_shard_id, f"shard id {shard_id} is used again"
            continue
        assert shard.epoch >= old.epoch, f"the epoch of shard {shard_id} went from {old.epoch} to {shard.epoch}"
        changed = (shard.primary, shard.in_sync, shard.joining) != (old.primary, old.in_sync, old.joining)
        assert not changed or shard.epoch > old.epoch, f"shard {shard_id} changed its replicas within {shard.epoch}"
        assert shard.is_formed or not old.is_formed, f"shard {shard_id} is no longer formed"
    _check_children(before, after)
    for move_id in after.moves:
        assert move_id in before.moves or move_id >= before.next_move_id, f"move id {move_id} is used again"
    for job_id, job in after.jobs.items():
        earlier = before.jobs.get(job_id)
        assert earlier is None or job.decided_until_ms >= earlier.decided_until_ms, f"{job_id} is undecided again"
        assert earlier is None or job.closed_until_ms >= earlier.closed_until_ms, f"{job_id} is open again"


def _check_children(before: State, after: State) -> None:
    """Shards that are new in `after` stand where those that they were made of stood, with what those held."""
    for shard in after.shards.values():
        if shard.id in before.shards or not before.shards:
            continue
        old = [other for other in before.shards.values() if other.lo < shard.hi and shard.lo < other.hi]
        assert all(other.id not in after.shards for other in old), f"shard {shard.id} overlaps one that stays"
        if not shard.is_formed:
            assert not any(other.is_formed for other in old), f"shard {shard.id} forgets what {old} held"
            continue
        assert set(shard.parents) == {other.id for other in old}, f"shard {shard.id} has the parents {shard.parents}"
        for other in old:
            assert (shard.in_sync, other.joining) == (other.in_sync, ()), f"shard {shard.id} is not where {other} was"
            assert shard.epoch > other.epoch, f"shard {shard.id} begins at epoch {shard.epoch}, after {other.epoch}"


def _check_ranges(state: State) -> None:
    if not state.cluster_id:
        assert not state.shards, "shards without a cluster"
        return
    at = 0
    for shard in sorted(state.shards.values(), key=lambda shard: shard.lo):
        assert shard.lo == at, f"shard {shard.id} begins at {shard.lo}, the one before ends at {at}"
        assert shard.lo < shard.hi, f"shard {shard.id} is empty"
        at = shard.hi
    assert at == HASH_SPACE, f"the ranges end at {at}"


def _check_shard(state: State, shard: Shard) -> None:
    assert shard.id < state.next_shard_id, f"shard {shard.id} is beyond next_shard_id"
    names = shard.in_sync + shard.joining + shard.absent
    assert len(set(names)) == len(names), f"shard {shard.id} names a worker twice: {names}"
    for group in (shard.in_sync, shard.joining, shard.absent):
        assert list(group) == sorted(group), f"shard {shard.id} is not sorted: {group}"
    for name in names:
        assert name in state.nodes, f"shard {shard.id} names {name}, which is unknown"
        assert state.nodes[name].state is not NodeState.LEFT, f"shard {shard.id} names {name}, which has left"
    if shard.epoch == 0:
        assert names == (), f"shard {shard.id} has workers at epoch 0: {names}"
        assert shard.primary == "", f"shard {shard.id} has the primary {shard.primary} at epoch 0"
        assert not shard.is_formed, f"shard {shard.id} is formed at epoch 0"
        assert not shard.quarantine, f"shard {shard.id} is in quarantine at epoch 0"
    else:
        assert shard.primary in shard.in_sync, f"shard {shard.id}: {shard.primary} is not in sync: {shard.in_sync}"
    assert shard.is_formed or not shard.parents, f"shard {shard.id} has parents and is not formed"
    assert all(parent < shard.id for parent in shard.parents), f"shard {shard.id} is older than {shard.parents}"
    lost = [lost.node_id for lost in shard.lost_primaries]
    assert len(set(lost)) == len(lost), f"shard {shard.id} lost a primary twice: {lost}"


def _check_moves(state: State) -> None:
    held = [(shard_id, move.id) for move in state.moves.values() for shard_id in move.shard_ids]
    assert dict(held) == dict(state.move_of_shard), "move_of_shard"
    assert len(state.move_of_shard) == len(held), "two moves of one shard"
    joining = {(shard.id, name) for shard in state.shards.values() for name in shard.joining}
    expected = set()
    for move in state.moves.values():
        assert not move.has_ended, f"move {move.id} has ended and is in progress"
        assert move.shard_id in state.shards, f"move {move.id} is of shard {move.shard_id}, which is gone"
        shard = state.shards[move.shard_id]
        assert not shard.quarantine, f"move {move.id} is of shard {shard.id}, which is in quarantine"
        if move.kind.is_reshape:
            _check_reshape(state, move)
        elif move.phase is MovePhase.COPYING:
            expected.add((move.shard_id, move.target))
            assert not move.source or move.source in shard.in_sync, f"move {move.id}: the source is not in sync"
        elif move.phase is MovePhase.CEDING:
            assert move.target in shard.in_sync, f"move {move.id}: the target is not in sync"
            assert move.source == shard.primary, f"move {move.id}: {move.source} cedes and is not primary"
        else:
            assert move.source in shard.in_sync, f"move {move.id}: the source is gone already"
            assert move.source != shard.primary, f"move {move.id}: the primary is to be removed"
        assert move.kind is not MoveKind.REPAIR or not move.source, f"move {move.id} repairs and has a source"
    assert joining == expected, f"joining without a move, or the other way round: {joining ^ expected}"
    for move in state.ended_moves.values():
        assert move.has_ended, f"move {move.id} is filed as ended"


def _check_reshape(state: State, move: Move) -> None:
    assert move.phase is MovePhase.CEDING, f"move {move.id} is a {move.kind} and {move.phase}"
    assert (move.source, move.target) == ("", ""), f"move {move.id} goes from {move.source!r} to {move.target!r}"
    shards = [state.shards[shard_id] for shard_id in move.shard_ids]
    assert all(shard.is_formed and not shard.parents for shard in shards), f"move {move.id} of {shards}"
    assert all(shard.in_sync == shards[0].in_sync for shard in shards), f"move {move.id}: other replicas: {shards}"
    if move.kind is MoveKind.SPLIT:
        assert shards[0].lo < move.at < shards[0].hi, f"move {move.id} cuts at {move.at}"
        assert len(shards) == 1, f"move {move.id} cuts {move.shard_ids}"
    else:
        lower, upper = shards
        assert lower.hi == upper.lo, f"move {move.id} joins {lower} and {upper}, which are no neighbours"


def _check_nodes(state: State) -> None:
    for node in state.nodes.values():
        if node.state in (NodeState.DOWN, NodeState.LEFT, NodeState.JOINING):
            assert not node.is_suspect, f"worker {node.id} is {node.state} and suspect"
        if node.state is NodeState.DRAINING:
            assert node.drain_requested, f"worker {node.id} drains and nobody asked"
        if node.state is NodeState.ACTIVE:
            assert not node.drain_requested, f"worker {node.id} is to be drained and active"


def _check_cron(state: State) -> None:
    assert launch_times(state.launches.values()) == dict(state.launch_times), "launch_times"
    assert launch_counts(state.launches.values()) == dict(state.launch_counts), "launch_counts"
    for (job_id, scheduled_at_ms), launch in state.launches.items():
        assert launch.key == (job_id, scheduled_at_ms), f"launch {launch.key} is filed as {(job_id, scheduled_at_ms)}"
        assert job_id in state.jobs, f"launch of {job_id}, which is gone"
        if launch.state is LaunchState.WAITING:
            assert not launch.worker, f"{launch.key} waits and has a worker"
            assert not launch.cancel_reason, f"{launch.key} waits although it was cancelled"
        else:
            assert launch.state.has_ended or launch.worker in state.nodes, f"{launch.key} runs on an unknown worker"
        attempts = [attempt.attempt for attempt in launch.earlier_attempts]
        latest = launch.attempt if launch.state is LaunchState.WAITING else launch.attempt - 1
        # Attempts that were declined are left out.
        is_ascending = attempts == sorted({attempt for attempt in attempts if 1 <= attempt <= latest})
        assert is_ascending, f"{launch.key} is at {launch.attempt} after {attempts}"
    for job in state.jobs.values():
        assert not job.owner or job.owner in state.nodes, f"{job.id} is owned by {job.owner}, which is unknown"
        ends = [job.decided_until_ms, *(past.until_ms for past in job.passed)]
        assert all(first < second for first, second in pairwise(ends)), f"what passed of {job.id} ends at {ends}"
        assert len(job.passed) <= PASSED_MAX, f"{job.id} has {len(job.passed)} stretches to record"


def _check_story(state: State) -> None:
    first = state.next_event_sequence - len(state.events)
    assert sorted(state.events) == list(range(first, state.next_event_sequence)), "the story has gaps"
    first = state.next_result_position - len(state.result_order)
    assert sorted(state.result_order) == list(range(first, state.next_result_position)), "result_order has gaps"
    assert set(state.results) <= set(state.result_order.values()), "a result that is never forgotten"
