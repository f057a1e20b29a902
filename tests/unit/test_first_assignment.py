"""The first workers of new shards."""

from __future__ import annotations

from dataclasses import replace

from coordinator.config import PlacementSettings
from coordinator.model import MoveKind, NodeState
from coordinator.placement import Planner
from tests.placement_cluster import NOW_MS, assigned, cluster, loads, named, primaries, with_node, with_shard, worker

PLANNER = Planner(PlacementSettings())


def test_the_first_assignment_is_even() -> None:
    """Copies and primaries are within their bands from the start, and the plan that follows is empty."""
    state = assigned(cluster(named(5), 256), PLANNER)
    assert all(92 <= count <= 112 for count in loads(state).values())
    assert all(46 <= count <= 56 for count in primaries(state).values())
    assert PLANNER.plan(state, NOW_MS).moves == ()


def test_nothing_is_assigned_while_nobody_may_receive() -> None:
    """Workers that join, drain or are suspect get nothing; the plan says why nothing happens."""
    workers = [worker("w1", state=NodeState.JOINING), worker("w2", state=NodeState.DRAINING)]
    state = cluster([*workers, replace(worker("w3"), suspect_since_ms=NOW_MS)])
    assert PLANNER.assign_initial(state) == []
    assert PLANNER.plan(state, NOW_MS).refusals == (
        "16 shards (1, 2, 3, 4, 5, ...) have no worker yet: no worker can receive shards",
    )


def test_one_worker_gets_everything_and_a_second_repairs() -> None:
    """Fewer workers than wanted copies: what is possible is assigned, the rest follows when a worker comes."""
    state = assigned(cluster(named(1)), PLANNER)
    assert {shard.in_sync for shard in state.shards.values()} == {("w1",)}
    assert PLANNER.plan(state, NOW_MS).refusals == (
        "16 shards (1, 2, 3, 4, 5, ...) need 1 more copy: no worker can receive it, because there is no other worker",
    )
    state = with_node(state, worker("w2"))
    assert {(move.kind, move.target) for move in PLANNER.plan(state, NOW_MS).moves} == {(MoveKind.REPAIR, "w2")}


def test_assigned_shards_are_not_assigned_again() -> None:
    """Only shards without an epoch are first assignments; the others keep what they have and count as load."""
    state = with_shard(cluster(named(3), shards=3), 2, "w1", "w2")
    assert [shard_id for shard_id, _ in PLANNER.assign_initial(state)] == [1, 3]
