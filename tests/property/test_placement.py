"""Properties of the ring and the planner over random clusters."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, floor

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import HASH_SPACE, MoveKind, Node, NodeState, WallMs
from coordinator.placement import PlannedMove, Planner, Ring, RingMember
from coordinator.placement.shares import band_around, fair_shares
from tests.placement_cluster import (
    NOW_MS,
    assigned,
    check_plan,
    cluster,
    done,
    loads,
    lose,
    named,
    settle,
    with_job_decisions,
    with_jobs,
    with_node,
    worker,
)

SETTINGS = PlacementSettings(tokens_per_weight=64)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

weights = st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 4.0])
zones = st.sampled_from(["", "a", "b", "c"])
states = st.sampled_from([NodeState.ACTIVE] * 6 + [NodeState.DRAINING, NodeState.DOWN, NodeState.JOINING])


@st.composite
def fleets(draw: st.DrawFn, size_min: int = 1, size_max: int = 9) -> list[Node]:
    """Workers with random weights, zones and states."""
    size = draw(st.integers(size_min, size_max))
    return [worker(f"w{number}", draw(zones), draw(weights)) for number in range(size)]


@given(fleets(), st.integers(0, HASH_SPACE - 1), st.integers(1, 5), st.randoms(use_true_random=False))
@MANY
def test_preference_is_a_function_of_the_membership(
    fleet: list[Node], position: int, count: int, random: object
) -> None:
    """The order of insertion changes nothing, nobody comes twice, and distinct zones come first."""
    members = [RingMember(node.id, node.zone, node.weight) for node in fleet]
    ring, turned = Ring(members, 32), Ring(reversed(members), 32)
    preferred = ring.preference(position, count)
    assert preferred == turned.preference(position, count)
    assert len(preferred) == len(set(preferred)) == min(count, len(fleet))
    domain_of = {member.id: member.domain for member in members}
    distinct = len({domain_of[name] for name in preferred})
    assert distinct == min(len(preferred), len(set(domain_of.values())))


@given(fleets(), st.integers(1, 200), st.integers(1, 4))
@MANY
def test_shares_add_up_and_their_bands_leave_room(fleet: list[Node], shards: int, replicas: int) -> None:
    """Fair shares add up to the copies, none is above the number of shards, and the bands contain a placement."""
    members = [RingMember(node.id, node.zone, node.weight) for node in fleet]
    shares = fair_shares(members, shards, replicas)
    copies = shards * min(replicas, len(members))
    assert abs(sum(shares.values()) - copies) < 1e-6
    assert max(shares.values()) <= shards + 1e-6
    bands = [band_around(share, 1.10) for share in shares.values()]
    assert sum(band.low for band in bands) <= copies <= sum(band.high for band in bands)
    for band in bands:
        assert (
            0
            <= band.low
            <= floor(band.fair)
            <= band.middle
            <= band.high
            <= max(ceil(band.fair), 1.10 * band.fair + 1e-6)
        )


def zone_faults(state: State) -> int:
    """Copies that share a zone with another copy of their shard."""
    faults = 0
    for shard in state.shards.values():
        used = [state.nodes[name].zone or name for name in shard.in_sync]
        faults += len(used) - len(set(used))
    return faults


def assert_within_bands(state: State) -> None:
    """Every worker that may receive is within its band."""
    members = [
        RingMember(n.id, n.zone, n.weight) for n in sorted(state.nodes.values(), key=lambda n: n.id) if n.may_receive
    ]
    shares = fair_shares(members, len(state.shards), state.settings.replicas)
    held = loads(state)
    for name, share in shares.items():
        band = band_around(share, SETTINGS.load_bound)
        assert band.low <= held[name] <= band.high, f"{name} holds {held[name]}, its band is {band}"


@given(fleets(), st.integers(1, 64), st.integers(1, 3))
@MANY
def test_a_new_cluster_is_whole_and_at_rest(fleet: list[Node], shards: int, replicas: int) -> None:
    """The first assignment gives every shard its copies, and the plan that follows ends."""
    planner = Planner(SETTINGS)
    state = assigned(cluster(fleet, shards, replicas), planner)
    for shard in state.shards.values():
        assert len(shard.in_sync) == min(replicas, len(fleet))
    settle(state, planner, SETTINGS)


@given(st.integers(2, 9), st.integers(1, 64), st.integers(1, 3))
@MANY
def test_equal_workers_without_zones_begin_in_their_bands(count: int, shards: int, replicas: int) -> None:
    """With equal workers the first assignment leaves nothing to do."""
    planner = Planner(SETTINGS)
    state = assigned(cluster(named(count), shards, replicas), planner)
    assert planner.plan(state, NOW_MS).moves == ()
    assert_within_bands(state)


@st.composite
def changes(draw: st.DrawFn) -> tuple[State, State]:
    """A settled cluster, and the same after random joins, drains, losses and weight changes."""
    planner = Planner(SETTINGS)
    state = assigned(cluster(draw(fleets(size_min=2)), draw(st.integers(4, 64)), draw(st.integers(1, 3))), planner)
    before = state
    for number in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(state.nodes)))
        node = state.nodes[name]
        match draw(st.sampled_from(["join", "drain", "down", "suspect", "weight"])):
            case "join":
                state = with_node(state, worker(f"new{number}", draw(zones), draw(weights)))
            case "drain":
                state = with_node(state, replace(node, state=NodeState.DRAINING, drain_requested=True))
            case "down":
                recently = WallMs(NOW_MS - draw(st.sampled_from([1_000, 86_400_000])))
                state = lose(state, name, replace(node, state=NodeState.DOWN, state_since_ms=recently))
            case "suspect":
                state = lose(state, name, replace(node, suspect_since_ms=WallMs(NOW_MS - 100)))
            case _:
                state = with_node(state, replace(node, weight=draw(weights)))
    return before, state


@given(changes())
@MANY
def test_plans_converge_and_keep_the_constraints(change: tuple[State, State]) -> None:
    """After any change, plans carried out within their budgets end; no step loses a copy, drained workers end empty."""
    _, state = change
    planner = Planner(SETTINGS)
    after, moves = settle(state, planner, SETTINGS)
    wanted = after.settings.replicas
    receiving = [node for node in after.nodes.values() if node.may_receive]
    for shard in after.shards.values():
        before = state.shards[shard.id]
        assert len(shard.in_sync) >= min(len(before.in_sync), wanted)
        if state.nodes[before.primary].is_serving:
            assert len(shard.in_sync) >= min(wanted, len(receiving))
    plan = planner.plan(after, WallMs(NOW_MS + 10**9))
    if not plan.refusals:
        assert_within_bands(after)
        for node in after.nodes.values():
            assert loads(after)[node.id] == 0 or node.may_receive
    balanced = [move for move in moves if move.kind is MoveKind.BALANCE]
    assert len(balanced) <= 2 * len(state.shards) * wanted


@given(changes())
@MANY
def test_zones_only_get_better(change: tuple[State, State]) -> None:
    """A balance move never puts two copies of a shard into one zone."""
    _, state = change
    planner = Planner(SETTINGS)
    for move in planner.plan(state, NOW_MS).moves:
        if move.kind in (MoveKind.BALANCE, MoveKind.ZONE):
            one = replace(state, shards=state.shards.update({}))
            assert zone_faults(done(one, move, NOW_MS)) <= zone_faults(one)


@given(changes())
@MANY
def test_the_same_state_gives_the_same_plan(change: tuple[State, State]) -> None:
    """Two planners, and two ways to build the maps, give one plan."""
    _, state = change
    turned = replace(
        state,
        nodes=type(state.nodes)(sorted(state.nodes.items(), reverse=True)),
        shards=type(state.shards)(sorted(state.shards.items(), reverse=True)),
    )
    assert Planner(SETTINGS).plan(state, NOW_MS) == Planner(SETTINGS).plan(turned, NOW_MS)


@given(changes())
@MANY
def test_no_move_is_undone_within_the_dwell_time(change: tuple[State, State]) -> None:
    """With the clock standing still, no shard is balanced or transferred twice, whatever was planned in between."""
    _, state = change
    planner = Planner(SETTINGS)
    moved: list[PlannedMove] = []
    for _ in range(200):
        plan = planner.plan(state, NOW_MS)
        check_plan(state, plan, SETTINGS)
        if not plan.startable:
            break
        for move in plan.startable:
            state = done(state, move, NOW_MS)
        moved += plan.startable
    again = [move.shard_id for move in moved if move.kind in (MoveKind.BALANCE, MoveKind.TRANSFER)]
    assert len(again) == len(set(again))
    assert not planner.plan(state, NOW_MS).startable


@given(st.integers(2, 20), st.sampled_from([0, 3]), st.integers(16, 40), st.data())
@MANY
def test_a_join_and_a_leave_move_little_more_than_they_must(
    count: int, zone_count: int, per_worker: int, data: st.DataObject
) -> None:
    """One equal worker more or less moves at most 1.15 times the ideal, and the balance holds before and after."""
    count = count * 3 if zone_count else count
    planner = Planner(SETTINGS)
    shards = count * per_worker
    state = assigned(cluster(named(count, zone_count), shards), planner)
    zone = f"z{data.draw(st.integers(0, 2))}" if zone_count else ""
    joined, moves = settle(with_node(state, worker("new", zone)), planner, SETTINGS)
    copies = sum(1 for move in moves if move.kind is not MoveKind.TRANSFER)
    assert copies <= 1.15 * 2 * shards / (count + 1)
    assert planner.plan(joined, NOW_MS).peak_to_average_after <= 1.15
    if count == 2:
        return
    gone = f"w{data.draw(st.integers(1, count))}"
    held = loads(state)[gone]
    drained, moves = settle(
        with_node(state, replace(state.nodes[gone], state=NodeState.DRAINING, drain_requested=True)), planner, SETTINGS
    )
    assert loads(drained)[gone] == 0
    copies = sum(1 for move in moves if move.kind is not MoveKind.TRANSFER)
    assert copies <= max(held + 1, 1.15 * held)


@given(fleets(size_max=7), st.integers(0, 30), st.data())
@MANY
def test_jobs_are_even_and_at_rest(fleet: list[Node], count: int, data: st.DataObject) -> None:
    """Jobs have distinct workers that may take them, within the bound; decided once, nothing more changes."""
    planner = Planner(SETTINGS)
    state = with_jobs(cluster(fleet), *(f"job_{number:02}" for number in range(count)))
    state = with_job_decisions(state, planner)
    assert planner.assign_jobs(state) == []
    name = data.draw(st.sampled_from(sorted(state.nodes)))
    state = with_node(state, replace(state.nodes[name], state=NodeState.DOWN))
    state = with_job_decisions(state, planner)
    state = with_job_decisions(state, planner)
    assert planner.assign_jobs(state) == []
    receiving = [node.id for node in state.nodes.values() if node.may_receive]
    for job in state.jobs.values():
        assert len({job.owner, *job.backups}) == 1 + len(job.backups)
        if receiving:
            assert job.owner in receiving
            assert len(job.backups) == min(SETTINGS.cron_backups, len(receiving) - 1)
