"""What workers report gathers for a moment, and shares log entries with what is decided meanwhile."""

from __future__ import annotations

import pytest

from coordinator.control.cron import REPORT_GATHER_S
from coordinator.model import CronJobSpec, LaunchState, OverlapPolicy
from tests.cron_harness import CronHarness, every_second, report_of


def gathering(*specs: CronJobSpec) -> CronHarness:
    """A cluster whose leader has just ordered the first launch of each job."""
    harness = CronHarness(*specs)
    harness.report_gather_s = REPORT_GATHER_S
    harness.lead()
    harness.advance(1)
    harness.proposed.clear()
    return harness


def proposed(harness: CronHarness) -> list[str | None]:
    """The operations that were proposed since."""
    return [command.WhichOneof("operation") for command in harness.proposed]


def test_a_report_waits_for_others_and_no_longer_than_said() -> None:
    """Two starts within the time are proposed in one instant, at the end of it."""
    harness = gathering(every_second(id="tick"), every_second(id="tock"))
    for order in harness.orders:
        harness.start(order)
        harness.advance(REPORT_GATHER_S / 4)
    assert proposed(harness) == []
    harness.advance(REPORT_GATHER_S / 2)
    assert proposed(harness) == ["start_launch", "start_launch"]


def test_a_run_that_ends_meanwhile_needs_one_command() -> None:
    """A start that was followed by its end is not committed by itself, and the end says when it began."""
    harness = gathering(every_second())
    harness.finish(harness.orders[0])
    harness.advance(REPORT_GATHER_S)
    assert proposed(harness) == ["finish_launch"]
    assert harness.launch(1).state is LaunchState.SUCCEEDED
    assert harness.launch(1).started_ms == harness.launch(1).scheduled_at_ms
    assert [receipt.refusal for receipt in harness.receipts] == [""]


def test_a_decision_takes_reports_along() -> None:
    """What has gathered when a launch is committed leaves with it."""
    harness = gathering(every_second(overlap=OverlapPolicy.ALLOW))
    harness.advance(1 - REPORT_GATHER_S / 2)
    harness.start(harness.orders[0])
    harness.advance(REPORT_GATHER_S / 2)
    assert proposed(harness) == ["commit_launch", "start_launch"]


@pytest.mark.parametrize("overlap", [OverlapPolicy.SKIP, OverlapPolicy.QUEUE, OverlapPolicy.CANCEL_PREVIOUS])
def test_a_result_that_is_known_is_in_nobodys_way(overlap: OverlapPolicy) -> None:
    """A run that ended right before the next time, and is not committed as ended yet, does not make it skipped."""
    harness = gathering(every_second(overlap=overlap))
    harness.advance(1 - REPORT_GATHER_S / 2)
    harness.finish(harness.orders[0])
    harness.advance(REPORT_GATHER_S / 2)
    assert proposed(harness) == []
    harness.advance(REPORT_GATHER_S)
    assert proposed(harness) == ["finish_launch", "commit_launch"]
    assert harness.story() == [(1, "SUCCEEDED"), (2, "COMMITTED")]


def test_a_result_whose_proposal_fails_is_waited_for() -> None:
    """The time that is due stays held up until the result is committed after all, and is then decided."""
    harness = gathering(every_second(overlap=OverlapPolicy.SKIP))
    harness.hold = True
    harness.advance(1 - REPORT_GATHER_S / 2)
    harness.finish(harness.orders[0])
    harness.advance(REPORT_GATHER_S)
    harness.release(lose=True)
    harness.hold = False
    harness.advance(1.5)
    assert harness.story()[:2] == [(1, "SUCCEEDED"), (2, "COMMITTED")]


def test_a_result_that_no_longer_counts_ends_the_wait() -> None:
    """When the launch was lost before its result was committed, the time that is due is decided by the state."""
    harness = gathering(every_second(overlap=OverlapPolicy.SKIP))
    harness.advance(1 - REPORT_GATHER_S / 2)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    harness.advance(REPORT_GATHER_S / 2)
    harness.expire("w1")
    harness.advance(1)
    assert (2, "COMMITTED") in harness.story()
