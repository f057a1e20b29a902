"""Whole lives of replicated shards, each decided by one seed: faults of every kind, then everything must be right.

The worlds, and what is checked in them, are replica_world.py's. One seed, with its story when it fails:
`SIM_SEED=4711 tools/test tests/sim/test_replica_seeds.py -k test_seed`. As many as said, from SIM_FIRST on:
`SIM_SEEDS=5000 tools/test -m campaign -k replica`.

`WITHOUT` shows what each protection is for: without it some seed of a short list fails, with it all of them pass. Each
has a plan of its own, with the faults that matter to it and no others, so that few seeds are needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest

from tests.sim.replica_faults import Plan
from tests.sim.replica_world import run_seed
from tests.sim.seeds import SeedFailed, assert_decides_everything, digest, of_the_suite, play_campaign
from worker_agent.replica_core import Protections


@dataclass(frozen=True, slots=True)
class Reached:
    """What a seed is for."""

    counts: Counter[str]
    shards: int
    acknowledged: int
    changes: int


@cache
def reached(seed: int) -> Reached:
    """Plays a seed. Kept, as two tests ask for the first ones."""
    world = run_seed(seed)
    return Reached(world.checks.counts, world.plan.shards, len(world.ledger.acknowledged), world.master.changes)


def test_the_seeds_reach_what_they_are_for() -> None:
    """Among a few seeds are cutovers, transfers, seals, replicas that lag, and many writes through all of them."""
    each = [reached(seed) for seed in range(30)]
    counts = sum((one.counts for one in each), Counter[str]())
    assert all(counts[name] >= 5 for name in ("ceded move", "ceded transfer", "ceded seal", "lagging")), counts
    assert {one.shards for one in each} == {1, 2, 3}
    assert sum(one.acknowledged for one in each) > 2_000
    assert sum(one.changes for one in each) > 300


@pytest.mark.parametrize("seed", of_the_suite())
def test_seed(seed: int) -> None:
    """Shards with their clients through seconds of faults: right at every step, whole, equal and complete after."""
    reached(seed)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_replica_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    """As many seeds as SIM_SEEDS says, beyond those of the suite."""
    play_campaign(run_seed, 5_000, capsys)


def fingerprint(seed: int) -> str:
    """Everything that a run did, in one line."""
    world = run_seed(seed)
    story = [*world.trace, *map(str, world.ledger.history()), str(world.events), str(sorted(world.checks.committed))]
    return digest(story)


def test_a_seed_decides_everything() -> None:
    """Two processes with other hash seeds, so with other orders of every set, play the same seed to the last event."""
    assert_decides_everything(7, fingerprint)


@dataclass(frozen=True, slots=True)
class Row:
    """A protection less, the faults that this does not stand, and how many seeds it may stand them."""

    protections: Protections
    plan: Plan
    seeds: int
    findings: tuple[str, ...]
    """What a failure says, one of them."""


STALE = ("may both answer", "not linearizable", "s old there and has applied")
LOST = (*STALE[1:], "another one applied", "acknowledged at", "whole within", "equal within", "was applied")
WITHOUT = {
    "wait_for_own_promise": Row(
        Protections(waits_out_promise=False),
        Plan(seconds=4.0, fault_every_s=0.5, kinds=("suspect", "cut_off"), think_s=0.02),
        20,
        STALE,
    ),
    "needs_before_report": Row(
        Protections(needs_before_report=False),
        Plan(seconds=6.0, fault_every_s=0.15, kinds=("move", "suspect", "slow_net", "hole"), think_s=0.01, clients=5),
        60,
        (*LOST, *STALE),
    ),
    "lease_before_answering": Row(
        Protections(checks_lease=False),
        Plan(seconds=5.0, fault_every_s=0.3, kinds=("depose",), think_s=0.02),
        20,
        STALE,
    ),
    "truncation_of_conflicts": Row(
        Protections(truncates_conflicts=False),
        Plan(workers=4, replicas=3, seconds=6.0, fault_every_s=0.2, kinds=("hole", "suspect", "isolate"), think_s=0.01),
        60,
        LOST,
    ),
    "epoch_on_disk": Row(
        Protections(persists_epoch=False),
        Plan(workers=3, seconds=6.0, fault_every_s=3.0, kinds=("amnesia",), think_s=0.1, clients=4),
        20,
        (*LOST, *STALE),
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_it_a_seed_fails(name: str) -> None:
    """Each protection is needed: one of a few seeds fails without it, in the way that it is for, and passes with it."""
    row = WITHOUT[name]
    for seed in range(row.seeds):
        try:
            run_seed(seed, row.plan, row.protections)
        except SeedFailed as failure:
            first = str(failure).partition("\n")[0]
            if any(finding in first for finding in row.findings):
                run_seed(seed, row.plan)
                return
    raise AssertionError(f"{row.seeds} seeds do without {name}")
