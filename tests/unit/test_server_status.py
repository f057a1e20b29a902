"""What is wrong with a cluster is said in sentences, one for each thing, and nothing is said when all is well."""

from __future__ import annotations

from dataclasses import replace

from immutables import Map

from coordinator.api.v1 import cluster_pb2
from coordinator.control.figures import DamagedCopy
from coordinator.control.replicas import LostCopy
from coordinator.machine.state import State
from coordinator.model import ClusterSettings, CronJob, CronJobSpec, Node, NodeState, Shard, WallMs
from coordinator.server.status import Surroundings, fill_status, problems

NOW = WallMs(1_700_000_060_000)
BEFORE = WallMs(1_700_000_000_000)
HALF = 1 << 63


def node(node_id: str, state: NodeState = NodeState.ACTIVE, **fields: object) -> Node:
    """A worker that has been in its state for a minute."""
    made = Node(id=node_id, state=state, state_since_ms=BEFORE, http_address=f"{node_id}.example:7401")
    return replace(made, **fields)  # type: ignore[arg-type]


def whole_cluster() -> State:
    """Two workers that hold two shards and own a job."""
    shards = (
        Shard(id=1, lo=0, hi=HALF, epoch=1, primary="w1", in_sync=("w1", "w2"), is_formed=True),
        Shard(id=2, lo=HALF, hi=2 * HALF, epoch=1, primary="w2", in_sync=("w1", "w2"), is_formed=True),
    )
    return State(
        cluster_id="c",
        settings=ClusterSettings(replicas=2),
        nodes=Map({"w1": node("w1"), "w2": node("w2")}),
        shards=Map({shard.id: shard for shard in shards}),
        jobs=Map({"loop_01": CronJob(CronJobSpec("loop_01", "* * * * *"), owner="w1")}),
    )


def master(master_id: str, problem: str = "") -> cluster_pb2.Master:
    """A master that answers, or does not for a reason."""
    role = "unreachable" if problem else "follower"
    return cluster_pb2.Master(id=master_id, grpc_address=f"{master_id}.example:7101", role=role, problem=problem)


ALL_WELL = Surroundings(masters=[master("m1"), master("m2"), master("m3")], now_ms=NOW)


def with_node(state: State, changed: Node) -> State:
    """The state with one worker replaced."""
    return replace(state, nodes=state.nodes.set(changed.id, changed))


def test_nothing_is_said_when_all_is_well() -> None:
    """A whole cluster has no problems and honest counts."""
    response = cluster_pb2.GetStatusResponse()
    fill_status(response, whole_cluster(), ALL_WELL)
    assert list(response.problems) == []
    assert dict(response.nodes_by_state) == {"active": 2}
    assert (response.shards, response.shards_short_of_replicas, response.shards_unavailable) == (2, 0, 0)


def test_an_unreachable_master_and_how_many_may_still_be_lost() -> None:
    """One of three away: no further one may go; two away: nothing can be changed."""
    one = replace(ALL_WELL, masters=[master("m1"), master("m2"), master("m3", "accepts no connection")])
    assert problems(whole_cluster(), one) == [
        "master m3 at m3.example:7101 is unreachable: accepts no connection",
        "no further master may be lost; start the missing ones again",
    ]
    two = replace(ALL_WELL, masters=[master("m1"), master("m2", "x"), master("m3", "x")])
    assert problems(whole_cluster(), two)[-1] == ("only 1 of 3 masters answer; nothing can be changed before 2 do")


def test_masters_whose_clocks_are_off() -> None:
    """A master whose clock differs is named with what follows from it, and with what to look at."""
    masters = [master(id) for id in ("m1", "m2", "m3", "m4")]
    for one, offset_ms, role in ((masters[0], 700, "leader"), (masters[1], -830, "follower")):
        one.clock_offset_ms, one.clock_is_off, one.role = offset_ms, True, role
    for one, offset_ms, role in ((masters[2], 12_345, "leader"), (masters[3], -3_600_000, "follower")):
        one.clock_offset_ms, one.refuses_to_lead, one.role = offset_ms, True, role
    check = "check the time synchronization of its machine (chronyc tracking, timedatectl)"
    of_master = "the wall clock of master"
    assert problems(whole_cluster(), replace(ALL_WELL, masters=masters)) == [
        f"{of_master} m1 is 0.7 s ahead of the other masters', and schedules go by it: {check}",
        f"{of_master} m2 is 0.83 s behind the other masters', and schedules would go by it if it led: {check}",
        f"{of_master} m3 is 12.3 s ahead of the other masters', so it hands the leadership on: {check}",
        f"{of_master} m4 is 3600 s behind the other masters', so it refuses to lead: {check}",
    ]


def test_a_suspect_worker_whose_shards_nobody_else_holds() -> None:
    """The shards that cannot answer are named with the worker that has them, and how long it has been silent."""
    state = with_node(whole_cluster(), node("w1", suspect_since_ms=WallMs(NOW - 3_000)))
    assert problems(state, ALL_WELL) == [
        "1 shard cannot answer: 1; no other worker has a whole copy, so start w1 again",
        "worker w1 is suspect: it has not been heard for 3.0 s",
    ]


def test_a_worker_that_cannot_write() -> None:
    """It is named with how much of it is concerned, and what goes on; one that is silent is said to be that."""
    full = replace(ALL_WELL, unwritable={"w1": 4, "w2": 0})
    assert problems(whole_cluster(), full) == [
        "worker w1 takes no writes for 4 shards: look whether its disk is full; its reads go on, and workers that can "
        "write take over from it"
    ]
    state = with_node(whole_cluster(), node("w1", suspect_since_ms=WallMs(NOW - 3_000)))
    assert "worker w1 is suspect: it has not been heard for 3.0 s" in problems(state, full)


def test_too_few_replicas_and_why() -> None:
    """Shards below their count are counted, and when there are too few workers that is said."""
    state = whole_cluster()
    alone = replace(state.shards[1], primary="w2", in_sync=("w2",))
    state = replace(with_node(state, node("w1", NodeState.DOWN)), shards=state.shards.set(1, alone))
    assert problems(state, ALL_WELL) == [
        "1 shard has fewer than 2 in-sync replicas: 1; that takes 2 workers, and only 1 can receive",
        "worker w1 is down since 60 s; start it again, or forget it with `clusterctl nodes remove w1`",
    ]


def test_a_worker_that_consul_does_not_report() -> None:
    """A worker that is never admitted because of Consul says so, and whether Consul could be asked at all."""
    state = with_node(whole_cluster(), node("w3", NodeState.JOINING))
    asked = replace(ALL_WELL, uses_discovery=True, healthy=frozenset({"w1", "w2"}))
    assert problems(state, asked) == [
        "worker w3 waits to be admitted: Consul has not reported it healthy; "
        "check that Consul reaches http://w3.example:7401/health"
    ]
    away = replace(ALL_WELL, uses_discovery=True, healthy=None)
    assert problems(state, away) == [
        "worker w3 waits to be admitted: Consul cannot be asked whether it is healthy",
        "Consul does not answer, or has only just come back: nothing moves for that, but no worker is admitted",
    ]


def test_jobs_without_owner_refusals_and_pauses() -> None:
    """Orphaned jobs are named, the planner's refusals are passed on, and what is paused is remembered."""
    state = whole_cluster()
    orphan = replace(state.jobs["loop_01"], owner="")
    state = replace(
        state,
        jobs=state.jobs.set("loop_01", orphan),
        settings=ClusterSettings(replicas=2, rebalance_paused=True, cron_paused=True),
    )
    found = problems(state, replace(ALL_WELL, refusals=("shard 1 stays: no zone is free",)))
    assert found[:2] == ["1 cron job has no owner: loop_01", "shard 1 stays: no zone is free"]
    assert [sentence.split(" ")[0] for sentence in found[2:]] == ["rebalancing", "all"]


def test_before_the_bootstrap() -> None:
    """An empty state is a cluster that is still to be made, and nothing else is complained about."""
    assert problems(State(), ALL_WELL) == ["the cluster has not been made yet; its first leader will do that"]


def test_a_new_cluster_without_workers() -> None:
    """Shards that nobody holds yet are one sentence, shortened, and the missing workers another."""
    shards = {number: Shard(id=number, lo=number, hi=number + 1) for number in range(1, 9)}
    state = State(cluster_id="c", settings=ClusterSettings(replicas=2), shards=Map(shards))
    first, second = problems(state, ALL_WELL)
    assert first.startswith("no worker holds 8 shards yet: 1, 2, 3, 4, 5 and 3 more;")
    assert second.startswith("no worker is admitted;")


def test_quarantine_lost_copies_and_unformed_shards_are_said() -> None:
    """Each with what it means and what ends it; the worst first."""
    state = whole_cluster()
    first = replace(state.shards[1], quarantine="3 workers were lost within 600 s while they were its primary: a, b, c")
    second = replace(state.shards[2], is_formed=False)
    state = replace(state, shards=Map({1: first, 2: second}))
    lost = replace(ALL_WELL, lost_copies=[LostCopy(2, "w2", "its checksum is wrong")])
    damaged = replace(ALL_WELL, damaged_copies=[DamagedCopy(1, "w1", "key 'a' does not match its checksum")])
    assert problems(state, damaged)[0] == (
        "the last copy of shard 1, on w1, is damaged (key 'a' does not match its checksum); all but that is served: "
        "start a worker that held the shard before, or write the key again or delete it"
    )
    assert problems(state, lost) == [
        "the last copy of shard 2, on w2, is damaged or gone (its checksum is wrong); nothing is done about it: "
        "bring its files back, or a worker that held the shard before",
        "1 shard cannot answer yet: 2; w1, w2 are making the first stores",
        "shard 1 is in quarantine: 3 workers were lost within 600 s while they were its primary: a, b, c; when the "
        "reason is found, `clusterctl shards release 1` ends that",
    ]
