"""What a master counts of launches, and when."""

from __future__ import annotations

import pytest
from immutables import Map
from prometheus_client import CollectorRegistry

from coordinator.api.v1 import command_pb2
from coordinator.machine.snapshot import launch_counts
from coordinator.machine.state import LaunchChanged, State, Transition
from coordinator.model import Launch, LaunchAttempt, LaunchState, LaunchTrigger, WallMs
from coordinator.server.cron_metrics import CronMetrics

DUE_MS = WallMs(1_700_000_000_000)


class Counted:
    """The metrics of a master whose leadership the test decides on."""

    def __init__(self, *, leads: bool = True) -> None:
        self.leads = leads
        self.state = State()
        self.registry = CollectorRegistry()
        self.metrics = CronMetrics(self.registry, lambda: self.state, lambda: self.leads)

    def see(self, *states: Launch) -> None:
        """A launch goes through states, the first from nothing."""
        before = None
        for after in states:
            launches = self.state.launches.set(after.key, after)
            self.state = State(launches=launches, launch_counts=Map(launch_counts(launches.values())))
            change = LaunchChanged(before, after)
            self.metrics.on_transition(Transition(self.state, command_pb2.CommandResult(), (change,)))
            before = after

    def value(self, name: str, **labels: str) -> float | None:
        """A sample; None where there is none."""
        return self.registry.get_sample_value(f"coordinator_{name}", labels)


def launch(
    state: LaunchState, *, attempt: int = 1, started_ms: int = 0, earlier: tuple[LaunchAttempt, ...] = ()
) -> Launch:
    """A launch that was due 100 ms after its scheduled time."""
    return Launch(
        job_id="tick",
        scheduled_at_ms=WallMs(DUE_MS - 100),
        due_ms=DUE_MS,
        attempt=attempt,
        worker="w1",
        state=state,
        started_ms=WallMs(started_ms),
        earlier_attempts=earlier,
    )


COMMITTED, RUNNING, SUCCEEDED = LaunchState.COMMITTED, LaunchState.RUNNING, LaunchState.SUCCEEDED


def test_a_launch_is_counted_once_as_it_starts_and_once_as_it_ends() -> None:
    """Lateness counts from when it was due, once, also where the start is only known from the end; so does the end."""
    counted = Counted()
    counted.see(launch(COMMITTED), launch(RUNNING, started_ms=DUE_MS + 15), launch(SUCCEEDED, started_ms=DUE_MS + 15))
    assert counted.value("cron_launch_lateness_seconds_count") == 1
    assert counted.value("cron_launch_lateness_seconds_sum") == pytest.approx(0.015)
    assert counted.value("cron_launch_lateness_seconds_bucket", le="0.02") == 1
    assert counted.value("cron_launch_lateness_seconds_bucket", le="0.01") == 0
    counted.see(launch(COMMITTED), launch(SUCCEEDED, started_ms=DUE_MS - 5))
    assert counted.value("cron_launch_lateness_seconds_count") == 2
    assert counted.value("cron_launches_ended_total", state="succeeded") == 2
    assert counted.value("cron_launches_ended_total", state="missed") == 0


def test_retries_are_told_by_what_they_follow() -> None:
    """A second attempt is one retry and no second lateness, whether it waited or not; the launch ends once."""
    counted = Counted()
    lost = (LaunchAttempt(1, "w1", LaunchState.LOST, started_ms=WallMs(DUE_MS + 2)),)
    counted.see(
        launch(COMMITTED),
        launch(RUNNING, started_ms=DUE_MS + 2),
        launch(LaunchState.WAITING, earlier=lost),
        launch(COMMITTED, attempt=2, earlier=lost),
        launch(RUNNING, attempt=2, started_ms=DUE_MS + 9_000, earlier=lost),
        launch(LaunchState.FAILED, attempt=2, started_ms=DUE_MS + 9_000, earlier=lost),
    )
    never_started = (LaunchAttempt(1, "w1", LaunchState.LOST),)
    counted.see(launch(COMMITTED), launch(COMMITTED, attempt=2, earlier=never_started))
    assert counted.value("cron_retries_total", after="lost") == 2
    assert counted.value("cron_retries_total", after="failed") == 0
    assert counted.value("cron_launch_lateness_seconds_count") == 1
    assert counted.value("cron_launches_ended_total", state="failed") == 1
    assert counted.value("cron_launches_ended_total", state="lost") == 0


def test_the_first_attempt_of_one_that_waited_is_no_retry() -> None:
    """A launch that waited for its turn goes from attempt 0 to 1; one by hand has no lateness."""
    counted = Counted()
    counted.see(launch(LaunchState.WAITING, attempt=0), launch(COMMITTED), launch(RUNNING, started_ms=DUE_MS + 1))
    assert counted.value("cron_retries_total", after="lost") == 0
    by_hand = Launch(
        "tick", WallMs(DUE_MS + 1), state=RUNNING, trigger=LaunchTrigger.MANUAL, started_ms=WallMs(DUE_MS + 900)
    )
    counted.see(by_hand)
    assert counted.value("cron_launch_lateness_seconds_count") == 1


def test_declines_are_no_retries() -> None:
    """An attempt that was declined is a decline, whether the next one is on its way or waits; a loss is none."""
    counted = Counted()
    waiting = launch(LaunchState.WAITING, attempt=2)
    counted.see(launch(COMMITTED), launch(COMMITTED, attempt=2), waiting, launch(COMMITTED, attempt=3))
    assert counted.value("cron_declines_total") == 2
    lost = (LaunchAttempt(1, "w1", LaunchState.LOST),)
    again = launch(COMMITTED, attempt=2, earlier=lost)
    counted.see(launch(COMMITTED), again, launch(COMMITTED, attempt=3, earlier=lost))
    assert counted.value("cron_declines_total") == 3
    assert counted.value("cron_retries_total", after="lost") == 1


def test_only_the_leader_counts() -> None:
    """A follower shows what is kept by state, but no gauge and no count of its own; a leader shows all."""
    counted = Counted(leads=False)
    counted.see(launch(COMMITTED), launch(RUNNING, started_ms=DUE_MS))
    assert counted.value("cron_launch_lateness_seconds_count") == 0
    assert counted.value("cron_running") is None
    assert counted.value("launches", state="running") == 1
    counted.leads = True
    assert counted.value("cron_running") == 1
    assert counted.value("cron_waiting") == 0


def test_a_scrape_does_not_look_at_the_launches() -> None:
    """What a scrape costs does not grow with the launches that are kept: it reads the counts that the machine keeps."""
    counted = Counted()
    counted.state = State(launches=None, launch_counts=Map({RUNNING: 2, SUCCEEDED: 100_000}))  # type: ignore[arg-type]
    assert counted.value("launches", state="succeeded") == 100_000
    assert counted.value("launches", state="lost") == 0
    assert counted.value("cron_running") == 2
