"""The joined controllers: order, routing, and what a leader does first."""

from __future__ import annotations

import random
from dataclasses import replace

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import ClusterConfig, CronSettings, DiscoverySettings, PlacementSettings
from coordinator.control.cron import REPORT_GATHER_S
from coordinator.control.interface import (
    Action,
    DiscoveryReported,
    HeartbeatReceived,
    LaunchReported,
    Propose,
    SendAssignment,
    SendLaunch,
    SendToNode,
    SessionClosed,
    SessionOpened,
    StopLaunch,
)
from coordinator.control.leader import PAUSE_S_MIN, LeaderControl
from coordinator.model import CronJobSpec, NodeState
from coordinator.model.errors import NoLeader
from tests.control_driver import ControlDriver, heartbeat, hello, only, operations, welcomes
from tests.machine_driver import MachineDriver

LOOP = CronJobSpec(id="loop", schedule="0 5 * * *", command=("true",), environment=(("Z", "1"), ("A", "2")))
CONFIG = ClusterConfig(placement=PlacementSettings(shards=4, tokens_per_weight=32), cron=CronSettings(jobs=(LOOP,)))


class Scene(ControlDriver):
    """A leader on a machine without a cluster."""

    def __init__(self, config: ClusterConfig = CONFIG) -> None:
        super().__init__(MachineDriver())
        self.begin(config)

    def begin(self, config: ClusterConfig) -> LeaderControl:
        """A new leader."""
        self.leader = LeaderControl(
            self.machine.state, config, self.tokens, self.now, self.wall, random.Random(1), leader_id="m1", term=2
        )
        self.controller = self.leader
        return self.leader

    def form_all(self) -> None:
        """Every first replica has made its store."""
        formed = [
            command_pb2.FormShards.Formed(shard_id=shard.id, epoch=shard.epoch)
            for shard in self.machine.state.shards.values()
        ]
        self.settle(self.run(form_shards=command_pb2.FormShards(shards=formed)))

    def join(self, session: int, name: str) -> None:
        """A worker's session, with its first heartbeat."""
        self.settle(self.tell(SessionOpened(session, hello(name))))
        self.settle(self.tell(heartbeat(session, name)))


def founded(*names: str) -> Scene:
    """A leader whose workers hold all shards."""
    scene = Scene()
    scene.settle(scene.advance())
    for session, name in enumerate(names, start=1):
        scene.join(session, name)
    for round_number in range(12):
        if round_number == 10:
            scene.form_all()
        scene.settle(scene.advance(0.5))
        for session, name in enumerate(names, start=1):
            scene.settle(scene.tell(heartbeat(session, name)))
    assert all(shard.epoch for shard in scene.machine.state.shards.values())
    return scene


def test_the_first_leader_founds_the_cluster() -> None:
    """Identity, shards and settings come from the configuration; then the jobs."""
    scene = Scene()
    first = scene.advance()
    assert operations(first) == ["bootstrap_cluster"]
    done = scene.settle(first)
    assert operations(done) == ["bootstrap_cluster", "apply_job"]
    state = scene.machine.state
    assert (len(state.cluster_id), len(state.shards), state.settings.replicas) == (32, 4, 2)
    assert state.jobs["loop"].source == "config"


def test_the_founding_is_tried_until_it_is_done() -> None:
    """A lost proposal is made again with the same identity."""
    scene = Scene()
    (first,) = scene.advance()
    assert scene.fail(first, NoLeader("nobody leads")) == []
    (second,) = scene.advance(0.2)
    assert isinstance(first, Propose)
    assert isinstance(second, Propose)
    assert first.command.bootstrap_cluster == second.command.bootstrap_cluster


def test_a_later_leader_finds_nothing_to_do() -> None:
    """The same configuration again changes nothing, whatever the order of its tables."""
    scene = Scene()
    scene.settle(scene.advance())
    scene.begin(CONFIG)
    assert operations(scene.advance()) == []


def test_jobs_of_the_configuration_follow_the_file_unless_the_api_changed_them() -> None:
    """Changed in the file: applied. Gone from the file: deleted. Changed through the API: left alone."""
    other, third = replace(LOOP, id="other"), replace(LOOP, id="third")
    scene = Scene(replace(CONFIG, cron=CronSettings(jobs=(LOOP, other, third))))
    scene.settle(scene.advance())
    by_api = types_pb2.CronJobSpec(id="third", schedule="1 1 * * *", command=["true"])
    scene.settle(scene.run(apply_job=command_pb2.ApplyJob(spec=by_api, source="api")))
    changed = replace(LOOP, schedule="0 6 * * *")
    scene.begin(replace(CONFIG, cron=CronSettings(jobs=(changed, third))))
    done = scene.settle(scene.advance())
    assert sorted(operations(done)) == ["apply_job", "delete_job"]
    jobs = scene.machine.state.jobs
    assert {job.id: (job.spec.schedule, job.source) for job in jobs.values()} == {
        "loop": ("0 6 * * *", "config"),
        "third": ("1 1 * * *", "api"),
    }


def test_a_job_that_the_machine_refuses_is_told_and_not_repeated() -> None:
    """A configuration that cannot be applied shows in the leader's problems."""
    scene = Scene(replace(CONFIG, cron=CronSettings(jobs=(replace(LOOP, id="bad name"),))))
    scene.settle(scene.advance())
    (problem,) = scene.leader.problems()
    assert "bad name" in problem
    assert operations(scene.advance(10.0)) == []


def test_the_assignment_follows_the_welcome() -> None:
    """Welcome first, then the assignment, in one step; nothing else before."""
    scene = Scene()
    scene.settle(scene.advance())
    done = scene.settle(scene.tell(SessionOpened(1, hello("w1"))))
    kinds = [type(action) for action in done if not isinstance(action, Propose)]
    assert kinds == [SendToNode, SendAssignment]
    assert welcomes(done) == [1]


def test_only_the_workers_concerned_hear_of_a_change() -> None:
    """A move of one shard is told to its three workers and to nobody else."""
    scene = founded("w1", "w2", "w3", "w4")
    shard = scene.machine.shard(1)
    (target, other) = sorted({"w1", "w2", "w3", "w4"} - set(shard.in_sync))
    command = command_pb2.StartMove(
        shard_id=1,
        source=shard.in_sync[1],
        target=target,
        kind=types_pb2.MOVE_KIND_BALANCE,
        expected_epoch=shard.epoch,
    )
    told = {action.node_id for action in only(scene.run(start_move=command), SendAssignment)}
    assert told == {*shard.in_sync, target}
    assert scene.leader.assignment(target).shards[0].shard.id
    assert other not in told


def test_changes_close_together_are_sent_as_one() -> None:
    """The first change is sent at once, those of the next milliseconds together after a pause."""
    scene = founded("w1", "w2")
    scene.advance(1.0)
    sends = []
    for shard_id in (1, 2, 3):
        shard = scene.machine.shard(shard_id)
        other = next(name for name in shard.in_sync if name != shard.primary)
        command = command_pb2.StartMove(
            shard_id=shard_id,
            source=shard.primary,
            target=other,
            kind=types_pb2.MOVE_KIND_TRANSFER,
            expected_epoch=shard.epoch,
        )
        sends.append(sorted(action.node_id for action in only(scene.run(start_move=command), SendAssignment)))
    assert sends == [["w1", "w2"], [], []]
    assert scene.next_wake is not None
    later = only(scene.advance(PAUSE_S_MIN), SendAssignment)
    assert sorted(action.node_id for action in later) == ["w1", "w2"]


def test_an_order_goes_only_to_a_worker_that_was_welcomed() -> None:
    """A launch on a worker without a session stays committed and is ordered after its Welcome."""
    scene = founded("w1", "w2")
    owner = scene.machine.state.jobs["loop"].owner
    session = 1 if owner == "w1" else 2
    scene.tell(SessionClosed(session, owner))
    launch = command_pb2.CommitLaunch(job_id="loop", worker=owner, trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    assert only(scene.run(commit_launch=launch), SendLaunch) == []
    back = scene.tell(SessionOpened(9, hello(owner)))
    kinds = [type(action) for action in back]
    assert kinds.index(SendToNode) < kinds.index(SendAssignment) < kinds.index(SendLaunch)


def test_a_replaced_session_does_not_speak_for_its_worker() -> None:
    """Reports of a session that a newer one has replaced are ignored by every controller."""
    scene = founded("w1", "w2")
    scene.settle(scene.tell(SessionOpened(9, hello("w1"))))
    report = session_pb2.LaunchReport(job_id="loop", scheduled_at_unix_ms=1, attempt=1)
    assert scene.tell(LaunchReported(1, "w1", report)) == []


def test_only_the_heartbeats_of_the_current_session_lose_runs() -> None:
    """A run that a heartbeat does not name is lost, and a stop goes to its worker; a replaced session says nothing."""
    scene = founded("w1", "w2")
    manual = command_pb2.CommitLaunch(job_id="loop", worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    scene.settle(scene.run(commit_launch=manual))
    [launch] = scene.machine.state.launches.values()
    token = session_pb2.LaunchToken(job_id="loop", scheduled_at_unix_ms=launch.scheduled_at_ms, attempt=1)
    report = session_pb2.LaunchReport(
        job_id="loop", scheduled_at_unix_ms=launch.scheduled_at_ms, attempt=1, state=types_pb2.LAUNCH_STATE_RUNNING
    )
    scene.settle(scene.tell(SessionOpened(9, hello("w1"))))
    scene.settle(scene.tell(LaunchReported(9, "w1", report)))
    scene.settle(scene.advance(REPORT_GATHER_S))

    def beat(session: int, *launches: session_pb2.LaunchToken) -> list[Action]:
        named = session_pb2.Heartbeat(sequence=5, launches=launches)
        return scene.tell(HeartbeatReceived(session, "w1", named))

    cancel = command_pb2.CancelLaunch(job_id="loop", scheduled_at_unix_ms=launch.scheduled_at_ms, reason="enough")
    [stop] = only(scene.run(cancel_launch=cancel), StopLaunch)
    assert (stop.node_id, stop.attempt, stop.reason) == ("w1", 1, "enough")
    assert operations(beat(1)) == operations(beat(9, token)) == []
    assert operations(beat(9)) == ["lose_launch"]


def test_with_consul_a_new_worker_waits_for_consul() -> None:
    """The configuration's backend decides whether discovery has a say."""
    scene = Scene(replace(CONFIG, discovery=DiscoverySettings(backend="consul")))
    scene.settle(scene.advance())
    scene.join(1, "w1")
    states = [scene.machine.state.nodes["w1"].state]
    scene.settle(scene.tell(DiscoveryReported(frozenset({"w1"}))))
    states.append(scene.machine.state.nodes["w1"].state)
    assert states == [NodeState.JOINING, NodeState.ACTIVE]


def test_what_the_api_asks() -> None:
    """Live figures, the latest plan and all sessions can be read at any time."""
    scene = founded("w1", "w2")
    live = scene.leader.live("w1")
    assert live is not None
    assert live.connected
    assert scene.leader.live("w9") is None
    assert sorted(scene.leader.sessions()) == ["w1", "w2"]
    assert scene.leader.metrics("w1") == session_pb2.NodeMetrics()
    assert scene.leader.plan() is not None
