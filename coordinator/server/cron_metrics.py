"""What a master tells Prometheus about cron. Names, without the prefix `coordinator_`:

    cron_launch_lateness_seconds  histogram  scheduled launches: from when each was due to the start of its first run
    cron_launches_ended_total     counter    launches that ended, by `state`; missed and skipped ones never ran, and one
                                             record of them may stand for many (it says so)
    cron_retries_total            counter    attempts that followed another one, by how that ended (`after`)
    cron_declines_total           counter    attempts that their worker declined, mostly for want of a free slot
    cron_running                  gauge      launches on a worker: running, or ordered and not confirmed
    cron_waiting                  gauge      launches that wait for an earlier run, a retry's pause, their turn, or
                                             a worker with a free slot
    launches                      gauge      launches that are kept, by `state`; from every master

All but the last come from the master that leads, and from it alone, so that sums over the masters are right: what is
committed is counted by the master that leads while it is applied, never by two. What is applied while nobody leads, or
before a new leader is ready, is in no counter; the history has all of it. Counters begin at 0 when a master starts.

A start has the time of the worker's clock. Worth an alert: an increase of cron_launches_ended_total with the states
missed or lost; the 99th percentile of cron_launch_lateness_seconds above what jobs can bear; cron_waiting that grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from coordinator.machine.state import LaunchChanged, State, Transition
from coordinator.model import Launch, LaunchState, LaunchTrigger

PREFIX = "coordinator_"
LATENESS_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 3_600.0),
)
"""Up to 20 ms is what a steady cluster needs; the rest is failovers, queues and catch-up."""
RETRIED = (LaunchState.LOST, LaunchState.FAILED, LaunchState.TIMED_OUT)


class CronMetrics(Collector):
    """The figures of cron at one master."""

    def __init__(
        self, registry: CollectorRegistry, state: Callable[[], State], is_leading: Callable[[], bool]
    ) -> None:
        """`is_leading` is true from when this master's controllers run until its leadership ends."""
        self._state = state
        self._is_leading = is_leading
        self._lateness = Histogram(
            f"{PREFIX}cron_launch_lateness_seconds",
            "From when a scheduled launch was due to the start of its first process, in seconds.",
            buckets=LATENESS_SECONDS,
            registry=registry,
        )
        self._ended = Counter(
            f"{PREFIX}cron_launches_ended",
            "Launches that ended while this master led, by how.",
            ("state",),
            registry=registry,
        )
        self._retries = Counter(
            f"{PREFIX}cron_retries",
            "Attempts that followed another one while this master led, by how that one ended.",
            ("after",),
            registry=registry,
        )
        self._declines = Counter(
            f"{PREFIX}cron_declines",
            "Attempts that their worker declined while this master led.",
            registry=registry,
        )
        # A state that nothing has ended in is 0, not absent: so the first one is an increase.
        for state_ in LaunchState:
            if state_.has_ended:
                self._ended.labels(state_.name.lower())
        for state_ in RETRIED:
            self._retries.labels(state_.name.lower())
        registry.register(self)

    def on_transition(self, transition: Transition) -> None:
        """Counts what an applied entry did to launches, if this master leads."""
        if not self._is_leading():
            return
        for change in transition.changes:
            if isinstance(change, LaunchChanged):
                self._count(change.before, change.after)

    def _count(self, before: Launch | None, after: Launch) -> None:
        lateness_ms = after.lateness_ms
        has_just_started = lateness_ms is not None and (before is None or before.lateness_ms is None)
        if has_just_started and lateness_ms is not None and after.trigger is LaunchTrigger.SCHEDULE:
            # Below 0 when the worker's clock is behind the leader's.
            self._lateness.observe(max(0, lateness_ms) / 1_000)
        if after.state.has_ended and (before is None or not before.state.has_ended):
            self._ended.labels(after.state.name.lower()).inc()
        if before is None:
            return
        if before.state is LaunchState.COMMITTED and not after.state.has_ended and _is_declined(before, after):
            self._declines.inc()
        # The first attempt after one that counted: what is declined does not make it another retry.
        last = after.earlier_attempts[-1] if after.earlier_attempts else None
        if last is not None and after.attempt > before.attempt and last.attempt == after.attempt - 1:
            self._retries.labels(last.state.name.lower()).inc()

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the registry would collect once just to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """What is read when Prometheus asks."""
        launches = self._state().launch_counts
        by_state = GaugeMetricFamily(f"{PREFIX}launches", "Launches that are kept, by state.", labels=("state",))
        for state in LaunchState:
            by_state.add_metric((state.name.lower(),), launches.get(state, 0))
        yield by_state
        if self._is_leading():
            running = launches.get(LaunchState.RUNNING, 0) + launches.get(LaunchState.COMMITTED, 0)
            yield GaugeMetricFamily(f"{PREFIX}cron_running", "Launches on a worker.", value=running)
            waiting = launches.get(LaunchState.WAITING, 0)
            yield GaugeMetricFamily(f"{PREFIX}cron_waiting", "Launches that wait.", value=waiting)


def _is_declined(before: Launch, after: Launch) -> bool:
    """True when an attempt is over and is filed nowhere."""
    is_over = after.attempt > before.attempt or after.state is LaunchState.WAITING
    return is_over and after.earlier_attempts == before.earlier_attempts
