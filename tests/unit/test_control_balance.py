"""The balance controller: when it assigns, plans and starts moves."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.config import PlacementSettings
from coordinator.control.balance import SETTLE_QUIET_S, SETTLE_S_MAX, BalanceControl
from coordinator.control.interface import Action, Applied, Propose
from coordinator.control.stalls import AVOID_S, Stalls
from coordinator.machine.state import State
from coordinator.model import WallMs
from coordinator.model.errors import NoLeader
from coordinator.placement.plan import Plan
from coordinator.placement.planner import Planner
from tests.control_driver import ControlDriver, heartbeat, only, operations
from tests.machine_driver import MachineDriver

SETTINGS = PlacementSettings(shards=8, tokens_per_weight=32, hold_s=30.0, dwell_s=60.0, moves_max=2)


class CountingPlanner(Planner):
    """The planner, counting how often it is asked."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.plans = 0

    def plan(
        self,
        state: State,
        now_ms: WallMs,
        crowded: frozenset[str] = frozenset(),
        avoided: frozenset[str] = frozenset(),
    ) -> Plan:
        self.plans += 1
        return super().plan(state, now_ms, crowded, avoided)


class Scene(ControlDriver):
    """A cluster of eight shards that nobody holds yet."""

    def __init__(self, shards: int = 8) -> None:
        machine = MachineDriver()
        machine.bootstrap(shards=shards)
        super().__init__(machine)
        self.begin()

    def begin(self) -> None:
        """A new leader."""
        self.planner = CountingPlanner()
        self.stalls = Stalls()
        self.balance = BalanceControl(
            self.machine.state, SETTINGS, self.tokens, self.now, self.planner, stalls=self.stalls
        )
        self.controller = self.balance

    def come(self, name: str) -> list[Action]:
        """A worker is admitted; what the controller wants then."""
        node = types_pb2.Node(id=name, incarnation="1", weight=1.0, grpc_address=f"{name}:1")
        actions = self.run(register_node=command_pb2.RegisterNode(node=node))
        return actions + self.run(activate_node=command_pb2.ActivateNode(node_id=name, incarnation="1"))

    def add_job(self, name: str) -> list[Action]:
        """A cron job; what the controller wants then."""
        spec = types_pb2.CronJobSpec(id=name, schedule="* * * * *", command=["true"])
        return self.run(apply_job=command_pb2.ApplyJob(spec=spec, source="api"))

    def form_all(self) -> None:
        """Every first replica has made its store."""
        formed = [
            command_pb2.FormShards.Formed(shard_id=shard.id, epoch=shard.epoch)
            for shard in self.machine.state.shards.values()
        ]
        self.settle(self.run(form_shards=command_pb2.FormShards(shards=formed)))

    def assign_all(self, *names: str) -> None:
        """Workers that hold every shard, and a controller that is done."""
        for name in names:
            self.come(name)
        self.settle(self.advance(SETTLE_S_MAX))
        self.form_all()
        self.settle(self.advance(0.2))


def test_first_replicas_wait_until_no_more_workers_come() -> None:
    """Three workers within a second share from the start, in one command."""
    scene = Scene()
    for name in ("w1", "w2", "w3"):
        assert scene.come(name) == []
        scene.advance(0.3)
    assert scene.advance(SETTLE_QUIET_S - 0.4) == []
    actions = scene.advance(0.2)
    assert operations(actions) == ["assign_shards"]
    scene.settle(actions)
    assert {shard.epoch for shard in scene.machine.state.shards.values()} == {1}
    assert {name for shard in scene.machine.state.shards.values() for name in shard.in_sync} == {"w1", "w2", "w3"}


def test_a_single_worker_waits_longest_and_then_holds_everything() -> None:
    """Fewer workers than copies: after five seconds what is possible is done."""
    scene = Scene()
    scene.come("w1")
    assert scene.advance(SETTLE_S_MAX - 0.1) == []
    scene.settle(scene.advance(0.1))
    assert {shard.in_sync for shard in scene.machine.state.shards.values()} == {("w1",)}


def test_without_workers_nothing_is_assigned() -> None:
    """No worker, no timer."""
    scene = Scene()
    assert scene.advance(60.0) == []
    assert scene.next_wake is None


def test_a_large_map_is_assigned_in_parts() -> None:
    """Every command stays far below its limit, and no shard is decided twice."""
    scene = Scene(shards=4_100)
    scene.come("w1")
    scene.come("w2")
    actions = scene.advance(SETTLE_QUIET_S)
    assert operations(actions) == ["assign_shards"] * 3
    assert all(len(action.command.SerializeToString()) < 1 << 19 for action in only(actions, Propose))
    assert scene.advance(1.0) == []
    scene.settle(actions)
    assert all(shard.epoch == 1 for shard in scene.machine.state.shards.values())


def test_an_assignment_that_failed_is_decided_again() -> None:
    """After a second, on the state as it is then."""
    scene = Scene()
    scene.come("w1")
    (first,) = scene.advance(SETTLE_S_MAX)
    assert scene.fail(first, NoLeader("nobody leads")) == []
    assert operations(scene.settle(scene.advance(1.0))) == ["assign_shards"]


def test_a_new_worker_gets_its_share_by_moves_within_the_budget() -> None:
    """A join makes a plan at once; as many moves start as the budget admits, and the next when one has ended."""
    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.settle(scene.come("w3"))
    actions = scene.settle(scene.advance(0.1))
    assert operations(actions) == ["start_move", "start_move"]
    plan = scene.balance.plan()
    assert plan is not None
    assert len(plan.moves) > 2
    assert operations(scene.settle(scene.advance(0.5))) == []
    abort = command_pb2.AbortMove(move_id=min(scene.machine.state.moves), reason="test")
    scene.settle(scene.run(abort_move=abort))
    assert operations(scene.settle(scene.advance(0.2))) == ["start_move"]


def test_no_plan_is_made_while_proposals_are_on_their_way() -> None:
    """The state does not show them yet, so the budgets would be spent twice."""
    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.settle(scene.come("w3"))
    starting = scene.advance(0.1)
    assert operations(starting) == ["start_move", "start_move"]
    plans = scene.planner.plans
    scene.run(set_node_weight=command_pb2.SetNodeWeight(node_id="w3", weight=1.5))
    assert scene.advance(5.0) == []
    assert scene.planner.plans == plans
    scene.settle(starting)
    scene.advance(0.2)
    assert scene.planner.plans > plans


def test_a_steady_cluster_is_not_planned() -> None:
    """No change, no plan; heartbeats and launches are no change."""
    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.add_job("j")
    scene.settle(scene.advance(0.1))
    scene.advance(0.1)
    plans = scene.planner.plans
    assert scene.next_wake is None
    launch = command_pb2.CommitLaunch(job_id="j", worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    for second in range(100):
        scene.tell(heartbeat(1, "w1", second))
        scene.run(commit_launch=launch)
        assert scene.advance(1.0) == []
    assert scene.planner.plans == plans


def test_a_lost_workers_place_is_looked_at_when_the_hold_ends() -> None:
    """With a copy to spare nothing is copied before hold_s, and the controller wakes for it."""
    scene = Scene()
    settings = types_pb2.Settings(replicas=3)
    scene.run(change_settings=command_pb2.ChangeSettings(settings=settings))
    scene.assign_all("w1", "w2", "w3", "w4")
    before = scene.machine.state
    suspect = command_pb2.SuspectNode(node_id="w1", incarnation="1")
    scene.settle(scene.run(suspect_node=suspect))
    assert scene.settle(scene.advance(0.1)) == []
    wake = scene.next_wake
    assert wake is not None
    assert 20.0 < wake - scene.now < SETTINGS.hold_s + 0.1
    assert before.moves == scene.machine.state.moves
    scene.machine.time_ms = WallMs(scene.machine.time_ms + 31_000)
    assert set(operations(scene.settle(scene.advance(31.0)))) == {"start_move"}


def test_a_replica_that_was_taken_out_is_brought_back() -> None:
    """A primary that goes on without a replica that lagged asks for a plan: nothing else would."""
    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.settle(scene.advance(0.1))
    scene.advance(0.1)
    assert scene.next_wake is None
    shard = scene.machine.state.shards[1]
    other = next(name for name in shard.in_sync if name != shard.primary)
    drop = command_pb2.DropReplica(shard_id=shard.id, node_id=other, expected_epoch=shard.epoch, reason="it lags")
    scene.run(drop_replica=drop)
    assert operations(scene.advance(0.2)) == ["start_move"]


def test_who_took_nothing_of_a_copy_is_passed_over() -> None:
    """A worker with a stalled copy gets none for a while, although its place is kept: another one does, or none."""
    scene = Scene()
    scene.assign_all("w1", "w2", "w3")
    scene.settle(scene.advance(0.1))
    shard = scene.machine.state.shards[1]
    [lost, spare] = [name for name in ("w1", "w2", "w3") if name != shard.primary]
    lost, spare = (lost, spare) if lost in shard.in_sync else (spare, lost)
    drop = command_pb2.DropReplica(shard_id=shard.id, node_id=lost, expected_epoch=shard.epoch, reason="it lags")
    scene.run(drop_replica=drop)
    scene.stalls.note(scene.now, lost)
    [start] = [one.command.start_move for one in only(scene.advance(0.2), Propose)]
    assert (start.shard_id, start.target) == (shard.id, spare)

    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.settle(scene.advance(0.1))
    shard = scene.machine.state.shards[1]
    [lost] = set(shard.in_sync) - {shard.primary}
    drop = command_pb2.DropReplica(shard_id=shard.id, node_id=lost, expected_epoch=shard.epoch, reason="it lags")
    scene.run(drop_replica=drop)
    scene.stalls.note(scene.now, lost)
    assert scene.advance(0.2) == []
    plan = scene.balance.plan()
    assert plan is not None
    assert any(f"{lost} took nothing of its last copy" in refusal for refusal in plan.refusals), plan.refusals
    assert scene.next_wake is not None
    scene.advance(AVOID_S)
    [start] = [one.command.start_move for one in only(scene.advance(0.2), Propose)]
    assert start.target == lost


def test_a_refused_move_does_not_make_a_storm() -> None:
    """A move that cannot start is looked at again after a second, not at once."""
    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.settle(scene.come("w3"))
    starting = scene.advance(0.1)
    for proposal in starting:
        assert scene.fail(proposal, NoLeader("nobody leads")) == []
    assert scene.advance(0.5) == []
    assert operations(scene.advance(0.6)) == ["start_move", "start_move"]


def test_jobs_get_owners_and_follow_a_lost_worker() -> None:
    """A new job is given an owner at once, and another one when its owner is not heard."""
    scene = Scene()
    scene.assign_all("w1", "w2", "w3")
    scene.add_job("j")
    assert operations(scene.settle(scene.advance(0.05))) == ["assign_jobs"]
    job = scene.machine.state.jobs["j"]
    assert job.owner
    assert len(job.backups) == 2
    scene.run(suspect_node=command_pb2.SuspectNode(node_id=job.owner, incarnation="1"))
    actions = scene.settle(scene.advance(0.05))
    assert "assign_jobs" in operations(actions)
    assert scene.machine.state.jobs["j"].owner == job.backups[0]


def test_a_batch_of_jobs_is_proposed_once() -> None:
    """While the owners of one batch are on their way no other batch is proposed."""
    scene = Scene()
    scene.assign_all("w1", "w2")
    scene.add_job("j")
    first = scene.advance(0.05)
    assert operations(first) == ["assign_jobs"]
    assert operations(scene.add_job("k") + scene.advance(1.0)) == []
    assert operations(scene.settle(first)) == ["assign_jobs", "assign_jobs"]
    assert all(job.owner for job in scene.machine.state.jobs.values())


def test_a_new_leader_knows_what_is_unassigned() -> None:
    """A leader that begins with workers and unassigned shards settles and assigns."""
    scene = Scene()
    scene.come("w1")
    scene.come("w2")
    scene.begin()
    scene.tell(Applied(scene.machine.state, ()))
    assert operations(scene.settle(scene.advance(SETTLE_QUIET_S))) == ["assign_shards"]
