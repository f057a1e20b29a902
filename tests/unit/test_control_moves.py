"""The moves controller: each phase, its deadline, and a new leader in the middle."""

from __future__ import annotations

import pytest

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import MoveSettings
from coordinator.control.interface import ReplicasReported, SessionOpened
from coordinator.control.moves import MoveControl
from coordinator.control.reports import Reports
from coordinator.control.stalls import AVOID_S, Stalls
from coordinator.model import Monotonic, MovePhase
from coordinator.model.errors import NoLeader
from tests.control_driver import ControlDriver, hello, operations, report
from tests.machine_driver import MachineDriver

ACCEPTED = session_pb2.REPLICA_PROGRESS_ACCEPTED
CAUGHT_UP = session_pb2.REPLICA_PROGRESS_CAUGHT_UP
CEDED = session_pb2.REPLICA_PROGRESS_CEDED
SETTINGS = MoveSettings(copy_deadline_s=100.0, cede_deadline_s=5.0)


class Scene(ControlDriver):
    """Four workers; shard 1 is on w1 (primary) and w2."""

    def __init__(self) -> None:
        machine = MachineDriver()
        machine.bootstrap(shards=4)
        for name in ("w1", "w2", "w3", "w4"):
            machine.add_worker(name)
        machine.assign(1, "w1", "w2")
        machine.assign(2, "w2", "w3")
        super().__init__(machine)
        self.begin()

    def begin(self) -> None:
        """A new leader."""
        self.reports = Reports()
        self.stalls = Stalls()
        self.controller = MoveControl(self.machine.state, SETTINGS, self.reports, self.tokens, self.now, self.stalls)

    def start(self, kind: types_pb2.MoveKind.ValueType, source: str, target: str, shard_id: int = 1) -> int:
        """A move, started by an operator; its id."""
        command = command_pb2.StartMove(
            shard_id=shard_id,
            source=source,
            target=target,
            kind=kind,
            reason="test",
            expected_epoch=self.machine.shard(shard_id).epoch,
        )
        self.settle(self.run(start_move=command))
        return self.machine.state.next_move_id - 1

    def said(
        self, name: str, progress: session_pb2.ReplicaProgress.ValueType, shard_id: int = 1, caught_up: str = ""
    ) -> list[str]:
        """A report on the shard's present epoch; what is committed because of it."""
        epoch = self.machine.shard(shard_id).epoch
        said = report(1, name, shard_id, epoch, progress, caught_up=caught_up)
        return operations(self.settle(self.tell(said)))

    def caught_up(self, target: str, primary: str = "w1") -> list[str]:
        """The primary says that the target has everything."""
        return self.said(primary, ACCEPTED, caught_up=target)

    def ended(self, move_id: int) -> tuple[MovePhase, str]:
        """How the move ended."""
        move = self.machine.state.ended_moves[move_id]
        return move.phase, move.outcome


def test_a_primary_moves_through_all_phases() -> None:
    """Caught up by the primary's word -> promote; ceded -> cutover; noted by the new primary -> remove."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    assert scene.said("w3", CAUGHT_UP) == []
    assert scene.said("w1", ACCEPTED) == []
    assert scene.caught_up("w3") == ["promote_replica"]
    assert scene.said("w1", ACCEPTED) == []
    assert scene.said("w1", CEDED) == ["cut_over"]
    assert scene.said("w3", ACCEPTED) == ["remove_replica"]
    shard = scene.machine.shard(1)
    assert (shard.primary, shard.in_sync) == ("w3", ("w2", "w3"))
    assert scene.ended(move)[0] is MovePhase.DONE
    assert scene.next_wake is None


def test_a_secondary_moves_without_a_cutover() -> None:
    """When the source is not primary, the primary's note of the new set is all that the removal waits for."""
    scene = Scene()
    scene.start(types_pb2.MOVE_KIND_BALANCE, "w2", "w3")
    assert scene.caught_up("w3") == ["promote_replica"]
    assert scene.said("w3", ACCEPTED) == []
    assert scene.said("w1", ACCEPTED) == ["remove_replica"]


def test_a_repair_ends_with_the_promotion() -> None:
    """Nothing is taken away where a copy was only added."""
    scene = Scene()
    scene.settle(scene.run(change_settings=command_pb2.ChangeSettings(settings=types_pb2.Settings(replicas=3))))
    move = scene.start(types_pb2.MOVE_KIND_REPAIR, "", "w3")
    assert scene.caught_up("w3") == ["promote_replica"]
    assert scene.ended(move)[0] is MovePhase.DONE


def test_a_transfer_cuts_over_when_the_primary_has_ceded() -> None:
    """A move of the role alone has no other phase."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_TRANSFER, "w1", "w2")
    assert scene.said("w1", CEDED) == ["cut_over"]
    assert scene.machine.shard(1).primary == "w2"
    assert scene.ended(move)[0] is MovePhase.DONE


def test_a_surplus_copy_is_removed_at_once() -> None:
    """Nobody has to take note before a surplus copy goes."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_SURPLUS, "w2", "")
    assert scene.ended(move)[0] is MovePhase.DONE
    assert scene.machine.shard(1).in_sync == ("w1",)


def test_reports_of_other_epochs_are_ignored() -> None:
    """What a worker says of an older or a newer epoch pushes nothing on."""
    scene = Scene()
    scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    epoch = scene.machine.shard(1).epoch
    assert scene.tell(report(1, "w1", 1, epoch - 1, ACCEPTED, caught_up="w3")) == []
    assert scene.tell(report(1, "w1", 1, epoch + 1, ACCEPTED, caught_up="w3")) == []


def test_a_late_report_does_not_hide_a_newer_one() -> None:
    """The report of the highest epoch is the one that counts."""
    scene = Scene()
    scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    epoch = scene.machine.shard(1).epoch
    first = scene.tell(report(1, "w1", 1, epoch, ACCEPTED, caught_up="w3"))
    assert scene.tell(report(1, "w1", 1, epoch - 1, ACCEPTED)) == []
    assert operations(scene.settle(first)) == ["promote_replica"]


def test_a_new_session_voids_old_reports() -> None:
    """What a worker said on an earlier session is said again after the Welcome, or it is not true any more."""
    scene = Scene()
    epoch = scene.machine.shard(1).epoch + 1
    scene.tell(report(1, "w1", 1, epoch, ACCEPTED, caught_up="w3"))
    scene.tell(SessionOpened(2, hello("w1", "2")))
    scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    assert scene.machine.shard(1).epoch == epoch
    assert [move.phase for move in scene.machine.state.moves.values()] == [MovePhase.COPYING]


@pytest.mark.parametrize(
    ("kind", "target", "deadline_s", "why"),
    [
        (types_pb2.MOVE_KIND_BALANCE, "w3", 100.0, "copying took longer than 100 s"),
        (types_pb2.MOVE_KIND_TRANSFER, "w2", 5.0, "w1 did not cede within 5 s"),
    ],
)
def test_before_the_cutover_a_deadline_rolls_back(
    kind: types_pb2.MoveKind.ValueType, target: str, deadline_s: float, why: str
) -> None:
    """A copy or a primary that does not come to an end costs the move, and the shard is as before."""
    scene = Scene()
    move = scene.start(kind, "w1", target)
    epoch = scene.machine.shard(1).epoch
    assert scene.next_wake == scene.now + deadline_s
    assert scene.advance(deadline_s - 0.1) == []
    scene.settle(scene.advance(0.2))
    assert scene.ended(move) == (MovePhase.ABORTED, why)
    shard = scene.machine.shard(1)
    assert (shard.primary, shard.in_sync, shard.joining) == ("w1", ("w1", "w2"), ())
    assert shard.epoch == epoch + 1


def test_after_the_cutover_a_deadline_goes_forward() -> None:
    """A new primary that does not say that it has noted its role holds the removal up no longer than the deadline."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    scene.caught_up("w3")
    scene.said("w1", CEDED)
    assert scene.advance(4.9) == []
    scene.settle(scene.advance(0.2))
    assert scene.ended(move)[0] is MovePhase.DONE


def test_a_source_that_is_not_heard_has_not_ceded() -> None:
    """The suspicion gives the role away by the rules for failures, and ends the move; no cutover is made for it."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    scene.caught_up("w3")
    suspect = command_pb2.SuspectNode(node_id="w1", incarnation="1", reason="silent")
    assert operations(scene.settle(scene.run(suspect_node=suspect))) == []
    assert scene.ended(move)[0] is MovePhase.DONE
    assert scene.machine.shard(1).primary == "w3"


def test_a_drain_that_is_taken_back_rolls_its_copies_back() -> None:
    """A copy whose reason has gone is not finished."""
    scene = Scene()
    scene.settle(scene.run(drain_node=command_pb2.DrainNode(node_id="w2")))
    move = scene.start(types_pb2.MOVE_KIND_DRAIN, "w2", "w4")
    scene.settle(scene.run(undrain_node=command_pb2.UndrainNode(node_id="w2")))
    assert scene.ended(move) == (MovePhase.ABORTED, "the drain of w2 was taken back")


def test_a_copy_to_a_worker_that_is_to_be_drained_is_rolled_back() -> None:
    """What would have to move on at once is not copied there."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_BALANCE, "w2", "w4")
    scene.settle(scene.run(drain_node=command_pb2.DrainNode(node_id="w4")))
    assert scene.ended(move) == (MovePhase.ABORTED, "its target w4 is to be drained")


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_new_leader_resumes_from_the_state(steps: int) -> None:
    """Cut at every phase: the new leader hears all reports again and finishes the move."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    script = [("w1", ACCEPTED, "w3"), ("w1", CEDED, ""), ("w3", ACCEPTED, "")]
    for name, progress, caught_up in script[:steps]:
        scene.said(name, progress, caught_up=caught_up)
    scene.begin()
    assert scene.advance() == []
    for name, progress, caught_up in script[steps:]:
        assert len(scene.said(name, progress, caught_up=caught_up)) == 1
    assert scene.ended(move)[0] is MovePhase.DONE


def test_a_new_leader_counts_deadlines_anew() -> None:
    """Deadlines run on the leader's own monotonic clock, from when it first saw the phase."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_TRANSFER, "w1", "w2")
    scene.advance(4.0)
    scene.begin()
    scene.advance()
    assert scene.advance(4.9) == []
    scene.settle(scene.advance(0.2))
    assert scene.ended(move)[0] is MovePhase.ABORTED


def test_a_command_that_failed_is_proposed_again() -> None:
    """After a pause, and never twice at a time."""
    scene = Scene()
    scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    epoch = scene.machine.shard(1).epoch
    first = scene.tell(report(1, "w1", 1, epoch, ACCEPTED, caught_up="w3"))
    assert operations(first) == ["promote_replica"]
    assert scene.tell(report(1, "w1", 1, epoch, ACCEPTED, caught_up="w3")) == []
    assert scene.fail(first[0], NoLeader("nobody leads")) == []
    assert operations(scene.settle(scene.advance(0.11))) == ["promote_replica"]


def test_reports_on_shards_that_do_not_move_cost_nothing() -> None:
    """A worker that says everything after its Welcome wakes no one."""
    scene = Scene()
    reports = tuple(session_pb2.ReplicaReport(shard_id=shard, epoch=1, progress=ACCEPTED) for shard in (1, 2))
    assert scene.tell(ReplicasReported(1, "w1", reports)) == []
    assert scene.next_wake is None


@pytest.mark.parametrize("kind", ["split", "merge"])
def test_a_reshape_waits_for_every_seal(kind: str) -> None:
    """A cut follows its primary's report, a join both; reports of another epoch seal nothing."""
    scene = Scene()
    scene.machine.assign(3, "w1", "w2")
    if kind == "split":
        scene.settle(scene.run(split_shard=command_pb2.SplitShard(shard_id=3)))
    else:
        scene.machine.assign(4, "w1", "w2")
        scene.settle(scene.run(merge_shards=command_pb2.MergeShards(lower_shard_id=3, upper_shard_id=4)))
        assert scene.said("w1", CEDED, shard_id=4) == []
    (move_id,) = scene.machine.state.moves
    assert scene.tell(report(1, "w1", 3, scene.machine.shard(3).epoch - 1, CEDED)) == []
    assert scene.said("w2", CEDED, shard_id=3) == []
    assert scene.said("w1", CEDED, shard_id=3) == ["reshape"]
    assert scene.ended(move_id)[0] is MovePhase.DONE
    assert scene.next_wake is None


def test_a_primary_that_does_not_seal_serves_again() -> None:
    """The deadline rolls a cut back, at a new epoch."""
    scene = Scene()
    scene.settle(scene.run(split_shard=command_pb2.SplitShard(shard_id=1)))
    (move_id,) = scene.machine.state.moves
    epoch = scene.machine.shard(1).epoch
    scene.settle(scene.advance(5.1))
    assert scene.ended(move_id) == (MovePhase.ABORTED, "w1 did not seal within 5 s")
    assert scene.machine.shard(1).epoch == epoch + 1


def test_a_new_leader_finishes_a_join() -> None:
    """From the state and the reports that come again."""
    scene = Scene()
    scene.machine.assign(3, "w1", "w2")
    scene.machine.assign(4, "w1", "w2")
    scene.settle(scene.run(merge_shards=command_pb2.MergeShards(lower_shard_id=3, upper_shard_id=4)))
    scene.said("w1", CEDED, shard_id=3)
    scene.begin()
    assert scene.advance() == []
    assert scene.said("w1", CEDED, shard_id=4) == []
    assert scene.said("w1", CEDED, shard_id=3) == ["reshape"]


def test_a_copy_that_gets_no_further_is_given_up() -> None:
    """The primary names the target: the move is rolled back with its words, and the target is avoided for a while."""
    scene = Scene()
    move = scene.start(types_pb2.MOVE_KIND_BALANCE, "w1", "w3")
    epoch = scene.machine.shard(1).epoch
    said = report(1, "w1", 1, epoch, ACCEPTED, lagging="w2")
    assert scene.settle(scene.tell(said)) == [], "another one's fault"
    said = report(1, "w1", 1, epoch, ACCEPTED, lagging="w3", reason="w3 got no further for 20 s")
    assert operations(scene.settle(scene.tell(said))) == ["abort_move"]
    phase, outcome = scene.ended(move)
    assert phase is MovePhase.ABORTED
    assert outcome == "the copy was given up: w3 got no further for 20 s"
    assert scene.stalls.avoided(scene.now) == {"w3"}
    assert scene.stalls.avoided(Monotonic(scene.now + AVOID_S)) == frozenset()
    scene.stalls.note(scene.now, "w3")
    node = types_pb2.Node(id="w3", incarnation="2", weight=1.0, grpc_address="w3:1")
    scene.run(register_node=command_pb2.RegisterNode(node=node))
    assert scene.stalls.avoided(scene.now) == frozenset(), "another process may do better"
