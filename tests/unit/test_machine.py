"""The replicated state machine, command by command."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.v1 import command_pb2, snapshot_pb2, types_pb2
from coordinator.machine.draft import Draft
from coordinator.machine.machine import (
    FORGOTTEN_AT_ONCE_MAX,
    HANDLERS,
    RESULT_AGE_MS_MAX,
    RESULTS_KEPT,
    apply,
    apply_bytes,
)
from coordinator.machine.snapshot import FORMAT_VERSION, PIECE_ITEMS, _pieces, decode_snapshot, encode_snapshot
from coordinator.machine.state import State
from coordinator.machine.validate import validate
from coordinator.model import LaunchState, MovePhase, NodeState, WallMs
from coordinator.model.errors import Damaged
from tests.machine_driver import START_MS, MachineDriver

BALANCE = types_pb2.MOVE_KIND_BALANCE
REPAIR = types_pb2.MOVE_KIND_REPAIR
TRANSFER = types_pb2.MOVE_KIND_TRANSFER
SURPLUS = types_pb2.MOVE_KIND_SURPLUS


def cluster(workers: str = "abc") -> MachineDriver:
    driver = MachineDriver()
    driver.bootstrap()
    for name in workers:
        driver.add_worker(name)
    driver.assign(1, "a", "b")
    return driver


def promote(driver: MachineDriver, move_id: int) -> None:
    epoch = driver.shard(driver.state.moves[move_id].shard_id).epoch
    driver.accept(promote_replica=command_pb2.PromoteReplica(move_id=move_id, expected_epoch=epoch))


def cut_over(driver: MachineDriver, move_id: int) -> None:
    epoch = driver.shard(driver.state.moves[move_id].shard_id).epoch
    driver.accept(cut_over=command_pb2.CutOver(move_id=move_id, expected_epoch=epoch))


def remove(driver: MachineDriver, move_id: int) -> None:
    epoch = driver.shard(driver.state.moves[move_id].shard_id).epoch
    driver.accept(remove_replica=command_pb2.RemoveReplica(move_id=move_id, expected_epoch=epoch))


def test_every_operation_has_a_handler() -> None:
    """Shows that the list of handlers and the contract name the same operations."""
    operations = {field.name for field in command_pb2.Command.DESCRIPTOR.oneofs_by_name["operation"].fields}
    assert operations == {*HANDLERS, "batch"}


def test_bootstrap_cuts_the_whole_space_once() -> None:
    """Shows that a new cluster's ranges cover the hash space, and that a second bootstrap is refused."""
    driver = MachineDriver()
    driver.bootstrap(shards=7)
    assert len(driver.state.shards) == 7
    again = driver.refuse(bootstrap_cluster=command_pb2.BootstrapCluster(cluster_id="c2", shards=1))
    assert again.code == command_pb2.REFUSAL_CODE_ALREADY_EXISTS


def test_bytes_that_are_no_command_are_refused() -> None:
    """Shows that rubbish in the log becomes a refusal and not an exception."""
    transition = apply_bytes(State(), b"\xff\xff\xff", 5, START_MS)
    assert transition.result.refusal.code == command_pb2.REFUSAL_CODE_INVALID
    assert transition.state.index == 5


def test_an_unknown_operation_is_refused() -> None:
    """Shows that a command of a newer version is refused by name and not applied."""
    transition = apply(State(), command_pb2.Command(cause="x"), 1, START_MS)
    assert "no operation" in transition.result.refusal.message


def test_time_never_runs_backwards() -> None:
    """Shows that an entry with an earlier wall time leaves the machine's time where it was."""
    driver = MachineDriver()
    driver.bootstrap()
    late = driver.state.time_ms
    transition = apply(driver.state, command_pb2.Command(barrier=command_pb2.Barrier()), 99, WallMs(late - 50_000))
    assert transition.state.time_ms == late


def test_a_request_id_is_applied_once() -> None:
    """Shows that a retried request gets the first answer and changes nothing the second time."""
    driver = cluster()
    first = driver.run(request_id="r1", split_shard=command_pb2.SplitShard(shard_id=2))
    shards = driver.state.shards
    second = driver.run(request_id="r1", split_shard=command_pb2.SplitShard(shard_id=2))
    assert second.result == first.result
    assert driver.state.shards == shards
    assert second.changes == ()


def test_remembered_results_are_bounded_by_count_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the table of results forgets the oldest beyond its size, and all that are too old."""
    kept = 3 * FORGOTTEN_AT_ONCE_MAX
    monkeypatch.setattr("coordinator.machine.machine.RESULTS_KEPT", kept)
    driver = MachineDriver()
    driver.bootstrap()
    state = driver.state
    barrier = command_pb2.Barrier()
    for number in range(kept + 10):
        command = command_pb2.Command(request_id=f"r{number}", barrier=barrier)
        state = apply(state, command, state.index + 1, state.time_ms).state
    assert len(state.results) == kept
    assert "r9" not in state.results
    assert "r10" in state.results
    later = WallMs(state.time_ms + RESULT_AGE_MS_MAX + 1)
    rounds = kept // FORGOTTEN_AT_ONCE_MAX
    for number in range(rounds + 1):
        before = len(state.results)
        command = command_pb2.Command(request_id=f"new{number}", barrier=barrier)
        state = apply(state, command, state.index + 1, later).state
        assert before + 1 - len(state.results) <= FORGOTTEN_AT_ONCE_MAX
    assert set(state.results) == {f"new{number}" for number in range(rounds + 1)}
    validate(state)


def test_the_expiry_of_request_ids_is_documented() -> None:
    """Shows that whoever writes a client, or reads the map, finds how long a retry is safe."""
    root = Path(__file__).parents[2]
    contract = "proto/coordinator/api/v1"
    for name in (f"{contract}/cluster.proto", f"{contract}/command.proto", "coordinator/client/client.py"):
        text = (root / name).read_text()
        assert f"newest {RESULTS_KEPT:,}" in text, name
        assert f"for about {RESULT_AGE_MS_MAX // 60_000} minutes" in text, name


def test_a_worker_joins_in_two_steps() -> None:
    """Shows that a worker registers as JOINING and receives shards only once it is admitted."""
    driver = MachineDriver()
    driver.bootstrap()
    node = types_pb2.Node(id="a", incarnation="1", weight=2.0, zone="z1")
    driver.accept(register_node=command_pb2.RegisterNode(node=node))
    assert driver.state.nodes["a"].state is NodeState.JOINING
    assignment = command_pb2.AssignShards.Assignment(shard_id=1, replicas=["a"])
    refusal = driver.refuse(assign_shards=command_pb2.AssignShards(assignments=[assignment]))
    assert "joining" in refusal.message
    driver.accept(activate_node=command_pb2.ActivateNode(node_id="a", incarnation="1"))
    assert driver.state.nodes["a"].may_receive


def test_bad_names_and_weights_are_refused() -> None:
    """Shows that a worker with an impossible name or weight does not get in."""
    driver = MachineDriver()
    driver.bootstrap()
    for name, weight in (("", 1.0), ("a b", 1.0), ("x" * 64, 1.0), ("a", 0.0), ("a", float("nan")), ("a", 1e9)):
        node = types_pb2.Node(id=name, incarnation="1", weight=weight)
        refusal = driver.refuse(register_node=command_pb2.RegisterNode(node=node))
        assert refusal.code == command_pb2.REFUSAL_CODE_INVALID


def test_a_suspect_worker_loses_its_primaries_at_once() -> None:
    """Shows that suspicion hands the role to the in-sync worker, keeps the place, and is taken back when heard."""
    driver = cluster()
    epoch = driver.shard(1).epoch
    driver.accept(suspect_node=command_pb2.SuspectNode(node_id="a", incarnation="1", reason="silent"))
    shard = driver.shard(1)
    assert (shard.primary, shard.in_sync, shard.absent, shard.epoch) == ("b", ("b",), ("a",), epoch + 1)
    assert not driver.state.nodes["a"].is_serving
    driver.accept(activate_node=command_pb2.ActivateNode(node_id="a", incarnation="1"))
    assert driver.state.nodes["a"].may_receive


def test_the_last_copy_stays_where_it_is() -> None:
    """Shows that a shard whose only good copy is on a lost worker keeps naming it."""
    driver = cluster()
    driver.accept(suspect_node=command_pb2.SuspectNode(node_id="b", incarnation="1"))
    driver.accept(expire_node=command_pb2.ExpireNode(node_id="a", incarnation="1"))
    shard = driver.shard(1)
    assert (shard.primary, shard.in_sync) == ("a", ("a",))
    refusal = driver.refuse(remove_node=command_pb2.RemoveNode(node_id="a"))
    assert "last copy" in refusal.message


def test_another_incarnation_is_stale() -> None:
    """Shows that what was decided about an earlier process of a worker does not touch the present one."""
    driver = cluster()
    driver.add_worker("a", incarnation="2")
    refusal = driver.refuse(expire_node=command_pb2.ExpireNode(node_id="a", incarnation="1"))
    assert refusal.code == command_pb2.REFUSAL_CODE_STALE


def test_a_restarted_worker_must_be_confirmed_again() -> None:
    """Shows that a new incarnation of an active worker gives up its roles and keeps its place."""
    driver = cluster()
    node = types_pb2.Node(id="a", incarnation="2", weight=1.0)
    driver.accept(register_node=command_pb2.RegisterNode(node=node))
    assert driver.state.nodes["a"].state is NodeState.JOINING
    assert driver.shard(1).in_sync == ("b",)
    assert driver.shard(1).absent == ("a",)


def test_an_operators_weight_survives_a_restart() -> None:
    """Shows that registering again keeps the operator's weight until the worker's own configuration changes."""
    driver = cluster()
    driver.accept(set_node_weight=command_pb2.SetNodeWeight(node_id="a", weight=3.0))
    for weight, expected in ((1.0, 3.0), (2.0, 2.0)):
        node = types_pb2.Node(id="a", incarnation="1", weight=weight)
        driver.accept(register_node=command_pb2.RegisterNode(node=node))
        assert driver.state.nodes["a"].weight == expected


def test_a_drain_survives_a_restart() -> None:
    """Shows that a worker that is to be drained is draining again after it came back."""
    driver = cluster()
    driver.accept(drain_node=command_pb2.DrainNode(node_id="a"))
    assert driver.state.nodes["a"].state is NodeState.DRAINING
    driver.add_worker("a", incarnation="2")
    states = [driver.state.nodes["a"].state]
    driver.accept(undrain_node=command_pb2.UndrainNode(node_id="a"))
    states.append(driver.state.nodes["a"].state)
    assert states == [NodeState.DRAINING, NodeState.ACTIVE]


def test_leaving_needs_empty_hands() -> None:
    """Shows that a worker with shards cannot leave, and one without can, and be removed."""
    driver = cluster()
    assert "drain" in driver.refuse(leave_node=command_pb2.LeaveNode(node_id="a")).message
    driver.accept(leave_node=command_pb2.LeaveNode(node_id="c"))
    assert driver.state.nodes["c"].state is NodeState.LEFT
    driver.accept(remove_node=command_pb2.RemoveNode(node_id="c"))
    assert "c" not in driver.state.nodes


def test_a_whole_move_of_a_primary() -> None:
    """Shows every phase of a move of the primary, with one epoch for each change of the replica set."""
    driver = cluster()
    epoch = driver.shard(1).epoch
    move_id = driver.start_move(1, "a", "c", BALANCE)
    assert driver.shard(1).joining == ("c",)
    promote(driver, move_id)
    assert driver.state.moves[move_id].phase is MovePhase.CEDING
    assert driver.shard(1).in_sync == ("a", "b", "c")
    cut_over(driver, move_id)
    assert driver.shard(1).primary == "c"
    refusal = driver.refuse(abort_move=command_pb2.AbortMove(move_id=move_id, reason="late"))
    assert "past its cutover" in refusal.message
    remove(driver, move_id)
    shard = driver.shard(1)
    assert (shard.primary, shard.in_sync, shard.epoch) == ("c", ("b", "c"), epoch + 4)
    assert driver.state.ended_moves[move_id].phase is MovePhase.DONE
    assert shard.moved_ms == driver.state.time_ms


def test_a_move_of_a_backup_needs_no_cutover() -> None:
    """Shows that a replica that is not primary is replaced without touching the primary."""
    driver = cluster()
    move_id = driver.start_move(1, "b", "c", BALANCE)
    promote(driver, move_id)
    assert driver.state.moves[move_id].phase is MovePhase.REMOVING
    remove(driver, move_id)
    assert (driver.shard(1).primary, driver.shard(1).in_sync) == ("a", ("a", "c"))


def test_a_transfer_changes_only_the_role() -> None:
    """Shows that the primary role changes hands between in-sync workers."""
    driver = cluster()
    move_id = driver.start_move(1, "a", "b", TRANSFER)
    cut_over(driver, move_id)
    assert (driver.shard(1).primary, driver.shard(1).in_sync) == ("b", ("a", "b"))


def test_a_surplus_copy_is_removed_and_never_the_primary() -> None:
    """Shows that only a copy that is not primary and not the last can be given up."""
    driver = cluster()
    promote(driver, driver.start_move(1, "", "c", REPAIR))
    primary = command_pb2.StartMove(
        shard_id=1, source="a", kind=SURPLUS, expected_epoch=driver.shard(1).epoch
    )
    assert "transfer" in driver.refuse(start_move=primary).message
    remove(driver, driver.start_move(1, "b", "", SURPLUS))
    assert driver.shard(1).in_sync == ("a", "c")


def test_a_stale_epoch_is_refused() -> None:
    """Shows that a move decided on an older configuration of the shard changes nothing."""
    driver = cluster()
    stale = command_pb2.StartMove(shard_id=1, source="a", target="c", kind=BALANCE, expected_epoch=0)
    assert driver.refuse(start_move=stale).code == command_pb2.REFUSAL_CODE_STALE


def test_a_shard_has_one_move_at_a_time() -> None:
    """Shows that a second move of a shard is refused while the first one runs."""
    driver = cluster("abcd")
    driver.start_move(1, "a", "c", BALANCE)
    second = command_pb2.StartMove(
        shard_id=1, source="b", target="d", kind=BALANCE, expected_epoch=driver.shard(1).epoch
    )
    assert "already moving" in driver.refuse(start_move=second).message


def test_aborting_before_the_cutover_restores_the_replicas() -> None:
    """Shows that a move rolled back while copying or ceding leaves the replicas as they were, one epoch on."""
    for promoted in (False, True):
        driver = cluster()
        move_id = driver.start_move(1, "a", "c", BALANCE)
        if promoted:
            promote(driver, move_id)
        epoch = driver.shard(1).epoch
        driver.accept(abort_move=command_pb2.AbortMove(move_id=move_id, reason="changed my mind"))
        shard = driver.shard(1)
        assert (shard.primary, shard.in_sync, shard.joining, shard.epoch) == ("a", ("a", "b"), (), epoch + 1)


def test_losing_the_target_rolls_back() -> None:
    """Shows that a move whose target is lost while copying or ceding ends aborted, with its old replicas."""
    for promoted in (False, True):
        driver = cluster()
        move_id = driver.start_move(1, "a", "c", BALANCE)
        if promoted:
            promote(driver, move_id)
        driver.accept(suspect_node=command_pb2.SuspectNode(node_id="c", incarnation="1"))
        assert driver.state.ended_moves[move_id].phase is MovePhase.ABORTED
        assert driver.shard(1).in_sync == ("a", "b")


def test_losing_the_source_goes_on_without_it() -> None:
    """Shows what becomes of a move whose source is lost: a repair while copying, the end once the target is in sync."""
    driver = cluster()
    move_id = driver.start_move(1, "a", "c", BALANCE)
    driver.accept(suspect_node=command_pb2.SuspectNode(node_id="a", incarnation="1"))
    assert driver.state.moves[move_id].source == ""
    promote(driver, move_id)
    assert driver.shard(1).in_sync == ("b", "c")
    driver = cluster()
    move_id = driver.start_move(1, "a", "c", BALANCE)
    promote(driver, move_id)
    driver.accept(suspect_node=command_pb2.SuspectNode(node_id="a", incarnation="1"))
    assert driver.shard(1).primary == "c"
    assert driver.state.ended_moves[move_id].phase is MovePhase.DONE


def test_what_was_never_formed_is_cut_and_joined_at_once() -> None:
    """Shows that a cut keeps the replicas under new ids, and that only neighbours on the same workers are joined."""
    driver = MachineDriver()
    driver.bootstrap()
    for name in "ab":
        driver.add_worker(name)
    driver.assign(1, "a", "b", is_formed=False)
    lower, upper = driver.accept(split_shard=command_pb2.SplitShard(shard_id=1)).result.applied.created_ids
    assert driver.shard(lower).in_sync == driver.shard(upper).in_sync == ("a", "b")
    assert driver.shard(lower).hi == driver.shard(upper).lo
    assert driver.shard(lower).parents == ()
    wrong = command_pb2.MergeShards(lower_shard_id=upper, upper_shard_id=lower)
    assert "neighbours" in driver.refuse(merge_shards=wrong).message
    other = command_pb2.MergeShards(lower_shard_id=upper, upper_shard_id=2)
    assert "same workers" in driver.refuse(merge_shards=other).message
    joined = command_pb2.MergeShards(lower_shard_id=lower, upper_shard_id=upper)
    new_id = driver.accept(merge_shards=joined).result.applied.created_ids[0]
    assert new_id not in (1, lower, upper)
    assert driver.shard(new_id).in_sync == ("a", "b")
    assert not driver.shard(new_id).is_formed


def job(driver: MachineDriver, **fields: object) -> None:
    asked: dict[str, Any] = {"id": "j", "schedule": "* * * * *", "command": ["true"], **fields}
    spec = types_pb2.CronJobSpec(**asked)
    driver.accept(apply_job=command_pb2.ApplyJob(spec=spec, source="api"))


def commit(driver: MachineDriver, at_ms: int, worker: str = "a") -> None:
    driver.accept(commit_launch=command_pb2.CommitLaunch(job_id="j", scheduled_at_unix_ms=at_ms, worker=worker))


def test_a_scheduled_time_is_decided_once_and_in_order() -> None:
    """Shows that a launch at or before the watermark is refused, whether it was launched or recorded as missed."""
    driver = cluster()
    job(driver)
    at = driver.time_ms + 60_000
    commit(driver, at)
    again = command_pb2.CommitLaunch(job_id="j", scheduled_at_unix_ms=at, worker="b")
    assert driver.refuse(commit_launch=again).code == command_pb2.REFUSAL_CODE_STALE
    missed = command_pb2.RecordNoLaunch(
        job_id="j", scheduled_at_unix_ms=at + 1, state=types_pb2.LAUNCH_STATE_MISSED, reason="no leader"
    )
    driver.accept(record_no_launch=missed)
    assert driver.refuse(record_no_launch=missed).code == command_pb2.REFUSAL_CODE_STALE
    states = [driver.state.launches[("j", WallMs(time_ms))].state for time_ms in (at, at + 1)]
    assert states == [LaunchState.COMMITTED, LaunchState.MISSED]


def test_another_schedule_and_a_resume_never_launch_retroactively() -> None:
    """Shows that what was due before a change of the times or during a pause is refused afterwards."""
    driver = cluster()
    job(driver)
    for time_zone in ("UTC", "Europe/Berlin"):
        due = driver.time_ms + 500
        job(driver, schedule="*/2 * * * *", time_zone=time_zone)
        stale = command_pb2.CommitLaunch(job_id="j", scheduled_at_unix_ms=due, worker="a")
        assert driver.refuse(commit_launch=stale).code == command_pb2.REFUSAL_CODE_STALE
    driver.accept(set_job_paused=command_pb2.SetJobPaused(job_id="j", paused=True))
    due = driver.time_ms + 500
    paused = command_pb2.CommitLaunch(job_id="j", scheduled_at_unix_ms=due, worker="a")
    assert "paused" in driver.refuse(commit_launch=paused).message
    driver.accept(set_job_paused=command_pb2.SetJobPaused(job_id="j", paused=False))
    assert driver.refuse(commit_launch=paused).code == command_pb2.REFUSAL_CODE_STALE


def test_an_edit_that_leaves_the_times_alone_decides_none() -> None:
    """Shows that the watermark stays where it is when neither schedule nor time zone changes."""
    driver = cluster()
    job(driver)
    before = driver.state.jobs["j"].decided_until_ms
    job(driver, description="edited", jitter_s=10.0)
    assert driver.state.jobs["j"].decided_until_ms == before


def test_a_lost_attempt_is_fenced() -> None:
    """Shows that after an attempt is given to another worker the old one can no longer report."""
    driver = cluster()
    job(driver)
    at = driver.time_ms + 5_000
    commit(driver, at)
    lose = command_pb2.LoseLaunch(job_id="j", scheduled_at_unix_ms=at, attempt=1, next_worker="b", reason="gone")
    driver.accept(lose_launch=lose)
    late = command_pb2.FinishLaunch(
        job_id="j", scheduled_at_unix_ms=at, attempt=1, state=types_pb2.LAUNCH_STATE_SUCCEEDED
    )
    assert driver.refuse(finish_launch=late).code == command_pb2.REFUSAL_CODE_STALE
    driver.accept(start_launch=command_pb2.StartLaunch(job_id="j", scheduled_at_unix_ms=at, attempt=2))
    late.attempt = 2
    driver.accept(finish_launch=late)
    launch = driver.state.launches[("j", WallMs(at))]
    assert (launch.state, launch.attempt, launch.worker) == (LaunchState.SUCCEEDED, 2, "b")
    assert driver.refuse(finish_launch=late).code == command_pb2.REFUSAL_CODE_STALE


def test_a_manual_launch_leaves_the_schedule_alone() -> None:
    """Shows that a trigger makes a launch of its own and does not decide any scheduled time."""
    driver = cluster()
    job(driver)
    before = driver.state.jobs["j"].decided_until_ms
    manual = command_pb2.CommitLaunch(job_id="j", worker="a", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    first = driver.accept(commit_launch=manual).result.applied.scheduled_at_unix_ms
    second = driver.accept(commit_launch=manual).result.applied.scheduled_at_unix_ms
    assert first != second
    assert first % 1_000 != 0, "a whole second could be a scheduled time"
    assert driver.state.jobs["j"].decided_until_ms == before


def test_history_is_bounded_and_keeps_what_runs() -> None:
    """Shows that old launches are forgotten beyond the setting, but never one that has not ended."""
    driver = cluster()
    driver.accept(change_settings=command_pb2.ChangeSettings(settings=types_pb2.Settings(replicas=2, launches_kept=5)))
    job(driver)
    start = driver.time_ms + 100_000
    commit(driver, start)
    for number in range(1, 20):
        missed = command_pb2.RecordNoLaunch(
            job_id="j", scheduled_at_unix_ms=start + number, state=types_pb2.LAUNCH_STATE_SKIPPED, reason="test"
        )
        driver.accept(record_no_launch=missed)
    times = driver.state.launch_times["j"]
    assert times[0] == start
    assert times[-1] == start + 19
    assert len(times) <= 6


def test_history_forgets_by_age_and_keeps_the_latest() -> None:
    """Shows that what is older than the setting goes with the next launch, what runs stays, and one is always there."""
    driver = cluster()
    settings = types_pb2.Settings(replicas=2, launches_kept=100, launches_kept_s=3_600.0)
    driver.accept(change_settings=command_pb2.ChangeSettings(settings=settings))
    job(driver)
    start = WallMs(driver.time_ms + 1_000)
    commit(driver, start)

    def skip(time_ms: int) -> None:
        skipped = types_pb2.LAUNCH_STATE_SKIPPED
        record = command_pb2.RecordNoLaunch(job_id="j", scheduled_at_unix_ms=time_ms, state=skipped, reason="test")
        driver.accept(record_no_launch=record)

    second = WallMs(start + 1_000)
    skip(second)
    driver.time_ms = WallMs(driver.time_ms + 1_800_000)
    half_way = driver.time_ms
    skip(half_way)
    assert list(driver.state.launch_times["j"]) == [start, second, half_way], "nothing is an hour old"
    driver.time_ms = WallMs(half_way + 3_600_500)
    latest = WallMs(half_way + 1)
    skip(latest)
    assert list(driver.state.launch_times["j"]) == [start, latest], "the one that runs, and the latest, old as it is"


def test_deleting_a_job_forgets_its_launches() -> None:
    """Shows that nothing of a deleted job stays behind."""
    driver = cluster()
    job(driver)
    commit(driver, driver.time_ms + 5_000)
    driver.accept(delete_job=command_pb2.DeleteJob(job_id="j"))
    assert not driver.state.launches
    assert "j" not in driver.state.launch_times


def test_snapshots_round_trip_byte_for_byte() -> None:
    """Shows that a state with something of everything survives a snapshot, and encodes to the same bytes again."""
    driver = cluster()
    job(driver)
    commit(driver, driver.time_ms + 5_000)
    driver.start_move(1, "a", "c", BALANCE)
    driver.run(request_id="r1", split_shard=command_pb2.SplitShard(shard_id=2))
    data = encode_snapshot(driver.state)
    restored = decode_snapshot(data)
    validate(restored)
    assert restored == driver.state
    assert encode_snapshot(restored) == data


def test_snapshots_are_made_in_small_pieces() -> None:
    """Shows that no step of the encoding takes many items: the leader's event loop waits for it."""
    driver = cluster()
    for number in range(PIECE_ITEMS + 50):
        driver.run(request_id=f"r{number}", change_settings=command_pb2.ChangeSettings())
    pieces = list(_pieces(driver.state))
    counts = [sum(len(getattr(piece, name)) for name in ("results", "events", "shards", "nodes")) for piece in pieces]
    assert max(counts) <= PIECE_ITEMS
    assert sum(counts) > PIECE_ITEMS


def test_a_fault_in_a_handler_becomes_a_refusal() -> None:
    """Shows that an exception inside a handler is answered and changes nothing, instead of stopping every master."""
    driver = cluster()
    # MoveKind 99 is not in the vocabulary, so building it raises inside the handler.
    odd = command_pb2.StartMove(shard_id=1, source="a", target="c", expected_epoch=driver.shard(1).epoch)
    odd.kind = 99  # type: ignore[assignment]
    assert "internal fault" in driver.refuse(start_move=odd).message


def test_a_snapshot_of_the_first_format_still_loads() -> None:
    """Shows that a snapshot written by the first version of the software is read, and keeps every invariant."""
    data = (Path(__file__).parents[1] / "data" / "snapshot_v1.bin").read_bytes()
    state = decode_snapshot(data)
    validate(state)
    assert sorted(state.nodes) == ["a", "b", "c"]
    assert (state.shards[1].primary, state.shards[1].joining) == ("a", ("c",))
    assert state.launches[("j", state.launch_times["j"][0])].state is LaunchState.COMMITTED
    assert "r1" in state.results


def test_a_snapshot_of_a_newer_format_is_refused() -> None:
    """Shows that a snapshot from the future is refused with what to do, instead of being half understood."""
    data = snapshot_pb2.Snapshot(format_version=FORMAT_VERSION + 1).SerializeToString()
    with pytest.raises(Damaged, match="format version"):
        decode_snapshot(data)
    with pytest.raises(Damaged, match="cannot be decoded"):
        decode_snapshot(b"\xff\xff\xff")


def test_a_command_hands_every_field_of_the_state_on() -> None:
    """A draft that changes nothing ends as the state that it began with, field by field, but for index and time."""
    state = State()
    for field in fields(State):
        object.__setattr__(state, field.name, object())
    draft = Draft(state, 5, WallMs(7), "")
    after = draft.finish()
    assert (after.index, after.time_ms) == (5, 7)
    names = [field.name for field in fields(State) if field.name not in ("index", "time_ms")]
    assert [name for name in names if getattr(after, name) is not getattr(state, name)] == []
