"""Orders that workers decline: the leader's cron controller over the real machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.api.v1 import command_pb2
from coordinator.control.open_launches import StarvedLaunches, most_urgent_first
from coordinator.control.worker_slots import SLOTS_ASSUMED, WorkerSlots
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CronJobSpec, LaunchState, OverlapPolicy, RetryPolicy, WallMs
from tests.cron_harness import CronHarness
from tests.unit.test_cron_retries import attempts, minutely, ordered


def orders(harness: CronHarness) -> list[tuple[str, int]]:
    """Who was ordered to run which attempt."""
    return [(order.node_id, order.launch.attempt) for order in harness.orders]


def declined_by_all(**fields: object) -> CronHarness:
    """A cluster whose three workers have declined the first launch."""
    harness = ordered(start=False, **fields)
    for _ in range(3):
        harness.decline(harness.orders[-1])
    return harness


@pytest.mark.parametrize("retry", RetryPolicy)
def test_a_declined_launch_goes_to_a_backup_at_once(retry: RetryPolicy) -> None:
    """Whatever the policy, since it never started: with a new number, in the same instant; the worker is answered."""
    harness = ordered(start=False, retry=retry)
    harness.decline(harness.orders[0])
    assert attempts(harness) == [(2, "w2", "COMMITTED")]
    assert orders(harness) == [("w1", 1), ("w2", 2)]
    assert harness.launch(60).reason == "w1 declined: no slot is free"
    assert {(receipt.attempt, receipt.refusal) for receipt in harness.receipts} == {(1, "")}
    harness.finish(harness.orders[1])
    assert attempts(harness) == [(2, "w2", "SUCCEEDED")]


@pytest.mark.parametrize("retry", RetryPolicy)
def test_what_all_decline_waits_for_the_first_free_slot(retry: RetryPolicy) -> None:
    """While nobody has a slot nothing is ordered or proposed; the worker that has one first gets the launch."""
    harness = declined_by_all(retry=retry)
    assert attempts(harness) == [(3, "", "WAITING")]
    proposed = len(harness.proposed)
    for _ in range(20):
        harness.advance(0.5)
        for name in ("w1", "w2", "w3"):
            harness.heartbeat(name, slots_free=0)
    assert len(harness.proposed) == proposed
    harness.heartbeat("w3", slots_free=2)
    assert orders(harness) == [("w1", 1), ("w2", 2), ("w3", 3), ("w3", 4)]
    assert harness.launch(60).attempts_counted == 1
    harness.finish(harness.orders[-1])
    assert attempts(harness) == [(4, "w3", "SUCCEEDED")]


def test_what_finds_no_slot_until_its_start_deadline_is_missed() -> None:
    """The deadline counts from the first decline, however often the launch is declined until then."""
    harness = declined_by_all(start_deadline_s=30.0)
    for _ in range(29):
        harness.advance(1)
        harness.heartbeat("w2", slots_free=1)
        if harness.orders[-1].launch.attempt == harness.launch(60).attempt:
            harness.decline(harness.orders[-1])
    assert harness.launch(60).state is LaunchState.WAITING
    assert harness.launch(60).attempt == 3 + 29
    harness.advance(1.1)
    launch = harness.launch(60)
    assert launch.state is LaunchState.MISSED
    slots = "w1 has no free slot, w2 has no free slot, w3 has no free slot"
    assert launch.reason == f"no worker could run it: {slots}"


def test_one_free_slot_gets_one_launch_the_most_urgent() -> None:
    """Of all that wait, the lowest class goes first, then the one that was due first; the others are not ordered."""
    allow = {"overlap": OverlapPolicy.ALLOW, "schedule": "* * * * * *", "command": ("true",)}
    specs = [CronJobSpec(id=f"job-{n}", priority_class=n, **allow) for n in (4, 2, 3)]  # type: ignore[arg-type]
    harness = CronHarness(*specs, workers=("w1",))
    harness.lead()
    harness.heartbeat("w1", slots_free=0)
    for _ in range(3):
        seen = len(harness.orders)
        harness.advance(1)
        for order in harness.orders[seen:]:
            harness.decline(order)
    assert harness.control is not None
    assert harness.control.waits_for_workers
    seen = len(harness.orders)
    harness.heartbeat("w1", slots_free=1)
    assert [(it.launch.job_id, it.launch.attempt) for it in harness.orders[seen:]] == [("job-2", 2)]
    first = harness.orders[-1]
    assert first.launch.scheduled_at_ms == min(it.scheduled_at_ms for it in harness.history("job-2"))
    harness.start(first)
    harness.heartbeat("w1", first.launch, slots_free=0)
    assert len(harness.orders) == seen + 1
    harness.finish(first)  # The end that is reported frees the slot, before the next heartbeat says so.
    assert [it.launch.job_id for it in harness.orders[seen:]] == ["job-2", "job-2"]


def test_an_order_on_its_way_counts() -> None:
    """A heartbeat that was sent before the order came does not give its slot away twice."""
    harness = declined_by_all(overlap=OverlapPolicy.ALLOW, start_deadline_s=300.0)
    harness.advance(60)
    harness.decline(harness.orders[-1])
    harness.heartbeat("w2", slots_free=1)
    seen = len(harness.orders)
    harness.heartbeat("w2", slots_free=1)
    assert len(harness.orders) == seen


def test_a_full_owner_is_not_asked() -> None:
    """A launch that is due goes to the first worker that has told of a free slot; to the owner when nobody has one."""
    harness = CronHarness(minutely(overlap=OverlapPolicy.ALLOW))
    harness.lead()
    harness.heartbeat("w1", slots_free=0)
    harness.heartbeat("w2", slots_free=3)
    harness.advance(60)
    assert orders(harness) == [("w2", 1)]
    for name in ("w2", "w3"):
        harness.heartbeat(name, slots_free=0)
    harness.advance(60)
    assert orders(harness) == [("w2", 1), ("w1", 1)]


def test_an_unfit_worker_is_not_asked_again() -> None:
    """Workers that cannot run it are left out, free or not; when all have said so it is missed, with their words."""
    harness = ordered(start=False, start_deadline_s=20.0)
    for name in ("w1", "w2", "w3"):
        assert harness.orders[-1].node_id == name
        harness.decline(harness.orders[-1], unfit=True)
    for _ in range(19):
        harness.advance(1)
        for name in ("w1", "w2", "w3"):
            harness.heartbeat(name, slots_free=5)
    assert len(harness.orders) == 3
    harness.advance(2)
    launch = harness.launch(60)
    assert launch.state is LaunchState.MISSED
    assert launch.reason.startswith("no worker could run it: w1 cannot: it needs a POSIX system, w2 cannot:")


def test_declines_leave_the_policy_its_attempts() -> None:
    """Of two attempts none is used up by a decline; an attempt that is lost is."""
    harness = ordered(start=False, attempts_max=2)
    harness.decline(harness.orders[-1])
    harness.start(harness.orders[-1])
    harness.expire("w2")
    harness.advance(2)
    assert attempts(harness) == [(2, "w2", "LOST"), (3, "w3", "COMMITTED")]
    harness.expire(harness.orders[-1].node_id)
    launch = harness.launch(60)
    assert (launch.attempt, launch.state) == (3, LaunchState.LOST)
    assert launch.reason.endswith("attempt 3 was the last")


def test_what_was_told_to_stop_ends_with_the_decline() -> None:
    """A launch that nobody wants any more goes to nobody else."""
    harness = ordered(start=False)
    harness.cancel(60)
    harness.decline(harness.orders[0])
    assert attempts(harness) == [(1, "", "CANCELLED")]  # It ran nowhere.
    assert harness.launch(60).reason == "enough"
    harness.advance(30)
    assert orders(harness) == [("w1", 1)]


@pytest.mark.parametrize("retry", RetryPolicy)
def test_a_decline_in_doubt_is_never_ordered_again(retry: RetryPolicy) -> None:
    """While nobody knows whether a decline is committed, a new session of its worker does not get the old order."""
    harness = ordered(start=False, retry=retry)
    harness.hold = True
    harness.decline(harness.orders[0])
    in_doubt = harness.held[0].command
    harness.release(lose=True)
    harness.open_session("w1", session=2)
    harness.advance(0.6)
    assert orders(harness) == [("w1", 1)]
    harness.apply(in_doubt)
    harness.hold = False
    harness.advance(2)
    assert orders(harness) == [("w1", 1), ("w2", 2)]
    assert attempts(harness) == [(2, "w2", "COMMITTED")]


def test_a_decline_is_answered_whatever_became_of_its_launch() -> None:
    """One that is said again, of an attempt that is over, needs no more; that of a stranger is refused."""
    harness = ordered(start=False)
    first = harness.orders[0]
    harness.decline(first)
    second = harness.orders[1]
    harness.receipts.clear()
    harness.decline(first)
    harness.finish(second)
    harness.decline(first)
    assert [receipt.refusal for receipt in harness.receipts if receipt.attempt == 1] == ["", ""]
    harness.advance(60)
    third = harness.orders[-1]
    harness.decline(replace(third, node_id="w3"))
    assert harness.receipts[-1].refusal == "this attempt belongs to w2"


def test_slots_are_a_hint() -> None:
    """Who has said nothing is taken to have some; what a worker is given and what ends there counts until it speaks."""
    slots = WorkerSlots()
    assert slots.choose(["w1", "w2"], avoid="w1") == "w2"
    assert slots.choose(["w1"], avoid="w1") == "w1"
    assert slots.choose([]) == ""
    slots.put("w1", 1)
    slots.take("w1")
    assert (slots.has_free("w1"), slots.choose(["w1", "w2"])) == (False, "w2")
    slots.give_back("w1")
    assert slots.has_free("w1")
    slots.put("w1", -2)
    assert not slots.has_free("w1")
    slots.forget("w1")
    assert slots.has_free("w1")


def test_a_worker_that_could_not_run_it_may_later() -> None:
    """What workers cannot run is tried again once the job is another one, and by a worker that begins a new session."""
    harness = ordered(start=False, start_deadline_s=300.0)
    for name in ("w1", "w2", "w3"):
        harness.decline(harness.orders[-1], unfit=True)
        harness.heartbeat(name, slots_free=5)
    assert len(harness.orders) == 3
    harness.open_session("w2", session=2)
    harness.heartbeat("w2", slots_free=5, session=2)
    assert orders(harness)[3:] == [("w2", 4)]
    harness.decline(harness.orders[-1], unfit=True, session=2)
    spec = replace(harness.state.jobs["tick"].spec, command=("true", "now"))
    harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec), source="api"))
    assert orders(harness)[4:] == [("w1", 5)]


def test_a_new_leader_does_not_flood_workers_that_have_not_said_how_much_they_take() -> None:
    """Of many that wait, each worker gets as many as are assumed at most, the most urgent first."""
    allow = {"overlap": OverlapPolicy.ALLOW, "overlap_limit": 50, "command": ("true",), "start_deadline_s": 300.0}
    specs = [
        CronJobSpec(id=f"job-{n:02}", schedule="* * * * *", priority_class=n % 7, **allow)  # type: ignore[arg-type]
        for n in range(40)
    ]
    harness = CronHarness(*specs, workers=("w1",))
    harness.lead()
    harness.heartbeat("w1", slots_free=0)
    harness.advance(60)
    for order in list(harness.orders):
        harness.decline(order)
    harness.proposed.clear()
    harness.lead()
    jobs = [command.assign_launch.job_id for command in harness.proposed]
    classes = [harness.state.jobs[job_id].spec.priority_class for job_id in jobs]
    assert len(classes) == SLOTS_ASSUMED
    assert classes == sorted(classes)
    assert max(classes) == 2


def test_starved_launches_stand_by_urgency() -> None:
    """The lowest class is first, then what was due first, whatever comes and goes; what is filed anew counts once."""
    harness = CronHarness(*(replace(minutely(), id=f"job-{n}", priority_class=n % 3) for n in range(6)))
    harness.lead()
    harness.advance(120)
    keys = sorted(harness.state.launches)
    starved = StarvedLaunches()
    for key in (*keys, *reversed(keys)):
        starved.add(harness.state, key)
    starved.discard(keys[3])
    starved.discard(("nobody", WallMs(0)))
    assert list(starved) == [key for key in most_urgent_first(harness.state, keys) if key != keys[3]]
    for key in starved:
        starved.discard(key)
    assert not starved
