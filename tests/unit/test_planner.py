"""The planner, one rule at a time."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import MoveKind, Node, NodeState, WallMs
from coordinator.placement import Plan, Planner
from coordinator.placement.board import member_of
from coordinator.placement.ring import shard_position
from tests.placement_cluster import (
    NOW_MS,
    assigned,
    check_plan,
    cluster,
    loads,
    lose,
    named,
    primaries,
    running,
    settle,
    with_job_decisions,
    with_jobs,
    with_node,
    with_shard,
    worker,
)

SETTINGS = PlacementSettings()
PLANNER = Planner(SETTINGS)


def plan_of(state: State, now_ms: int = NOW_MS, planner: Planner = PLANNER) -> Plan:
    """The plan, after checking what every plan must keep."""
    plan = planner.plan(state, WallMs(now_ms))
    check_plan(state, plan, SETTINGS)
    return plan


def summary(plan: Plan) -> list[tuple[MoveKind, int, str, str]]:
    """Kind, shard, source and target of each move."""
    return [(move.kind, move.shard_id, move.source, move.target) for move in plan.moves]


def drained(node: Node) -> Node:
    """The worker once an operator asked for it to be emptied."""
    return replace(node, state=NodeState.DRAINING, drain_requested=True)


def one_shard(*in_sync: str, workers: list[Node], replicas: int = 2, absent: tuple[str, ...] = ()) -> State:
    """A cluster with a single shard."""
    return with_shard(cluster(workers, shards=1, replicas=replicas), 1, *in_sync, absent=absent)


# Repair


def test_the_last_copy_is_repaired_at_once() -> None:
    """With one copy left nobody waits for the lost worker."""
    state = one_shard("w1", workers=named(3), absent=("w2",))
    state = with_node(state, replace(state.nodes["w2"], suspect_since_ms=WallMs(NOW_MS - 100)))
    assert summary(plan_of(state)) == [(MoveKind.REPAIR, 1, "", "w3")]


def test_a_lost_worker_keeps_its_place_for_the_hold_time() -> None:
    """With two of three copies left the planner waits `hold_s`, says so and says until when, then copies elsewhere."""
    state = one_shard("w1", "w2", workers=named(4), replicas=3, absent=("w3",))
    gone = replace(state.nodes["w3"], state=NodeState.DOWN, state_since_ms=WallMs(NOW_MS - 1_000))
    plan = plan_of(with_node(state, gone))
    assert plan.moves == ()
    assert plan.refusals == ("shard 1 needs 1 more copy: waiting for w3 to come back, for at most 30 s",)
    assert plan.wake_ms == NOW_MS + 29_000
    assert summary(plan_of(with_node(state, gone), NOW_MS + 29_000)) == [(MoveKind.REPAIR, 1, "", "w4")]


def test_a_worker_that_is_back_gets_its_place_again() -> None:
    """The absent worker is the target as soon as it may receive, whatever the ring prefers."""
    for name in ("w2", "w3", "w4"):
        state = one_shard("w1", workers=named(4), absent=(name,))
        assert summary(plan_of(state)) == [(MoveKind.REPAIR, 1, "", name)]


def test_a_worker_that_drains_keeps_no_place() -> None:
    """An absent worker that an operator is emptying is not waited for."""
    state = one_shard("w1", "w2", workers=named(4), replicas=3, absent=("w3",))
    state = with_node(state, drained(state.nodes["w3"]))
    assert summary(plan_of(state)) == [(MoveKind.REPAIR, 1, "", "w4")]


def test_a_refused_repair_names_every_worker_and_its_state() -> None:
    """When nobody can receive, the sentence says why for each."""
    workers = [worker("w1"), worker("w2", state=NodeState.DRAINING), worker("w3", state=NodeState.DOWN)]
    assert plan_of(one_shard("w1", workers=workers)).refusals == (
        "shard 1 needs 1 more copy: no worker can receive it (w2 is draining, w3 is down)",
    )


def test_a_shard_whose_only_copy_is_away_waits() -> None:
    """A copy can only come from a primary that answers."""
    workers = [worker("w1", state=NodeState.DOWN), worker("w2"), worker("w3")]
    plan = plan_of(one_shard("w1", workers=workers))
    assert plan.moves == ()
    assert plan.refusals == ("shard 1 needs 1 more copy: the only copy to read from is on w1, which is down",)


def test_repairs_begin_with_the_fewest_copies() -> None:
    """A shard down to its last copy comes before one that has two of three."""
    state = cluster(named(4), shards=2, replicas=3)
    state = with_shard(with_shard(state, 1, "w1", "w2"), 2, "w3")
    assert [move.shard_id for move in plan_of(state).moves if move.kind is MoveKind.REPAIR] == [2, 1]


def test_a_short_absence_moves_nothing_else() -> None:
    """While a worker is suspect, those that took its primaries over are not balanced against each other."""
    state = assigned(cluster(named(4), 64, replicas=3), PLANNER)
    state = lose(state, "w2", replace(state.nodes["w2"], suspect_since_ms=WallMs(NOW_MS - 2_000)))
    assert {move.kind for move in plan_of(state).moves} <= {MoveKind.TRANSFER}


# Drain


def test_a_drained_worker_ends_empty() -> None:
    """All copies leave, primaries too, and no shard ever has fewer than two."""
    state = assigned(cluster(named(4), 64), PLANNER)
    held = loads(state)["w2"]
    state = with_node(state, drained(state.nodes["w2"]))
    assert Counter(move.kind for move in plan_of(state).moves)[MoveKind.DRAIN] == held
    after, _ = settle(state, PLANNER, SETTINGS)
    assert loads(after)["w2"] == 0
    assert all(len(shard.in_sync) == 2 for shard in after.shards.values())


def test_a_drain_without_a_target_is_refused() -> None:
    """Two copies on two workers: draining one would leave one copy, so nothing is planned and the check says why."""
    state = assigned(cluster(named(2), 4), PLANNER)
    safe, problems, moves = PLANNER.drain_check(state, "w2", NOW_MS)
    assert (safe, moves) == (False, ())
    assert len(problems) == 1
    assert problems[0].startswith("shards 1, 2, 3 and 4 cannot leave w2: no worker can receive it"), problems
    assert plan_of(with_node(state, drained(state.nodes["w2"]))).moves == ()


def test_the_drain_check_lists_the_moves_that_would_empty_the_worker() -> None:
    """A safe drain has no problems and as many moves as the worker has copies; the state is not touched."""
    state = assigned(cluster(named(4), 32), PLANNER)
    check = PLANNER.drain_check(state, "w1", NOW_MS)
    assert check.safe
    assert len(check.moves) == loads(state)["w1"]
    assert {move.source for move in check.moves} == {"w1"}
    assert PLANNER.drain_check(state, "w9", NOW_MS).problems == ("there is no worker w9",)


def test_the_drain_check_looks_at_jobs() -> None:
    """The last worker cannot go while it owns jobs."""
    state = with_job_decisions(with_jobs(assigned(cluster(named(1), 4, replicas=1), PLANNER), "job"), PLANNER)
    problems = PLANNER.drain_check(state, "w1", NOW_MS).problems
    assert any("cron jobs" in problem for problem in problems)


def test_the_pause_stops_what_nobody_asked_for() -> None:
    """While rebalancing is paused only repairs and drains are planned."""
    state = assigned(cluster(named(3), 32), PLANNER)
    state = with_node(state, worker("w4"))
    assert plan_of(state).moves
    paused = replace(state, settings=replace(state.settings, rebalance_paused=True))
    assert plan_of(paused).moves == ()
    paused = with_node(paused, drained(paused.nodes["w1"]))
    assert {move.kind for move in plan_of(paused).moves} == {MoveKind.DRAIN}
    lost = with_shard(paused, 1, "w2")
    assert {move.kind for move in plan_of(lost).moves} == {MoveKind.DRAIN, MoveKind.REPAIR}


# Zones


def test_copies_in_one_zone_are_spread() -> None:
    """The copy that is not primary moves to the zone that is free."""
    workers = [worker("w1", "a"), worker("w2", "a"), worker("w3", "b")]
    assert summary(plan_of(one_shard("w1", "w2", workers=workers))) == [(MoveKind.ZONE, 1, "w2", "w3")]


def test_first_copies_are_in_distinct_zones() -> None:
    """With three zones of equal size no shard has two copies in one."""
    state = assigned(cluster(named(9, zones=3), 128), PLANNER)
    for shard in state.shards.values():
        assert len({state.nodes[name].zone for name in shard.in_sync}) == 2
    assert plan_of(state).moves == ()


def test_a_small_zone_is_not_overrun() -> None:
    """One worker in its zone against nine takes twice its plain share, not everything; the rest is explained."""
    state = assigned(cluster([worker("w0", "a"), *(worker(f"w{n}", "b") for n in range(1, 10))], 90), PLANNER)
    assert loads(state)["w0"] <= 40
    plan = plan_of(state)
    assert not [
        move for move in plan.moves if move.kind is MoveKind.ZONE and move.target == "w0" and loads(state)["w0"] >= 40
    ]
    settled, _ = settle(state, PLANNER, SETTINGS)
    assert any("have two copies in zone b" in text for text in plan_of(settled).refusals)


# Balance


def test_a_newcomer_is_filled_up_to_its_share() -> None:
    """A fourth worker gets its quarter, by exactly that many moves, also over many rounds of the budgets."""
    state = assigned(cluster(named(3), 256), PLANNER)
    plan = plan_of(with_node(state, worker("w4")))
    assert Counter(move.kind for move in plan.moves)[MoveKind.BALANCE] == 128
    assert plan.key_share_moved == pytest.approx(0.5)
    assert plan.peak_to_average_before > 1.3 > 1.1 >= plan.peak_to_average_after
    after, moves = settle(with_node(state, worker("w4")), PLANNER, SETTINGS)
    assert loads(after)["w4"] == 128
    assert sum(move.kind is MoveKind.BALANCE for move in moves) == 128


def test_the_newcomer_gets_what_the_ring_prefers_for_it() -> None:
    """Most of a newcomer's shards are ones that the ring would have given to it among their first two."""
    state = with_node(assigned(cluster(named(3), 256), PLANNER), worker("w4"))
    ring = PLANNER.ring_of(tuple(sorted(map(member_of, state.nodes.values()))))
    moved = [state.shards[move.shard_id] for move in plan_of(state).moves if move.kind is MoveKind.BALANCE]
    hits = sum("w4" in ring.preference(shard_position(shard.lo), 2) for shard in moved)
    assert hits > 0.75 * len(moved)


def test_a_lighter_worker_is_relieved_down_to_its_bound() -> None:
    """A worker whose weight was cut gives up what is above its bound, and no more."""
    state = assigned(cluster(named(4), 128), PLANNER)
    state = with_node(state, replace(state.nodes["w1"], weight=0.5))
    after, _ = settle(state, PLANNER, SETTINGS)
    fair = 256 * 0.5 / 3.5
    assert 0.9 * fair <= loads(after)["w1"] <= 1.1 * fair


def test_small_differences_move_nothing() -> None:
    """Within the band around the fair share nothing moves; a step outside is mended up to the fair share."""
    state = cluster(named(2), shards=20, replicas=1)
    for shard_id in range(1, 21):
        state = with_shard(state, shard_id, "w1" if shard_id <= 11 else "w2")
    assert plan_of(state).moves == ()
    state = with_shard(state, 12, "w1")
    assert [(move.source, move.target) for move in plan_of(state).moves] == [("w1", "w2")] * 2


def test_a_shard_that_moved_lately_stays() -> None:
    """Balance and transfer leave a shard alone for the dwell time; repair and drain do not."""
    state = assigned(cluster(named(3), 8), PLANNER)
    for shard_id, shard in sorted(state.shards.items()):
        others = [name for name in shard.in_sync if name != shard.primary]
        state = with_shard(state, shard_id, shard.primary, *others, moved_ms=NOW_MS - 10_000)
    state = with_node(state, worker("w4"))
    plan = plan_of(state)
    assert plan.moves == ()
    assert plan.refusals[-1] == "w4 holds 0 copies, below its bound of 4: 8 shards moved less than 60 s ago"
    assert plan.wake_ms == NOW_MS + 50_000
    assert plan_of(state, NOW_MS + 50_000).moves
    assert plan_of(with_node(state, drained(state.nodes["w1"]))).moves


def test_running_moves_count() -> None:
    """While the plan's first moves run, the next plan adds only what is left, and leaves their shards alone."""
    state = with_node(assigned(cluster(named(3), 64), PLANNER), worker("w4"))
    plan = plan_of(state)
    for move in plan.startable:
        state = running(state, move)
    rest = plan_of(state)
    assert len(rest.moves) + len(state.moves) == len(plan.moves)
    assert not {move.shard_id for move in rest.moves} & set(state.move_of_shard)
    assert not rest.startable


# Transfer and surplus


def test_roles_are_evened_out_without_copying() -> None:
    """Four shards on the same two workers with one primary: two roles are handed over, nothing is copied."""
    state = cluster(named(2), shards=4)
    for shard_id in range(1, 5):
        state = with_shard(state, shard_id, "w1", "w2")
    plan = plan_of(state)
    assert [(move.kind, move.source, move.target) for move in plan.moves] == [(MoveKind.TRANSFER, "w1", "w2")] * 2
    assert plan.key_share_moved == 0
    after, _ = settle(state, PLANNER, SETTINGS)
    assert primaries(after) == {"w1": 2, "w2": 2}


def test_roles_are_passed_on_along_a_path() -> None:
    """w1 shares nothing with w3, but w2 does: it takes from w1 and gives to w3."""
    state = cluster(named(3), shards=3)
    state = with_shard(state, 1, "w1", "w2")
    state = with_shard(state, 2, "w1", "w2")
    state = with_shard(state, 3, "w2", "w3")
    found = [(move.source, move.target) for move in plan_of(state).moves if move.kind is MoveKind.TRANSFER]
    assert sorted(found) == [("w1", "w2"), ("w2", "w3")]


def test_surplus_copies_go_but_never_the_primary() -> None:
    """After the wanted number was lowered each shard drops one copy; primaries stay, two remain."""
    state = assigned(cluster(named(4), 32, replicas=3), PLANNER)
    state = replace(state, settings=replace(state.settings, replicas=2))
    plan = plan_of(state)
    assert Counter(move.kind for move in plan.moves)[MoveKind.SURPLUS] == 32
    after, _ = settle(state, PLANNER, SETTINGS)
    assert {len(shard.in_sync) for shard in after.shards.values()} == {2}


def test_a_surplus_copy_on_a_draining_worker_goes_first() -> None:
    """Three copies, two wanted, one on a worker that drains: that one is dropped, and nothing is copied."""
    workers = [worker("w1"), worker("w2"), worker("w3", state=NodeState.DRAINING), worker("w4")]
    assert summary(plan_of(one_shard("w1", "w2", "w3", workers=workers))) == [(MoveKind.SURPLUS, 1, "w3", "")]
    as_primary = one_shard("w3", "w1", "w2", workers=workers)
    assert [move.kind for move in plan_of(as_primary).moves] == [MoveKind.TRANSFER]
    after, _ = settle(as_primary, PLANNER, SETTINGS)
    assert after.shards[1].in_sync == ("w1", "w2")


# Budgets


def test_budgets_mark_what_may_start() -> None:
    """All moves are listed in the order in which they would start; the budgets of cluster and workers cut the rest."""
    state = with_node(assigned(cluster(named(8), 256), PLANNER), worker("w9"))
    plan = plan_of(state)
    assert len(plan.startable) == SETTINGS.moves_in_max < len(plan.moves)
    planner = Planner(replace(SETTINGS, moves_in_max=100, moves_out_max=100, moves_max=7))
    assert len(planner.plan(state, NOW_MS).startable) == 7


def test_the_key_share_of_a_round_is_bounded() -> None:
    """Balance may not have more than a quarter of the key space moving, but one move always may."""
    settings = replace(SETTINGS, moves_max=100, moves_in_max=100, moves_out_max=100)
    state = with_node(assigned(cluster(named(2), 16), PLANNER), worker("w3"))
    assert sum(move.key_share for move in Planner(settings).plan(state, NOW_MS).startable) == pytest.approx(0.25)
    state = with_node(assigned(cluster(named(2), 2, replicas=1), PLANNER), replace(worker("w3"), weight=4.0))
    tight = Planner(replace(settings, round_key_share_max=0.01))
    assert len(tight.plan(state, NOW_MS).startable) == 1


def test_urgent_moves_come_first() -> None:
    """The order of a plan is the order of urgency."""
    state = with_node(assigned(cluster(named(4), 64), PLANNER), worker("w5"))
    state = with_shard(with_node(state, drained(state.nodes["w1"])), 7, "w2")
    kinds = [move.kind.value for move in plan_of(state).moves]
    assert kinds == sorted(kinds)
    assert plan_of(state).moves[0].kind is MoveKind.REPAIR


# Speed


def test_a_plan_with_nothing_to_do_is_cheap() -> None:
    """The steady state of 256 shards costs about a millisecond; 20 are allowed for slow machines."""
    state = assigned(cluster(named(3), 256), PLANNER)
    PLANNER.plan(state, NOW_MS)
    times_s = []
    for _ in range(5):
        begun_s = time.perf_counter()
        PLANNER.plan(state, NOW_MS)
        times_s.append(time.perf_counter() - begun_s)
    assert min(times_s) < 0.020
