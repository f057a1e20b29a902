"""What holds for the leader's controllers whatever happens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.control.assignment import AssignmentIndex, build_assignment
from coordinator.control.timers import Timers
from coordinator.model import Monotonic
from tests.machine_driver import MachineDriver

WORKERS = ("w1", "w2", "w3", "w4")
names = st.sampled_from(WORKERS)
shard_ids = st.integers(1, 5)


def start_move(shard_id: int, source: str, target: str, kind: int) -> command_pb2.StartMove:
    """A move that may or may not fit the shard; the epoch is filled in when it is applied."""
    return command_pb2.StartMove(
        shard_id=shard_id,
        source="" if kind == types_pb2.MOVE_KIND_REPAIR else source,
        target="" if kind == types_pb2.MOVE_KIND_SURPLUS else target,
        kind=types_pb2.MoveKind.ValueType(kind),
    )


commands = st.one_of(
    st.builds(lambda *args: ("start_move", start_move(*args)), shard_ids, names, names, st.integers(1, 6)),
    st.builds(lambda shard: ("promote_replica", shard), shard_ids),
    st.builds(lambda shard: ("cut_over", shard), shard_ids),
    st.builds(lambda shard: ("remove_replica", shard), shard_ids),
    st.builds(lambda shard: ("abort_move", shard), shard_ids),
    st.builds(lambda shard: ("split_shard", command_pb2.SplitShard(shard_id=shard)), shard_ids),
    st.builds(
        lambda lower, upper: ("merge_shards", command_pb2.MergeShards(lower_shard_id=lower, upper_shard_id=upper)),
        shard_ids,
        shard_ids,
    ),
    st.builds(lambda shard: ("reshape", shard), shard_ids),
    st.builds(lambda shard, name: ("drop_replica", (shard, name)), shard_ids, names),
    st.builds(lambda shard: ("form_shards", shard), st.integers(1, 8)),
    st.builds(
        lambda rate: (
            "change_settings",
            command_pb2.ChangeSettings(settings=types_pb2.Settings(replicas=2, copy_bytes_per_s=rate)),
        ),
        st.integers(0, 2),
    ),
    st.builds(
        lambda name, address: (
            "register_node",
            command_pb2.RegisterNode(
                node=types_pb2.Node(id=name, incarnation="1", weight=1.0, grpc_address=address)
            ),
        ),
        names,
        st.sampled_from(["x:1", "y:1"]),
    ),
    st.builds(lambda name: ("suspect_node", command_pb2.SuspectNode(node_id=name)), names),
    st.builds(lambda name: ("expire_node", command_pb2.ExpireNode(node_id=name)), names),
    st.builds(lambda name: ("activate_node", command_pb2.ActivateNode(node_id=name)), names),
    st.builds(lambda name: ("drain_node", command_pb2.DrainNode(node_id=name)), names),
    st.builds(
        lambda owner, backups: (
            "assign_jobs",
            command_pb2.AssignJobs(
                assignments=[command_pb2.AssignJobs.Assignment(job_id="j", owner=owner, backups=backups)]
            ),
        ),
        names,
        st.lists(names, unique=True, max_size=2),
    ),
)


def prepare(machine: MachineDriver, operation: str, argument: object) -> dict[str, object]:
    """The command's fields, decided on the machine's present state."""
    state = machine.state
    if isinstance(argument, command_pb2.StartMove | command_pb2.SplitShard):
        shard = state.shards.get(argument.shard_id)
        argument.expected_epoch = shard.epoch if shard is not None else 0
        return {operation: argument}
    if operation == "drop_replica" and isinstance(argument, tuple):
        shard_id, name = argument
        shard = state.shards.get(shard_id)
        epoch = shard.epoch if shard is not None else 0
        return {operation: command_pb2.DropReplica(shard_id=shard_id, expected_epoch=epoch, node_id=name)}
    if operation == "form_shards" and isinstance(argument, int):
        shard = state.shards.get(argument)
        formed = command_pb2.FormShards.Formed(shard_id=argument, epoch=shard.epoch if shard is not None else 0)
        return {operation: command_pb2.FormShards(shards=[formed])}
    if operation == "reshape" and isinstance(argument, int):
        move = state.moves.get(state.move_of_shard.get(argument, 0))
        epochs = [state.shards[shard_id].epoch for shard_id in move.shard_ids] if move is not None else []
        return {operation: command_pb2.Reshape(move_id=move.id if move is not None else 0, expected_epochs=epochs)}
    if isinstance(argument, int):
        move_id = state.move_of_shard.get(argument, 0)
        if operation == "abort_move":
            return {operation: command_pb2.AbortMove(move_id=move_id)}
        kinds = {
            "promote_replica": command_pb2.PromoteReplica,
            "cut_over": command_pb2.CutOver,
            "remove_replica": command_pb2.RemoveReplica,
        }
        shard = state.shards.get(argument)
        return {operation: kinds[operation](move_id=move_id, expected_epoch=shard.epoch if shard is not None else 0)}
    return {operation: argument}


def content(assignment: session_pb2.Assignment) -> bytes:
    """What a worker can tell apart, without the generation and the masters' own notes."""
    copy = session_pb2.Assignment()
    copy.CopyFrom(assignment)
    copy.generation = 0
    for entry in copy.shards:
        entry.shard.generation = entry.shard.moved_unix_ms = 0
        entry.shard.quarantine = ""
        del entry.shard.absent[:], entry.shard.lost_primaries[:]
    return copy.SerializeToString(deterministic=True)


@settings(deadline=None, max_examples=150)
@given(st.lists(commands, max_size=40))
def test_the_index_equals_a_full_scan_and_nobody_is_left_untold(steps: list[tuple[str, object]]) -> None:
    """After every command the kept index gives what a scan gives, and names every worker whose assignment changed."""
    machine = MachineDriver()
    machine.bootstrap(shards=3)
    for name in WORKERS:
        machine.add_worker(name)
    spec = types_pb2.CronJobSpec(id="j", schedule="* * * * *", command=["true"])
    machine.accept(apply_job=command_pb2.ApplyJob(spec=spec, source="api"))
    machine.assign(1, "w1", "w2")
    machine.assign(2, "w2", "w3")
    index = AssignmentIndex(machine.state)
    before = {name: content(build_assignment(machine.state, name, index)) for name in WORKERS}
    for operation, argument in steps:
        transition = machine.run(**prepare(machine, operation, argument))  # type: ignore[arg-type]
        told = index.take(transition.state, transition.changes)
        after = {}
        for name in WORKERS:
            assignment = build_assignment(machine.state, name, index)
            assert assignment == build_assignment(machine.state, name)
            after[name] = content(assignment)
            assert after[name] == before[name] or name in told, (name, operation)
        before = after


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 20), st.integers(0, 3))))
def test_timers_ring_like_a_plain_table(steps: list[tuple[str, int | None, int]]) -> None:
    """Set, replace, clear and ring: the heap behaves as a dictionary that is scanned."""
    timers = Timers[str]()
    table: dict[str, float] = {}
    now = 0.0
    for subject, due, elapsed in steps:
        timers.set(subject, None if due is None else Monotonic(due))
        table.pop(subject, None)
        if due is not None:
            table[subject] = due
        now += elapsed
        ringing = {name for name, time in table.items() if time <= now}
        assert set(timers.take_due(Monotonic(now))) == ringing
        for name in ringing:
            del table[name]
        assert timers.next_wake() == min(table.values(), default=None)
