"""The judge of the cron chaos tests: what it lets pass, and what it finds."""

from __future__ import annotations

import pytest

from coordinator.api.v1 import types_pb2
from tests.cron_chaos import Expected, check, read_sink

NEVER = Expected("tick", never=True)
AGAIN = Expected("tick", never=False)
SUCCEEDED, LOST = types_pb2.LAUNCH_STATE_SUCCEEDED, types_pb2.LAUNCH_STATE_LOST


def launch(state: types_pb2.LaunchState.ValueType, attempt: int = 1, reason: str = "") -> types_pb2.Launch:
    """A launch at second 5 on w1."""
    return types_pb2.Launch(
        job_id="tick", scheduled_at_unix_ms=5_000, attempt=attempt, worker="w1", state=state, reason=reason
    )


def lines(*texts: str) -> str:
    """Lines of the sink, of second 5: verb, attempt, worker."""
    parts = [text.split() for text in texts]
    return "".join(f"{verb} tick/5000/{attempt} {worker}\n" for verb, attempt, worker in parts)


def test_one_run_with_its_effect_is_right() -> None:
    """Shows what every second looks like without faults."""
    sink = read_sink(lines("begin 1 w1", "effect 1 w1"))
    assert check([NEVER], [launch(SUCCEEDED)], sink, 5, 6) == []


def test_an_attempt_that_was_given_up_is_fenced() -> None:
    """Shows that a stale run cannot have an effect, and that this alone is no fault."""
    sink = read_sink(lines("begin 1 w2", "begin 2 w1", "effect 1 w2", "effect 2 w1"))
    assert (sink.effects, sink.fenced) == ({("tick", 5_000): 2}, ["tick/5000/1"])
    assert check([AGAIN], [launch(SUCCEEDED, attempt=2)], sink, 5, 6) == []
    assert check([NEVER], [launch(SUCCEEDED, attempt=2)], sink, 5, 6) == [
        "tick at 5.000, succeeded: retry is never, and it began 2 times: [(1, 'w2'), (2, 'w1')]"
    ]


def test_of_a_whole_job_no_time_may_be_missed() -> None:
    """Shows that a reason is no excuse for a job that is to run whatever happens."""
    whole = Expected("tick", never=False, is_whole=True)
    missed = launch(types_pb2.LAUNCH_STATE_MISSED, reason="no leader")
    assert check([AGAIN], [missed], read_sink(""), 5, 6) == []
    assert check([whole], [missed], read_sink(""), 5, 6) == [
        "tick at 5.000, missed: and it was to run whatever happens: no leader"
    ]
    sink = read_sink(lines("begin 1 w1", "effect 1 w1"))
    assert check([whole], [launch(SUCCEEDED)], sink, 5, 6) == []


def test_an_effect_counts_once() -> None:
    """Shows that a later attempt finds the effect of the one before."""
    sink = read_sink(lines("begin 1 w2", "effect 1 w2", "begin 2 w1", "effect 2 w1"))
    assert (sink.effects, sink.fenced) == ({("tick", 5_000): 1}, ["tick/5000/2"])


@pytest.mark.parametrize(
    ("entries", "sink", "problem"),
    [
        ([], "", "tick at 5.000 is not accounted for"),
        ([launch(LOST, reason="r"), launch(LOST, reason="r")], "", "tick at 5.000 has 2 entries"),
        ([launch(LOST)], "", "tick at 5.000, lost: without a reason"),
        ([launch(types_pb2.LAUNCH_STATE_SKIPPED)], "", "tick at 5.000, skipped: without a reason"),
        ([launch(types_pb2.LAUNCH_STATE_MISSED, reason="r")], lines("begin 1 w1"), "missed: though it began on w1"),
        ([launch(types_pb2.LAUNCH_STATE_RUNNING)], lines("begin 1 w1"), "running: has not ended"),
        ([launch(SUCCEEDED)], lines("begin 1 w1"), "succeeded: without an effect"),
        ([launch(SUCCEEDED)], lines("begin 1 w2", "effect 1 w2"), "attempt 1 on w1 never began, but [(1, 'w2')]"),
        ([launch(LOST, reason="r")], lines("begin 1 w1", "begin 2 w1"), "knows 1 attempts, and there began"),
        ([launch(LOST, reason="r")], lines("begin 1 w1", "begin 1 w1"), "tick/5000/1 began twice: on w1, then on w1"),
        ([launch(LOST, reason="r")], lines("effect 1 w1"), "had an effect on w1 without a beginning"),
        ([launch(LOST, reason="r")], "nonsense\n", "a line that no run writes"),
    ],
)
def test_what_is_wrong_is_found(entries: list[types_pb2.Launch], sink: str, problem: str) -> None:
    """Shows every kind of fault by itself."""
    assert any(problem in found for found in check([AGAIN], entries, read_sink(sink), 5, 6))


def test_a_run_that_the_history_does_not_know_is_found() -> None:
    """Shows that a start outside of the time that is accounted for must be in the history too."""
    sink = read_sink(lines("begin 1 w1"))
    assert check([AGAIN], [], sink, 6, 6) == ["tick at 5.000 began and is not in the history"]
