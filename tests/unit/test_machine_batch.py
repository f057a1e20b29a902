"""A batch: many commands in one log entry, each as if it had come alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.machine import BATCH_COMMANDS_MAX, apply
from coordinator.machine.snapshot import encode_snapshot
from coordinator.machine.state import Change, State
from coordinator.machine.validate import validate
from coordinator.model import LogRecord, WallMs
from coordinator.server.batches import ENTRY_COMMANDS_MAX, batches, results_of
from tests.machine_driver import START_MS, MachineDriver
from tests.property.test_machine import beginning, commands, with_epoch


def apply_job(
    job_id: str, *, request_id: str = "", cause: str = "", schedule: str = "* * * * *"
) -> command_pb2.Command:
    """A command that makes or changes a job; an empty schedule is refused."""
    spec = types_pb2.CronJobSpec(
        id=job_id,
        schedule=schedule,
        command=["true"],
        timeout_s=1,
        start_deadline_s=1,
        catch_up_window_s=1,
        catch_up_limit=1,
        attempts_max=1,
        overlap=types_pb2.OVERLAP_POLICY_SKIP,
        catch_up=types_pb2.CATCH_UP_POLICY_NONE,
    )
    return command_pb2.Command(request_id=request_id, cause=cause, apply_job=command_pb2.ApplyJob(spec=spec))


def batch_of(*commands: command_pb2.Command) -> command_pb2.Batch:
    """The commands as one."""
    return command_pb2.Batch(commands=commands)


def test_each_command_has_its_own_result_and_cause() -> None:
    """Shows that a refused command stops no other, that results stand in order, and where the cause comes from."""
    driver = MachineDriver()
    driver.bootstrap()
    done = driver.accept(
        batch=batch_of(apply_job("a"), apply_job("b", schedule=""), apply_job("c", cause="mine")), cause="all"
    )
    applied = done.result.applied
    assert [one.WhichOneof("outcome") for one in applied.results] == ["applied", "refusal", "applied"]
    assert applied.results[1].refusal.code == command_pb2.REFUSAL_CODE_INVALID
    assert [one.applied.index for one in applied.results if one.HasField("applied")] == [applied.index] * 2
    assert sorted(driver.state.jobs) == ["a", "c"]
    assert [(record.subject, record.cause) for record in done.records] == [("a", "all"), ("c", "mine")]
    assert len(done.changes) == 2


def test_a_later_command_sees_what_an_earlier_one_did() -> None:
    """Shows that the commands of a batch are applied one after another."""
    driver = MachineDriver()
    driver.bootstrap()
    paused = command_pb2.Command(set_job_paused=command_pb2.SetJobPaused(job_id="a", paused=True))
    done = driver.accept(batch=batch_of(paused, apply_job("a"), paused))
    assert [one.WhichOneof("outcome") for one in done.result.applied.results] == ["refusal", "applied", "applied"]
    assert driver.state.jobs["a"].paused


def test_a_command_is_applied_once_whether_alone_or_in_a_batch() -> None:
    """Shows that request ids count inside a batch as they do outside, in both orders."""
    driver = MachineDriver()
    driver.bootstrap()
    first = driver.accept(batch=batch_of(apply_job("a", request_id="r1"), apply_job("b", request_id="r2")))
    deleted = command_pb2.Command(delete_job=command_pb2.DeleteJob(job_id="a"))
    driver.accept(batch=batch_of(deleted))
    again = driver.run(request_id="r1", apply_job=apply_job("a").apply_job)
    assert again.result == first.result.applied.results[0]
    whole = driver.accept(batch=batch_of(apply_job("a", request_id="r1"), apply_job("b", request_id="r2")))
    assert list(whole.result.applied.results) == list(first.result.applied.results)
    assert whole.changes == ()
    assert "a" not in driver.state.jobs


@pytest.mark.parametrize(
    ("batch", "request_id", "words"),
    [
        (batch_of(), "", "0 commands"),
        (batch_of(*[apply_job("a")] * (BATCH_COMMANDS_MAX + 1)), "", "1001 commands"),
        (batch_of(apply_job("a"), command_pb2.Command(batch=batch_of(apply_job("b")))), "", "inside a batch"),
        (batch_of(apply_job("a")), "r1", "request id"),
    ],
    ids=["empty", "too many", "nested", "with a request id"],
)
def test_what_is_no_batch_is_refused_whole(batch: command_pb2.Batch, request_id: str, words: str) -> None:
    """Shows that a batch that breaks a rule changes nothing, not even by its sound commands."""
    driver = MachineDriver()
    driver.bootstrap()
    refusal = driver.refuse(batch=batch, request_id=request_id)
    assert refusal.code == command_pb2.REFUSAL_CODE_INVALID
    assert words in refusal.message
    assert not driver.state.results


@settings(max_examples=100, deadline=None)
@given(st.lists(commands(), min_size=1, max_size=40))
def test_a_batch_is_its_commands_one_after_another(entries: list[command_pb2.Command]) -> None:
    """Shows for random commands that state, results, changes and story are those of the sequence, byte by byte."""
    started = State()
    for number, entry in enumerate(beginning(), start=1):
        started = apply(started, entry, number, START_MS).state
    index, time_ms = started.index + 1, WallMs(START_MS + 700)
    alone = started
    results: list[command_pb2.CommandResult] = []
    changes: list[Change] = []
    records: list[LogRecord] = []
    for entry in entries:
        entry.CopyFrom(with_epoch(alone, entry))
        transition = apply(alone, entry, index, time_ms)
        alone = transition.state
        results.append(transition.result)
        changes += transition.changes
        records += transition.records
    together = apply(started, command_pb2.Command(batch=batch_of(*entries)), index, time_ms)
    validate(together.state)
    assert encode_snapshot(together.state) == encode_snapshot(alone)
    assert list(together.result.applied.results) == results
    assert (list(together.changes), list(together.records)) == (changes, records)


def sizes(entries: Sequence[tuple[command_pb2.Command, int]]) -> list[int]:
    """How many commands each entry carries."""
    return [count for _, count in entries]


def test_batches_keep_order_and_both_bounds() -> None:
    """Shows that commands are split by count and by bytes, in order, and that one alone stays as it is."""
    many = [apply_job(f"j{number}") for number in range(2_500)]
    by_count = list(batches(many, 8 << 20))
    assert sizes(by_count) == [ENTRY_COMMANDS_MAX] * 12 + [100]
    assert [inner.apply_job.spec.id for entry, _ in by_count for inner in entry.batch.commands] == [
        one.apply_job.spec.id for one in many
    ]
    by_bytes = list(batches(many, 10_000))
    assert sum(sizes(by_bytes)) == 2_500
    assert max(entry.ByteSize() for entry, _ in by_bytes) <= 10_000
    assert list(batches(many[:1], 10)) == [(many[0], 1)]
    assert list(batches([], 10)) == []


def test_results_of_an_entry_belong_to_its_commands() -> None:
    """Shows that a batch's answers come apart, and that a refusal of the whole is everybody's."""
    one, two = (command_pb2.CommandResult(applied=command_pb2.Applied(index=index)) for index in (1, 2))
    assert results_of(one, 1) == [one]
    whole = command_pb2.CommandResult(applied=command_pb2.Applied(index=2, results=[one, two]))
    assert results_of(whole, 2) == [one, two]
    refused = command_pb2.CommandResult(refusal=command_pb2.Refusal(message="no"))
    assert results_of(refused, 2) == [refused, refused]
