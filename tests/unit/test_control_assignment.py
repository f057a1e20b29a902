"""Assignments: what each worker is told of its shards and jobs."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.control.assignment import AssignmentIndex, build_assignment
from tests.machine_driver import MachineDriver


def make_machine() -> MachineDriver:
    """Three workers; shard 1 on w1 and w2, shard 2 on w2 and w3, one job."""
    machine = MachineDriver()
    machine.bootstrap(shards=2)
    for name in ("w1", "w2", "w3"):
        machine.add_worker(name)
    machine.assign(1, "w1", "w2")
    machine.assign(2, "w2", "w3")
    spec = types_pb2.CronJobSpec(id="j", schedule="* * * * *", command=["true"])
    machine.accept(apply_job=command_pb2.ApplyJob(spec=spec, source="api"))
    owners = command_pb2.AssignJobs.Assignment(job_id="j", owner="w1", backups=["w3", "w2"])
    machine.accept(assign_jobs=command_pb2.AssignJobs(assignments=[owners]))
    return machine


def roles(assignment: session_pb2.Assignment) -> dict[int, tuple[int, str, int]]:
    """Role, whom to cede to, and move, by shard."""
    return {entry.shard.id: (entry.role, entry.cede_to, entry.move_id) for entry in assignment.shards}


def test_roles_epochs_and_jobs_by_rank() -> None:
    """A worker learns its role in each of its shards, and its rank for each of its jobs."""
    machine = make_machine()
    assignment = build_assignment(machine.state, "w2")
    assert assignment.generation == machine.state.index
    assert roles(assignment) == {
        1: (session_pb2.REPLICA_ROLE_IN_SYNC, "", 0),
        2: (session_pb2.REPLICA_ROLE_PRIMARY, "", 0),
    }
    assert [entry.shard.epoch for entry in assignment.shards] == [1, 1]
    assert assignment.shards[1].shard.hi == 0
    assert [(job.job_id, job.rank) for job in assignment.jobs] == [("j", 2)]
    assert [job.rank for job in build_assignment(machine.state, "w1").jobs] == [0]


def test_an_unknown_worker_holds_nothing() -> None:
    """A worker that is new is told so, with a generation."""
    machine = make_machine()
    assignment = build_assignment(machine.state, "w9")
    assert (list(assignment.shards), list(assignment.jobs)) == ([], [])
    assert assignment.generation == machine.state.index


def test_a_move_shows_as_joining_then_as_cede() -> None:
    """The target learns that it joins, the primary to whom it shall cede, each with the move."""
    machine = make_machine()
    move = machine.start_move(1, "w1", "w3", types_pb2.MOVE_KIND_BALANCE)
    assert roles(build_assignment(machine.state, "w3"))[1] == (session_pb2.REPLICA_ROLE_JOINING, "", move)
    assert roles(build_assignment(machine.state, "w1"))[1] == (session_pb2.REPLICA_ROLE_PRIMARY, "", move)
    promote = command_pb2.PromoteReplica(move_id=move, expected_epoch=machine.shard(1).epoch)
    machine.accept(promote_replica=promote)
    assert roles(build_assignment(machine.state, "w1"))[1] == (session_pb2.REPLICA_ROLE_PRIMARY, "w3", move)
    assert roles(build_assignment(machine.state, "w3"))[1] == (session_pb2.REPLICA_ROLE_IN_SYNC, "", move)


def test_a_transfer_concerns_its_workers_although_no_shard_changes() -> None:
    """Starting a transfer changes only a move; the primary must hear of it all the same."""
    machine = make_machine()
    index = AssignmentIndex(machine.state)
    command = command_pb2.StartMove(
        shard_id=1, source="w1", target="w2", kind=types_pb2.MOVE_KIND_TRANSFER, expected_epoch=1
    )
    transition = machine.accept(start_move=command)
    assert index.take(transition.state, transition.changes) == {"w1", "w2"}
    assert roles(build_assignment(machine.state, "w1", index))[1][1] == "w2"


def test_launches_concern_no_assignment() -> None:
    """A job's watermark moves with every launch; nobody is told."""
    machine = make_machine()
    index = AssignmentIndex(machine.state)
    launch = command_pb2.CommitLaunch(job_id="j", worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    transition = machine.accept(commit_launch=launch)
    assert index.take(transition.state, transition.changes) == set()


def test_what_is_lost_raises_the_generation_too() -> None:
    """A worker that no longer holds a shard is told so under a higher generation."""
    machine = make_machine()
    index = AssignmentIndex(machine.state)
    before = build_assignment(machine.state, "w2", index)
    transition = machine.accept(suspect_node=command_pb2.SuspectNode(node_id="w2", incarnation="1"))
    assert "w2" in index.take(transition.state, transition.changes)
    after = build_assignment(machine.state, "w2", index)
    assert after.generation > before.generation
    assert list(after.shards) == []
    assert index.holds_nothing("w2")
