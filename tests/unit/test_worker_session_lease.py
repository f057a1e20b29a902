"""What becomes of launches with the session lease: lists of actions, at times that the tests make up."""

from __future__ import annotations

from coordinator.api.v1 import session_pb2
from coordinator.model import Monotonic
from tests.unit.test_worker_session import LEASE_ENDED, LEASE_S, Driver, order
from worker_agent.session_interface import Action, EndRuns, Launch, StopLaunch, StreamOpened
from worker_agent.session_lease import SessionLease


def wake_until(driver: Driver, end: Monotonic) -> list[tuple[float, Action]]:
    """What the machine does until then, woken as it asks, with every dial failing; with the times."""
    done: list[tuple[float, Action]] = []
    while driver.step.next_wake is not None and driver.step.next_wake <= end:
        done += [(driver.now, action) for action in driver.wake()]
    return done


def test_runs_end_with_the_lease_whoever_is_silent() -> None:
    """With a silent leader, and then no master at all, the runs end when the lease does, to the moment, and once."""
    driver = Driver()
    driver.open()
    driver.grant(1)
    until = driver.session.lease_until
    done = wake_until(driver, Monotonic(until + 3 * LEASE_S))
    assert [(at, action) for at, action in done if isinstance(action, EndRuns)] == [(until, LEASE_ENDED)]


def test_a_paused_worker_hears_first_that_its_runs_end() -> None:
    """Whatever event wakes a process that stood still, the end of the lease comes before what it leads to."""
    driver = Driver()
    driver.open()
    driver.grant(1)
    driver.now = Monotonic(driver.now + 2 * LEASE_S)
    assert driver.say(launch_order=order("loop_01")) == (LEASE_ENDED,)
    # The order waits: a lease that is earned now lets it run.
    sent = driver.wait(0.0)
    assert LEASE_ENDED not in sent
    assert driver.grant(2) == (Launch(order("loop_01")),)


def test_every_lease_ends_once() -> None:
    """A lease that is renewed in time ends nothing; after its end a new one is earned, and ends too."""
    driver = Driver()
    driver.open()
    for sequence in range(1, 40):
        assert driver.grant(sequence) == ()
        assert not any(isinstance(action, EndRuns) for action in driver.wake())
    first = wake_until(driver, Monotonic(driver.now + 2 * LEASE_S))
    assert [action for _, action in first].count(LEASE_ENDED) == 1
    driver.feed(StreamOpened(driver.stream))
    driver.welcome()
    driver.grant(1)
    assert driver.session.has_lease(driver.now)
    second = wake_until(driver, Monotonic(driver.now + 2 * LEASE_S))
    assert [action for _, action in second].count(LEASE_ENDED) == 1


def test_a_grant_that_comes_too_late_gives_nothing_to_end() -> None:
    """A grant for a heartbeat of long ago earns no lease, so its end is none."""
    lease = SessionLease()
    lease.renew(Monotonic(100.0), Monotonic(80.0), LEASE_S)
    assert not lease.holds(Monotonic(100.0))
    assert not lease.has_just_ended(Monotonic(100.0))
    assert lease.first(Monotonic(101.0)) == 101.0


def test_a_stop_needs_no_lease() -> None:
    """To stop a launch is always right, so it is done before the first grant, and while an order waits for it."""
    driver = Driver()
    driver.open()
    stop = session_pb2.LaunchStop(token=session_pb2.LaunchToken(job_id="loop_01", attempt=1), reason="by hand")
    assert driver.say(launch_order=order("loop_01")) == ()
    assert driver.say(launch_stop=stop) == (StopLaunch(stop),)
    assert driver.grant(1) == (Launch(order("loop_01")),)
    assert driver.say(launch_stop=stop) == (StopLaunch(stop),)
