"""Whole lives of a cluster of masters, each decided by one seed: faults of every kind, then everything must be right.

The worlds are raft_world.py's, what is checked is raft_checks.py's. One seed, with its story when it fails:
`SIM_SEED=4711 tools/test tests/sim/test_raft_seeds.py -k test_seed`. As many as said, from SIM_FIRST on:
`SIM_SEEDS=5000 tools/test -m campaign -k raft`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from coordinator.raft.consensus import Consensus
from coordinator.raft.elections import Elections
from coordinator.raft.journal import Journal
from tests.sim.raft_disk import DiskFile
from tests.sim.raft_net import SimLinks
from tests.sim.raft_world import SeedFailed, run_seed

SEEDS = 200
ONE = os.environ.get("SIM_SEED")


@pytest.mark.parametrize("seed", [int(ONE)] if ONE else range(SEEDS))
def test_seed(seed: int) -> None:
    """Three or five masters with their clients through seconds of faults: safe at every step, whole and live after."""
    run_seed(seed)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_raft_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    """As many seeds as SIM_SEEDS says, beyond those of the suite."""
    first, count = int(os.environ.get("SIM_FIRST", SEEDS)), int(os.environ.get("SIM_SEEDS", "5000"))
    failures: list[str] = []
    for seed in range(first, first + count):
        try:
            run_seed(seed)
        except SeedFailed as failure:
            failures.append(str(failure))
        if (seed - first) % 100 == 99:
            with capsys.disabled():
                sys.stdout.write(f"{seed - first + 1} of {count} seeds, {len(failures)} failed\n")
                sys.stdout.flush()
    assert not failures, f"{len(failures)} of {count} seeds failed:\n" + "\n\n".join(failures[:20])


def test_the_seeds_reach_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among a few seeds are snapshots installed, logs cut, power cuts, lost disks, hand-overs, connections given up."""
    seen: Counter[str] = Counter()
    watched: list[tuple[type, str]] = [
        (Consensus, "transfer"),
        (Elections, "take_pre_vote"),
        (Journal, "_truncate"),
        (Journal, "clear"),
        (DiskFile, "lose_power"),
        (SimLinks, "closed"),
    ]
    for owner, name in watched:
        _count(monkeypatch, seen, owner, name)
    worlds = [run_seed(seed) for seed in range(30)]
    assert all(seen[name] >= 3 for _, name in watched), seen
    assert {len(world.masters) for world in worlds} == {3, 5}
    assert sum(len(world.checks.leader_of_term) for world in worlds) > 60
    assert sum(world.operator.replaced for world in worlds) >= 3
    assert sum(len(world.ledger.acknowledged) for world in worlds) > 500


def _count(monkeypatch: pytest.MonkeyPatch, seen: Counter[str], owner: type, name: str) -> None:
    real = getattr(owner, name)

    def counting(*arguments: Any, **keywords: Any) -> Any:
        seen[name] += 1
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counting)


def fingerprint(seed: int) -> str:
    """Everything that a run did, in one line."""
    world = run_seed(seed)
    log = sorted(world.checks.committed.items())
    story = [*world.trace, *map(str, world.ledger.history), str(world.events), str(log)]
    return hashlib.sha256("\n".join(story).encode()).hexdigest()


def test_a_seed_decides_everything() -> None:
    """Two processes with other hash seeds, so with other orders of every set, play the same seed to the last event."""
    code = "import sys; from tests.sim.test_raft_seeds import fingerprint; sys.stdout.write(fingerprint(7))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(found) == 1
