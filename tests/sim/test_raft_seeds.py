"""Whole lives of a cluster of masters, each decided by one seed: faults of every kind, then everything must be right.

The worlds are raft_world.py's, what is checked is raft_checks.py's. One seed, with its story when it fails:
`SIM_SEED=4711 tools/test tests/sim/test_raft_seeds.py -k test_seed`. As many as said, from SIM_FIRST on:
`SIM_SEEDS=5000 tools/test -m campaign -k raft`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from coordinator.raft import RaftNode
from coordinator.raft.consensus import Consensus
from coordinator.raft.elections import Elections
from coordinator.raft.journal import Journal
from coordinator.raft.link import Link
from coordinator.raft.transport import PeerTransport
from tests.sim.raft_disk import DiskFile
from tests.sim.raft_world import run_seed
from tests.sim.seeds import assert_decides_everything, digest, of_the_suite, play_campaign

WATCHED: tuple[tuple[type, str], ...] = (
    (Consensus, "transfer"),
    (Elections, "take_pre_vote"),
    (Journal, "_truncate"),
    (Journal, "clear"),
    (DiskFile, "lose_power"),
    (PeerTransport, "ended"),
    (PeerTransport, "_abandon"),
    (Link, "cut"),
    (RaftNode, "stop"),
    (RaftNode, "_fail"),
)
"""Methods whose calls are counted."""


@dataclass(frozen=True, slots=True)
class Reached:
    """What a seed is for."""

    calls: Counter[str]
    masters: int
    terms: int
    disks_replaced: int
    acknowledged: int


@cache
def reached(seed: int) -> Reached:
    """Plays a seed. Kept, as two tests ask for the first ones."""
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for owner, name in WATCHED:
            _count(monkeypatch, calls, owner, name)
        world = run_seed(seed)
    terms, acknowledged = len(world.checks.leader_of_term), len(world.ledger.acknowledged)
    return Reached(calls, len(world.masters), terms, world.operator.replaced, acknowledged)


def _count(monkeypatch: pytest.MonkeyPatch, seen: Counter[str], owner: type, name: str) -> None:
    real = getattr(owner, name)

    def counting(*arguments: Any, **keywords: Any) -> Any:
        seen[name] += 1
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counting)


def test_the_seeds_reach_what_they_are_for() -> None:
    """A few seeds install snapshots, cut logs and power, lose disks, hand over, stop cleanly, give connections up."""
    each = [reached(seed) for seed in range(30)]
    calls = sum((one.calls for one in each), Counter[str]())
    assert all(calls[name] >= 3 for _, name in WATCHED), calls
    assert {one.masters for one in each} == {3, 5}
    assert sum(one.terms for one in each) > 60
    assert sum(one.disks_replaced for one in each) >= 3
    assert sum(one.acknowledged for one in each) > 500


@pytest.mark.parametrize("seed", of_the_suite())
def test_seed(seed: int) -> None:
    """Three or five masters with their clients through seconds of faults: safe at every step, whole and live after."""
    reached(seed)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_raft_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    """As many seeds as SIM_SEEDS says, beyond those of the suite."""
    play_campaign(run_seed, 5_000, capsys)


def fingerprint(seed: int) -> str:
    """Everything that a run did, in one line."""
    world = run_seed(seed)
    log = sorted(world.checks.committed.items())
    story = [*world.trace, *map(str, world.ledger.history), str(world.events), str(log)]
    return digest(story)


def test_a_seed_decides_everything() -> None:
    """Two processes with other hash seeds, so with other orders of every set, play the same seed to the last event."""
    assert_decides_everything(7, fingerprint)
