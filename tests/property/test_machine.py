"""The replicated state machine under random commands: invariants, determinism, snapshots."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.machine import apply
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import LaunchChanged, State
from coordinator.machine.validate import validate, validate_step
from coordinator.model import LaunchState, WallMs
from tests.machine_driver import START_MS

NAMES = ["a", "b", "c", "d"]
names = st.sampled_from(NAMES)
incarnations = st.sampled_from(["1", "2"])
shard_ids = st.integers(1, 12)
move_ids = st.integers(1, 12)
jobs = st.sampled_from(["j", "k"])
OPEN, PRESENT = -1, 99
"""As scheduled time: that of a launch of the job that has not ended; as attempt: the launch's present one."""
times = st.integers(0, 12).map(lambda number: START_MS + number * 5_000)
open_times = st.one_of(st.just(OPEN), times)
attempts = st.sampled_from([PRESENT, PRESENT, 0, 1, 2])
later = st.sampled_from([0, START_MS + 90_000])
maybe_names = st.sampled_from(["", *NAMES])
rules = st.builds(
    lambda heirs, workers: command_pb2.LossRules(heirs=heirs, quarantine_workers=workers, quarantine_window_ms=20_000),
    st.dictionaries(shard_ids, names, max_size=2),
    st.sampled_from([0, 2]),
)


def commands() -> st.SearchStrategy[command_pb2.Command]:
    """Commands that mean something now and then: few names, so that they meet."""
    return st.one_of(
        st.builds(lambda n, i, z, w: command_pb2.Command(register_node=command_pb2.RegisterNode(node=types_pb2.Node(
            id=n, incarnation=i, zone=z, weight=w))), names, incarnations, st.sampled_from(["", "z"]),
            st.sampled_from([1.0, 2.0])),
        st.builds(lambda n, i: command_pb2.Command(activate_node=command_pb2.ActivateNode(
            node_id=n, incarnation=i)), names, incarnations),
        st.builds(lambda n, i, r: command_pb2.Command(suspect_node=command_pb2.SuspectNode(
            node_id=n, incarnation=i, loss=r)), names, incarnations, rules),
        st.builds(lambda n, i, r: command_pb2.Command(expire_node=command_pb2.ExpireNode(
            node_id=n, incarnation=i, loss=r)), names, incarnations, rules),
        st.builds(lambda n: command_pb2.Command(drain_node=command_pb2.DrainNode(node_id=n)), names),
        st.builds(lambda n: command_pb2.Command(undrain_node=command_pb2.UndrainNode(node_id=n)), names),
        st.builds(lambda n: command_pb2.Command(leave_node=command_pb2.LeaveNode(node_id=n)), names),
        st.builds(lambda n: command_pb2.Command(remove_node=command_pb2.RemoveNode(node_id=n)), names),
        st.builds(lambda s, r: command_pb2.Command(assign_shards=command_pb2.AssignShards(assignments=[
            command_pb2.AssignShards.Assignment(shard_id=s, replicas=r)])), shard_ids,
            st.lists(names, min_size=1, max_size=3, unique=True)),
        st.builds(lambda s, a, b, k: command_pb2.Command(start_move=command_pb2.StartMove(
            shard_id=s, source=a, target=b, kind=k)), shard_ids, st.sampled_from(["", *NAMES]),
            st.sampled_from(["", *NAMES]), st.integers(1, 6)),
        st.builds(lambda m: command_pb2.Command(promote_replica=command_pb2.PromoteReplica(move_id=m)), move_ids),
        st.builds(lambda m: command_pb2.Command(cut_over=command_pb2.CutOver(move_id=m)), move_ids),
        st.builds(lambda m: command_pb2.Command(remove_replica=command_pb2.RemoveReplica(move_id=m)), move_ids),
        st.builds(lambda m: command_pb2.Command(abort_move=command_pb2.AbortMove(move_id=m)), move_ids),
        st.builds(lambda m: command_pb2.Command(reshape=command_pb2.Reshape(move_id=m)), move_ids),
        st.builds(lambda s: command_pb2.Command(form_shards=command_pb2.FormShards(shards=[
            command_pb2.FormShards.Formed(shard_id=s)])), shard_ids),
        st.builds(lambda s, n: command_pb2.Command(drop_replica=command_pb2.DropReplica(
            shard_id=s, node_id=n)), shard_ids, names),
        st.builds(lambda s: command_pb2.Command(release_shard=command_pb2.ReleaseShard(shard_id=s)), shard_ids),
        st.builds(lambda s: command_pb2.Command(split_shard=command_pb2.SplitShard(shard_id=s)), shard_ids),
        st.builds(lambda s, t: command_pb2.Command(merge_shards=command_pb2.MergeShards(
            lower_shard_id=s, upper_shard_id=t)), shard_ids, shard_ids),
        st.builds(lambda j, d: command_pb2.Command(apply_job=command_pb2.ApplyJob(spec=types_pb2.CronJobSpec(
            id=j, schedule="* * * * *", command=["true"], description=d))), jobs, st.sampled_from(["", "x"])),
        st.builds(lambda j: command_pb2.Command(delete_job=command_pb2.DeleteJob(job_id=j)), jobs),
        st.builds(lambda j, p: command_pb2.Command(set_job_paused=command_pb2.SetJobPaused(
            job_id=j, paused=p)), jobs, st.booleans()),
        st.builds(lambda j, o: command_pb2.Command(assign_jobs=command_pb2.AssignJobs(assignments=[
            command_pb2.AssignJobs.Assignment(job_id=j, owner=o)])), jobs, names),
        st.builds(lambda r: command_pb2.Command(request_id=r, barrier=command_pb2.Barrier()),
                  st.sampled_from(["r1", "r2"])),
        launch_commands(),
    )  # fmt: skip


def launch_commands() -> st.SearchStrategy[command_pb2.Command]:
    """Commands about launches, most of them about one that has not ended."""
    return st.one_of(
        st.builds(lambda j, t, w, k, n: command_pb2.Command(commit_launch=command_pb2.CommitLaunch(
            job_id=j, scheduled_at_unix_ms=t, worker=w, trigger=k, not_before_unix_ms=n)), jobs, times, maybe_names,
            st.integers(1, 2), later),
        st.builds(lambda j, t: command_pb2.Command(record_no_launch=command_pb2.RecordNoLaunch(
            job_id=j, scheduled_at_unix_ms=t, state=types_pb2.LAUNCH_STATE_MISSED)), jobs, times),
        st.builds(lambda j, t, a, w: command_pb2.Command(assign_launch=command_pb2.AssignLaunch(
            job_id=j, scheduled_at_unix_ms=t, attempt=a, worker=w)), jobs, open_times, attempts, names),
        st.builds(lambda j, t, a: command_pb2.Command(start_launch=command_pb2.StartLaunch(
            job_id=j, scheduled_at_unix_ms=t, attempt=a)), jobs, open_times, attempts),
        st.builds(lambda j, t, a, s, r: command_pb2.Command(finish_launch=command_pb2.FinishLaunch(
            job_id=j, scheduled_at_unix_ms=t, attempt=a, state=s, retry_at_unix_ms=r)), jobs, open_times, attempts,
            st.sampled_from([3, 4, 5, 10]), later),
        st.builds(lambda j, t, a, w, r: command_pb2.Command(lose_launch=command_pb2.LoseLaunch(
            job_id=j, scheduled_at_unix_ms=t, attempt=a, next_worker=w, retry_at_unix_ms=r)), jobs, open_times,
            attempts, maybe_names, later),
        st.builds(lambda j, t: command_pb2.Command(cancel_launch=command_pb2.CancelLaunch(
            job_id=j, scheduled_at_unix_ms=t)), jobs, open_times),
        st.builds(lambda p: command_pb2.Command(change_settings=command_pb2.ChangeSettings(settings=types_pb2.Settings(
            replicas=2, cron_paused=p))), st.booleans()),
    )  # fmt: skip


def with_epoch(state: State, command: command_pb2.Command) -> command_pb2.Command:
    """The command as a controller that sees the present state would decide it."""
    operation = command.WhichOneof("operation")
    if operation in ("start_move", "drop_replica"):
        body = getattr(command, operation)
        shard = state.shards.get(body.shard_id)
        body.expected_epoch = shard.epoch if shard else 0
    elif operation in ("promote_replica", "cut_over", "remove_replica"):
        body = getattr(command, operation)
        move = state.moves.get(body.move_id)
        body.expected_epoch = state.shards[move.shard_id].epoch if move else 0
    elif operation == "reshape":
        move = state.moves.get(command.reshape.move_id)
        shards = [state.shards[shard_id] for shard_id in move.shard_ids] if move else []
        command.reshape.expected_epochs[:] = [shard.epoch for shard in shards]
    elif operation == "form_shards":
        for formed in command.form_shards.shards:
            shard = state.shards.get(formed.shard_id)
            formed.epoch = shard.epoch if shard else 0
    elif operation in ("assign_launch", "start_launch", "finish_launch", "lose_launch", "cancel_launch"):
        _aim(state, getattr(command, operation))
    return command


def _aim(state: State, body: Any) -> None:
    """Has a command about a launch mean the job's first one that has not ended, and its present attempt."""
    kept = [state.launches[(body.job_id, at_ms)] for at_ms in state.launch_times.get(body.job_id, ())]
    if body.scheduled_at_unix_ms == OPEN:
        first = next((launch for launch in kept if not launch.state.has_ended), None)
        body.scheduled_at_unix_ms = first.scheduled_at_ms if first else 0
    meant = next((launch for launch in kept if launch.scheduled_at_ms == body.scheduled_at_unix_ms), None)
    if not isinstance(body, command_pb2.CancelLaunch) and body.attempt == PRESENT:
        body.attempt = meant.attempt if meant else 0


def beginning() -> list[command_pb2.Command]:
    """A cluster of four shards on the workers a, b and c."""
    made = command_pb2.BootstrapCluster(cluster_id="c", shards=4, settings=types_pb2.Settings(replicas=2))
    entries = [command_pb2.Command(bootstrap_cluster=made)]
    for name in ("a", "b", "c"):
        node = types_pb2.Node(id=name, incarnation="1", weight=1.0)
        entries.append(command_pb2.Command(register_node=command_pb2.RegisterNode(node=node)))
        entries.append(command_pb2.Command(activate_node=command_pb2.ActivateNode(node_id=name, incarnation="1")))
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("a", "c")]
    assignments = [
        command_pb2.AssignShards.Assignment(shard_id=number, replicas=pair) for number, pair in enumerate(pairs, 1)
    ]
    entries.append(command_pb2.Command(assign_shards=command_pb2.AssignShards(assignments=assignments)))
    formed = [command_pb2.FormShards.Formed(shard_id=number, epoch=1) for number in (1, 2, 3)]
    entries.append(command_pb2.Command(form_shards=command_pb2.FormShards(shards=formed)))
    return entries


@settings(max_examples=150, deadline=None)
@given(st.lists(commands(), max_size=80), st.integers(0, 80))
def test_invariants_hold_and_masters_agree(entries: list[command_pb2.Command], restart_at: int) -> None:
    """Shows that random commands keep every invariant, and that a master restored from a snapshot ends up equal."""
    state = other = State()
    for number, entry in enumerate([*beginning(), *entries], start=1):
        command = with_epoch(state, entry)
        time_ms = WallMs(START_MS + number * 700)
        new = apply(state, command, number, time_ms).state
        validate(new)
        validate_step(state, new)
        if number == restart_at:
            other = decode_snapshot(encode_snapshot(other))
        # The other master decodes the entry from its own log.
        other = apply(other, command_pb2.Command.FromString(command.SerializeToString()), number, time_ms).state
        state = new
    assert encode_snapshot(other) == encode_snapshot(state)
    assert decode_snapshot(encode_snapshot(state)).shards == state.shards


@settings(max_examples=150, deadline=None)
@given(st.lists(commands(), max_size=60))
def test_no_shard_loses_its_last_copy(entries: list[command_pb2.Command]) -> None:
    """Shows that a shard that was ever assigned has an in-sync worker after every command."""
    state = State()
    for number, entry in enumerate([*beginning(), *entries], start=1):
        state = apply(state, with_epoch(state, entry), number, WallMs(START_MS + number * 700)).state
        for shard in state.shards.values():
            assert shard.epoch == 0 or shard.in_sync


@settings(max_examples=300, deadline=None)
@given(st.lists(launch_commands(), min_size=10, max_size=60))
def test_launches_go_only_where_the_table_says(entries: list[command_pb2.Command]) -> None:
    """Shows that no command takes a launch back, past its end, to a second start of a token, or past a cancellation."""
    state = State()
    made = [
        command_pb2.Command(
            apply_job=command_pb2.ApplyJob(spec=types_pb2.CronJobSpec(id=job, schedule="* * * * *", command=["true"]))
        )
        for job in ("j", "k")
    ]
    begun: set[tuple[str, int, int]] = set()
    for number, entry in enumerate([*beginning(), *made, *entries], start=1):
        transition = apply(state, with_epoch(state, entry), number, WallMs(START_MS + number * 700))
        validate(transition.state)
        validate_step(state, transition.state)
        state = transition.state
        for change in transition.changes:
            if not isinstance(change, LaunchChanged):
                continue
            before, after = change.before, change.after
            assert before is None or not before.state.has_ended, f"{before} has ended and became {after}"
            assert before is None or after.attempt - before.attempt in (0, 1), f"{before} became {after}"
            has_new_attempt = before is None or after.attempt > before.attempt
            assert not (before and before.cancel_reason and has_new_attempt), f"{before} was cancelled: {after}"
            if after.state is LaunchState.COMMITTED and has_new_attempt:
                token = (after.job_id, after.scheduled_at_ms, after.attempt)
                assert token not in begun, f"{token} begins twice"
                begun.add(token)
