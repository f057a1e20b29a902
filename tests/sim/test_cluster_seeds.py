"""Whole lives of a whole cluster, each decided by one seed: masters, workers, shards and clients through all faults.

The worlds are cluster_world.py's: 3 masters, 5 workers, 16 shards that are moved, cut and joined all the time. One
seed, with its story when it fails: `SIM_SEED=4711 tools/test tests/sim/test_cluster_seeds.py -k test_seed`. As many as
said, from SIM_FIRST on: `SIM_SEEDS=2000 tools/test -m campaign -k cluster`.

`WITHOUT` shows that the checks see: without each of these protections some seed of a short list fails, in the way that
it is for, and with it the same seed passes. Those of the replica machine are tried one by one in test_replica_seeds.py,
those of the consensus in test_raft_mutations.py; here are those that lie between the parts.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.sim.cluster_world import RESTORED_S_MAX, run_seed
from tests.sim.raft_world import SeedFailed

SEEDS = 200
ONE = os.environ.get("SIM_SEED")


@pytest.mark.parametrize("seed", [int(ONE)] if ONE else range(SEEDS))
def test_seed(seed: int) -> None:
    """A cluster with its clients through seconds of faults: right at every step, whole, equal and complete after."""
    run_seed(seed)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_cluster_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    """As many seeds as SIM_SEEDS says, beyond those of the suite."""
    first, count = int(os.environ.get("SIM_FIRST", SEEDS)), int(os.environ.get("SIM_SEEDS", "2000"))
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


def test_the_seeds_reach_what_they_are_for() -> None:
    """Among a few seeds are moves, cuts, joins, drains, changes of leader, requests that wait and are passed on."""
    worlds = [run_seed(seed) for seed in range(20)]
    counts = sum((world.counts + world.workers.checks.counts for world in worlds), Counter[str]())
    asked = ("start_move", "split_shard", "merge_shards", "drain_node", "undrain_node", "abort_move")
    assert all(counts[f"asked {name}"] >= 5 for name in asked), counts
    assert all(counts[name] >= 20 for name in ("held", "passed on", "lagging", "made of parents")), counts
    assert sum(len(world.checks.leader_of_term) for world in worlds) > 60
    assert sum(len(world.workers.ledger.acknowledged) for world in worlds) > 1_500
    assert max(world.restored_s for world in worlds) < RESTORED_S_MAX


def fingerprint(seed: int) -> str:
    """Everything that a run did, in one line."""
    world = run_seed(seed)
    log = sorted(world.checks.committed.items())
    side = world.workers
    history = map(str, side.ledger.history())
    story = [*world.trace, *history, str(world.events), str(log), str(sorted(side.checks.committed))]
    return hashlib.sha256("\n".join(story).encode()).hexdigest()


def test_a_seed_decides_everything() -> None:
    """Two processes with other hash seeds, so with other orders of every set, play the same seed to the last event."""
    code = "import sys; from tests.sim.test_cluster_seeds import fingerprint; sys.stdout.write(fingerprint(5))"
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
