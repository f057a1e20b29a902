"""A cluster on paper for tests of the planner: states made by hand, and plans carried out at once, move by move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from immutables import Map

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import (
    HASH_SPACE,
    ClusterSettings,
    CronJob,
    CronJobSpec,
    Move,
    MoveKind,
    MovePhase,
    Node,
    NodeState,
    Shard,
    WallMs,
)
from coordinator.placement import Plan, PlannedMove, Planner

NOW_MS = WallMs(1_700_000_000_000)


def worker(name: str, zone: str = "", weight: float = 1.0, state: NodeState = NodeState.ACTIVE) -> Node:
    """A worker that has stood as it does for a day."""
    since_ms = WallMs(NOW_MS - 86_400_000)
    drained = state is NodeState.DRAINING
    return Node(id=name, zone=zone, weight=weight, state=state, state_since_ms=since_ms, drain_requested=drained)


def cluster(workers: Iterable[Node], shards: int = 16, replicas: int = 2, paused: bool = False) -> State:
    """Workers, and shards of equal range that nobody holds yet."""
    ranges = [(number * HASH_SPACE // shards, (number + 1) * HASH_SPACE // shards) for number in range(shards)]
    return State(
        time_ms=NOW_MS,
        settings=ClusterSettings(replicas=replicas, rebalance_paused=paused),
        nodes=Map({node.id: node for node in workers}),
        shards=Map({number + 1: Shard(number + 1, lo, hi) for number, (lo, hi) in enumerate(ranges)}),
        next_shard_id=shards + 1,
    )


def named(count: int, zones: int = 0) -> list[Node]:
    """Workers w1, w2, ..., in turn in `zones` zones."""
    return [worker(f"w{number}", f"z{number % zones}" if zones else "") for number in range(1, count + 1)]


def assigned(state: State, planner: Planner) -> State:
    """The state once the first workers are assigned."""
    shards = dict(state.shards)
    for shard_id, names in planner.assign_initial(state):
        in_sync = tuple(sorted(names))
        shards[shard_id] = replace(shards[shard_id], epoch=1, primary=names[0], in_sync=in_sync, is_formed=True)
    return replace(state, shards=Map(shards))


def with_shard(state: State, shard_id: int, *in_sync: str, absent: tuple[str, ...] = (), moved_ms: int = 0) -> State:
    """The state with one shard held by the workers that are named, the first one its primary."""
    shard = replace(
        state.shards[shard_id],
        epoch=5,
        is_formed=True,
        primary=in_sync[0],
        in_sync=tuple(sorted(in_sync)),
        absent=absent,
        moved_ms=WallMs(moved_ms),
    )
    return replace(state, shards=state.shards.set(shard_id, shard))


def with_node(state: State, node: Node) -> State:
    """The state with one worker's record put or replaced."""
    return replace(state, nodes=state.nodes.set(node.id, node))


def with_jobs(state: State, *jobs: CronJob | str) -> State:
    """The state with these jobs; a name stands for a new job."""
    made = [CronJob(CronJobSpec(job, "* * * * *")) if isinstance(job, str) else job for job in jobs]
    return replace(state, jobs=state.jobs.update({job.id: job for job in made}))


def with_job_decisions(state: State, planner: Planner) -> State:
    """The state once the planner's decisions about jobs are carried out."""
    jobs = dict(state.jobs)
    for job_id, owner, backups in planner.assign_jobs(state):
        jobs[job_id] = replace(jobs[job_id], owner=owner, backups=backups)
    return replace(state, jobs=Map(jobs))


def lose(state: State, name: str, node: Node) -> State:
    """The state once a worker has fallen out: as the machine does it, its record becomes `node`."""
    shards = dict(state.shards)
    for shard in state.shards.values():
        others = tuple(other for other in shard.in_sync if other != name)
        if name in shard.in_sync and others:
            primary = others[0] if shard.primary == name else shard.primary
            absent = tuple(sorted({*shard.absent, name}))
            shards[shard.id] = replace(shard, epoch=shard.epoch + 1, primary=primary, in_sync=others, absent=absent)
    return replace(with_node(state, node), shards=Map(shards))


def running(state: State, move: PlannedMove) -> State:
    """The state once a planned move has been started."""
    started = Move(state.next_move_id, move.shard_id, move.source, move.target, move.kind, MovePhase.COPYING)
    return replace(
        state,
        moves=state.moves.set(started.id, replace(started, started_ms=NOW_MS, phase_since_ms=NOW_MS)),
        move_of_shard=state.move_of_shard.set(move.shard_id, started.id),
        next_move_id=started.id + 1,
    )


def done(state: State, move: PlannedMove, now_ms: WallMs) -> State:
    """The state once a planned move has ended: its final effect, as the machine's phases add up to it."""
    shard = state.shards[move.shard_id]
    assert shard.epoch == move.expected_epoch, f"{move} was decided on another epoch than {shard}"
    in_sync = set(shard.in_sync)
    if move.target:
        in_sync.add(move.target)
    if move.source and move.kind is not MoveKind.TRANSFER:
        in_sync.remove(move.source)
    whole = len(in_sync) >= state.settings.replicas
    changed = replace(
        shard,
        epoch=shard.epoch + 2,
        primary=move.target if move.source == shard.primary else shard.primary,
        in_sync=tuple(sorted(in_sync)),
        absent=() if whole else tuple(name for name in shard.absent if name != move.target),
        moved_ms=shard.moved_ms if move.kind is MoveKind.REPAIR else now_ms,
    )
    ended = Move(state.next_move_id, shard.id, move.source, move.target, move.kind, MovePhase.DONE)
    return replace(
        state,
        shards=state.shards.set(shard.id, changed),
        ended_moves=state.ended_moves.set(ended.id, replace(ended, started_ms=now_ms, phase_since_ms=now_ms)),
        next_move_id=ended.id + 1,
    )


def loads(state: State) -> Counter[str]:
    """Copies by worker."""
    return Counter(name for shard in state.shards.values() for name in shard.in_sync)


def primaries(state: State) -> Counter[str]:
    """Primaries by worker."""
    return Counter(shard.primary for shard in state.shards.values())


def check_plan(state: State, plan: Plan, settings: PlacementSettings) -> None:
    """Asserts what every plan must keep: one move per shard, targets that may receive, budgets, no copy lost."""
    shard_ids = [move.shard_id for move in plan.moves]
    assert len(shard_ids) == len(set(shard_ids)), "two moves for one shard"
    assert not set(shard_ids) & set(state.move_of_shard), "a shard that moves already is moved again"
    within = [move for move in plan.moves if move.within_budget]
    assert len(within) + len(state.moves) <= settings.moves_max
    copied = [move for move in within if move.kind not in (MoveKind.TRANSFER, MoveKind.SURPLUS)]
    assert max(Counter(move.target for move in copied).values(), default=0) <= settings.moves_in_max
    assert max(Counter(move.source for move in copied if move.source).values(), default=0) <= settings.moves_out_max
    for move in plan.moves:
        check_move(state, move)


def check_move(state: State, move: PlannedMove) -> None:
    """Asserts that the machine would accept the move, and that it leaves enough copies."""
    shard = state.shards[move.shard_id]
    assert move.reason
    assert move.expected_epoch == shard.epoch
    assert bool(move.source) == (move.kind is not MoveKind.REPAIR)
    assert bool(move.target) == (move.kind is not MoveKind.SURPLUS)
    if move.source:
        assert move.source in shard.in_sync
    if move.kind is MoveKind.SURPLUS:
        assert move.source != shard.primary
        assert len(shard.in_sync) - 1 >= state.settings.replicas
        return
    assert state.nodes[move.target].may_receive, f"{move.target} may not receive"
    if move.kind is MoveKind.TRANSFER:
        assert move.source == shard.primary
        assert move.target in shard.in_sync
    else:
        assert move.target not in shard.replicas


def settle(
    state: State, planner: Planner, settings: PlacementSettings, rounds_max: int = 400
) -> tuple[State, list[PlannedMove]]:
    """Carries out what the budgets let start, in rounds half a dwell time apart, until nothing is planned or waits."""
    now_ms = NOW_MS
    all_moves: list[PlannedMove] = []
    for _ in range(rounds_max):
        plan = planner.plan(state, now_ms)
        check_plan(state, plan, settings)
        if not plan.moves and plan.wake_ms is None:
            return state, all_moves
        if not plan.moves and plan.wake_ms is not None:
            assert plan.wake_ms > now_ms
            now_ms = plan.wake_ms
            continue
        started = plan.startable
        assert started, f"nothing of {len(plan.moves)} moves may start although nothing runs"
        for move in started:
            state = done(state, move, now_ms)
        all_moves += started
        now_ms = WallMs(now_ms + round(settings.dwell_s * 1_000) // 2)
    raise AssertionError(f"still {len(plan.moves)} moves after {rounds_max} rounds, the first is {plan.moves[0]}")
