"""The replicas controller: forms what is new, takes out what fails, never the last copy."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.config import MoveSettings
from coordinator.control.interface import Propose, ReplicasReported
from coordinator.control.replicas import FORM_PAUSE_S, GATHER_S, ReplicaControl
from coordinator.control.reports import LossWishes
from coordinator.model.errors import NoLeader
from tests.control_driver import ControlDriver, only, operations, report
from tests.machine_driver import MachineDriver

ACCEPTED = session_pb2.REPLICA_PROGRESS_ACCEPTED
LOST = session_pb2.REPLICA_PROGRESS_LOST


class Scene(ControlDriver):
    """Three workers; every shard is on all of them, w1 is primary."""

    def __init__(self, shards: int = 2, is_formed: bool = True) -> None:
        machine = MachineDriver()
        machine.bootstrap(shards=shards, replicas=3)
        for name in ("w1", "w2", "w3"):
            machine.add_worker(name)
        for shard_id in range(1, shards + 1):
            machine.assign(shard_id, "w1", "w2", "w3", is_formed=is_formed)
        super().__init__(machine)
        self.begin()

    def begin(self) -> None:
        """A new leader, whom nobody has told anything yet."""
        self.reports = type(self.reports)()
        self.replicas = ReplicaControl(self.machine.state, self.reports, self.tokens, self.now, 1 << 20)
        self.controller = self.replicas

    def all_say(self, name: str, progress: session_pb2.ReplicaProgress.ValueType = ACCEPTED) -> list[str]:
        """A worker's reports on all shards; what is committed."""
        said = tuple(
            session_pb2.ReplicaReport(shard_id=shard.id, epoch=shard.epoch, progress=progress)
            for shard in self.machine.state.shards.values()
        )
        return operations(self.settle(self.tell(ReplicasReported(1, name, said))))

    def says(self, name: str, progress: session_pb2.ReplicaProgress.ValueType, lagging: str = "") -> list[str]:
        """A worker's report on shard 1; what is committed."""
        said = report(1, name, 1, self.machine.shard(1).epoch, progress, lagging=lagging)
        return operations(self.settle(self.tell(said)))


def test_a_new_cluster_is_formed_by_one_command() -> None:
    """256 shards whose replicas all report are formed at once, and only when the last replica has."""
    scene = Scene(shards=256, is_formed=False)
    assert scene.all_say("w1") == scene.all_say("w2") == []
    assert scene.advance(1.0) == []
    assert scene.all_say("w3") == []
    assert operations(scene.settle(scene.advance(GATHER_S))) == ["form_shards"]
    assert all(shard.is_formed for shard in scene.machine.state.shards.values())
    assert scene.settle(scene.advance(1.0)) == []
    assert scene.next_wake is None


def test_stores_that_are_made_slowly_share_commands() -> None:
    """Reports that trickle in cost a command for each pause, not one for each shard."""
    scene = Scene(shards=60, is_formed=False)
    scene.all_say("w1")
    scene.all_say("w2")
    commands = []
    for shard_id in range(1, 61):
        said = scene.tell(report(1, "w3", shard_id, scene.machine.shard(shard_id).epoch, ACCEPTED))
        commands += operations(scene.settle([*said, *scene.advance(0.02)]))
    commands += operations(scene.settle(scene.advance(FORM_PAUSE_S)))
    assert all(shard.is_formed for shard in scene.machine.state.shards.values())
    assert len(commands) <= 60 * 0.02 / FORM_PAUSE_S + 2


def test_a_new_leader_forms_from_the_reports_that_come_again() -> None:
    """Nothing of it is in the predecessor's memory only."""
    scene = Scene(is_formed=False)
    scene.all_say("w1")
    scene.begin()
    for name in ("w1", "w2", "w3"):
        scene.all_say(name)
    assert operations(scene.settle(scene.advance(GATHER_S))) == ["form_shards"]


def test_who_says_that_its_copy_is_lost_does_not_form() -> None:
    """A first replica without a store holds the shard up, until it is taken out; then the others form it."""
    scene = Scene(shards=1, is_formed=False)
    scene.all_say("w1")
    scene.all_say("w2")
    assert scene.all_say("w3", LOST) == ["drop_replica"]
    scene.all_say("w1")
    scene.all_say("w2")
    assert operations(scene.settle(scene.advance(GATHER_S))) == ["form_shards"]


def test_the_parents_of_a_cut_are_forgotten_the_same_way() -> None:
    """Once each replica has said that the halves have stores of their own."""
    scene = Scene(shards=1)
    move_id = scene.machine.accept(split_shard=command_pb2.SplitShard(shard_id=1)).result.applied.move_id
    halves = scene.machine.reshape(move_id)
    scene.begin()
    for name in ("w1", "w2", "w3"):
        scene.all_say(name)
    assert operations(scene.settle(scene.advance(GATHER_S))) == ["form_shards"]
    assert [scene.machine.shard(shard_id).parents for shard_id in halves] == [(), ()]


def test_a_replica_that_lags_is_taken_out() -> None:
    """On the primary's word alone, of the present epoch, with the reason."""
    scene = Scene()
    assert scene.says("w2", ACCEPTED, lagging="w3") == []
    assert scene.tell(report(1, "w1", 1, scene.machine.shard(1).epoch - 1, ACCEPTED, lagging="w3")) == []
    assert scene.says("w1", ACCEPTED, lagging="w3") == ["drop_replica"]
    shard = scene.machine.shard(1)
    assert (shard.primary, shard.in_sync, shard.absent) == ("w1", ("w1", "w2"), ("w3",))


def test_a_primary_that_lost_its_data_hands_its_role_on() -> None:
    """To the replica whose log reaches furthest."""
    scene = Scene()
    epoch = scene.machine.shard(1).epoch
    scene.tell(report(1, "w2", 1, epoch, ACCEPTED, last_sequence=7))
    scene.tell(report(1, "w3", 1, epoch, ACCEPTED, last_sequence=9))
    assert scene.says("w1", LOST) == ["drop_replica"]
    assert scene.machine.shard(1).primary == "w3"


def test_the_last_copy_stays_and_is_shown() -> None:
    """A shard whose other replicas are gone waits for the one that says that it is lost."""
    scene = Scene()
    scene.says("w1", ACCEPTED, lagging="w2")
    scene.says("w1", ACCEPTED, lagging="w3")
    assert scene.says("w1", LOST) == []
    assert [(lost.shard_id, lost.node_id) for lost in scene.replicas.lost_copies()] == [(1, "w1")]
    scene.says("w1", ACCEPTED)
    assert scene.replicas.lost_copies() == ()


def test_a_drop_that_failed_is_proposed_again() -> None:
    """After a pause, and once at a time."""
    scene = Scene()
    first = scene.tell(report(1, "w1", 1, scene.machine.shard(1).epoch, ACCEPTED, lagging="w3"))
    assert operations(first) == ["drop_replica"]
    assert scene.advance(0.05) == []
    assert scene.fail(only(first, Propose)[0], NoLeader("nobody leads")) == []
    assert operations(scene.settle(scene.advance(0.2))) == ["drop_replica"]


def test_wishes_go_with_the_commands_that_take_a_worker_out() -> None:
    """Only where the furthest log is not the machine's own choice, and never more than the command may hold."""
    scene = Scene(shards=4)
    for shard_id, furthest in ((1, "w3"), (2, "w2"), (3, "w3"), (4, "w3")):
        epoch = scene.machine.shard(shard_id).epoch
        scene.tell(report(1, furthest, shard_id, epoch, ACCEPTED, last_sequence=9))
    command = command_pb2.Command(suspect_node=command_pb2.SuspectNode(node_id="w1", incarnation="1"))
    wishes = LossWishes(scene.reports, MoveSettings(), heirs_max=2)
    wishes.fill(command, scene.machine.state, (1, 2, 3, 4), "w1", is_fault=True)
    assert dict(command.suspect_node.loss.heirs) == {1: "w3", 3: "w3"}
    assert command.suspect_node.loss.quarantine_workers == 3
    clean = command_pb2.Command(expire_node=command_pb2.ExpireNode(node_id="w1", incarnation="1"))
    wishes.fill(clean, scene.machine.state, (), "w1", is_fault=False)
    assert clean.expire_node.loss.quarantine_workers == 0
