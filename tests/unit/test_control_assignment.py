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


def test_a_cut_seals_its_primary_and_names_the_parents() -> None:
    """The primary alone is told to seal; the halves say whom they come from, to every replica."""
    machine = make_machine()
    index = AssignmentIndex(machine.state)
    transition = machine.accept(split_shard=command_pb2.SplitShard(shard_id=1))
    assert index.take(transition.state, transition.changes) == {"w1", "w2"}
    seals = {name: build_assignment(machine.state, name, index).shards[0].seal for name in ("w1", "w2")}
    assert seals == {"w1": True, "w2": False}
    epochs = [machine.shard(1).epoch]
    move_id = transition.result.applied.move_id
    transition = machine.accept(reshape=command_pb2.Reshape(move_id=move_id, expected_epochs=epochs))
    assert index.take(transition.state, transition.changes) == {"w1", "w2"}
    halves = [entry for entry in build_assignment(machine.state, "w2", index).shards if entry.shard.id > 2]
    assert [(list(entry.parents), entry.formed, entry.seal) for entry in halves] == [([1], True, False)] * 2


def test_the_forming_of_a_shard_is_told() -> None:
    """Its replicas hear that they may serve, without a new epoch."""
    machine = MachineDriver()
    machine.bootstrap()
    machine.add_worker("w1")
    machine.assign(3, "w1", is_formed=False)
    index = AssignmentIndex(machine.state)
    assert not build_assignment(machine.state, "w1", index).shards[0].formed
    formed = command_pb2.FormShards(shards=[command_pb2.FormShards.Formed(shard_id=3, epoch=1)])
    transition = machine.accept(form_shards=formed)
    assert index.take(transition.state, transition.changes) == {"w1"}
    assert build_assignment(machine.state, "w1", index).shards[0].formed


def test_peers_are_told_with_their_addresses() -> None:
    """Every other worker of a shard, joining ones too; and again when one has another address."""
    machine = make_machine()
    index = AssignmentIndex(machine.state)

    def peers(name: str) -> list[tuple[str, str]]:
        return [(peer.node_id, peer.grpc_address) for peer in build_assignment(machine.state, name, index).peers]

    assert peers("w1") == [("w2", "w2:1")]
    assert peers("w2") == [("w1", "w1:1"), ("w3", "w3:1")]
    moved = types_pb2.Node(id="w3", incarnation="1", weight=1.0, grpc_address="w3:9")
    transition = machine.accept(register_node=command_pb2.RegisterNode(node=moved))
    assert index.take(transition.state, transition.changes) == {"w2", "w3"}
    assert peers("w2") == [("w1", "w1:1"), ("w3", "w3:9")]


def test_the_copy_rate_is_told_to_everybody() -> None:
    """A change at run time reaches every worker."""
    machine = make_machine()
    index = AssignmentIndex(machine.state)
    settings = types_pb2.Settings(replicas=2, copy_bytes_per_s=1_000_000)
    transition = machine.accept(change_settings=command_pb2.ChangeSettings(settings=settings))
    assert index.take(transition.state, transition.changes) == {"w1", "w2", "w3"}
    assert build_assignment(machine.state, "w1", index).copy_bytes_per_s == 1_000_000
