"""Cron launches under random faults of leaders, workers, proposals and clocks."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.machine.state import LaunchChanged
from coordinator.model import CatchUpPolicy, LaunchState, OverlapPolicy, RetryPolicy, WallMs
from tests.cron_harness import START_MS, CronHarness, every_second, report_of


def _leader_gap(harness: CronHarness, rng: random.Random, longest_s: float) -> None:
    """The leader dies: what it had proposed is applied or lost; another one leads after a while."""
    for propose in list(harness.held):
        if rng.random() < 0.5:
            harness.control = None
            harness.apply(propose.command)
    harness.control = None
    harness.clock.advance(rng.uniform(0, longest_s))
    harness.lead()


def _worker_fault(harness: CronHarness, rng: random.Random, incarnations: dict[str, int]) -> None:
    """A worker is not heard, expires, or is back as another process."""
    worker = rng.choice(("w1", "w2", "w3"))
    incarnation = str(incarnations[worker])
    node = harness.state.nodes[worker]
    if node.is_serving:
        harness.suspect(worker, incarnation)
    elif node.is_suspect and rng.random() < 0.5:
        harness.expire(worker, incarnation)
    else:
        incarnations[worker] += 1
        harness.open_session(worker)
        harness.add_worker(worker, incarnation=str(incarnations[worker]))


def _work(harness: CronHarness, rng: random.Random) -> None:
    """Workers start and finish some of what was ordered, at times twice or late."""
    for order in harness.orders[-20:]:
        if rng.random() < 0.5:
            harness.report(order.node_id, report_of(order.launch, LaunchState.RUNNING))
        if rng.random() < 0.3:
            harness.report(order.node_id, report_of(order.launch, LaunchState.SUCCEEDED))


def _settle(harness: CronHarness) -> None:
    harness.hold = False
    while harness.held:
        harness.release()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    overlap=st.sampled_from(OverlapPolicy),
    catch_up=st.sampled_from(CatchUpPolicy),
    retry=st.sampled_from(RetryPolicy),
    gap_s=st.sampled_from((2.0, 40.0)),
    start_deadline_s=st.sampled_from((5.0, 60.0)),
)
def test_every_second_has_exactly_one_record(
    seed: int,
    overlap: OverlapPolicy,
    catch_up: CatchUpPolicy,
    retry: RetryPolicy,
    gap_s: float,
    start_deadline_s: float,
) -> None:
    """Whatever dies, each scheduled second is decided once and in order, and with `never` is started at most once."""
    rng = random.Random(seed)
    spec = every_second(overlap=overlap, catch_up=catch_up, retry=retry, start_deadline_s=start_deadline_s)
    harness = CronHarness(spec)
    incarnations = {"w1": 1, "w2": 1, "w3": 1}
    decided: list[WallMs] = []
    harness.on_changes = lambda changes: decided.extend(
        change.after.scheduled_at_ms
        for change in changes
        if isinstance(change, LaunchChanged) and change.before is None
    )
    harness.lead()
    for _ in range(60):
        harness.hold = rng.random() < 0.3
        harness.advance(rng.uniform(0, 1.5))
        fault = rng.random()
        if fault < 0.08:
            _leader_gap(harness, rng, gap_s)
        elif fault < 0.2:
            _worker_fault(harness, rng, incarnations)
        elif fault < 0.25:
            harness.clock.step_wall(rng.uniform(-3, 3))
        if harness.held and rng.random() < 0.1:
            harness.release(lose=True)
        _settle(harness)
        _work(harness, rng)
    harness.advance(start_deadline_s + 2)
    _settle(harness)

    assert decided == [START_MS + 1_000 * second for second in range(1, len(decided) + 1)]
    assert harness.clock.wall_ms() - decided[-1] <= 5_000 + start_deadline_s * 1_000
    tokens = {(order.launch.key, order.launch.attempt): order.node_id for order in harness.orders}
    assert all(tokens[(order.launch.key, order.launch.attempt)] == order.node_id for order in harness.orders)
    if retry is RetryPolicy.NEVER:
        assert all(order.launch.attempt == 1 for order in harness.orders)
