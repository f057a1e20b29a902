"""Whole lives of a whole cluster, each decided by one seed: masters, workers, shards and clients through all faults.

The worlds are cluster_world.py's: 3 masters, 5 workers, 16 shards that are moved, cut and joined all the time. One
seed, with its story when it fails: `SIM_SEED=4711 tools/test tests/sim/test_cluster_seeds.py -k test_seed`. As many as
said, from SIM_FIRST on: `SIM_SEEDS=2000 tools/test -m campaign -k cluster`.

`WITHOUT` shows that the checks see: without each of these protections some seed of a short list fails, in the way that
it is for, and with it the same seed passes. Those of the replica machine are tried one by one in test_replica_seeds.py,
those of the consensus in test_raft_mutations.py; here are those that lie between the parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest

from coordinator.api.v1 import command_pb2
from coordinator.control.moves import MoveControl
from coordinator.model import Move, MovePhase, Shard
from tests.sim import raft_faults, replica_faults
from tests.sim.cluster_faults import TIMES, Plan
from tests.sim.cluster_world import RESTORED_S_MAX, run_seed
from tests.sim.seeds import SeedFailed, assert_decides_everything, digest, of_the_suite, play_campaign
from worker_agent.replica_core import Protections


@dataclass(frozen=True, slots=True)
class Reached:
    """What a seed is for."""

    counts: Counter[str]
    terms: int
    acknowledged: int
    restored_s: float


@cache
def reached(seed: int) -> Reached:
    """Plays a seed. Kept, as two tests ask for the first ones."""
    world = run_seed(seed)
    counts = world.counts + world.workers.checks.counts
    terms, acknowledged = len(world.checks.leader_of_term), len(world.workers.ledger.acknowledged)
    return Reached(counts, terms, acknowledged, world.restored_s)


def test_the_seeds_reach_what_they_are_for() -> None:
    """Among a few seeds are moves, cuts, joins, drains, changes of leader, requests that wait and are passed on."""
    each = [reached(seed) for seed in range(20)]
    counts = sum((one.counts for one in each), Counter[str]())
    asked = ("start_move", "split_shard", "merge_shards", "drain_node", "undrain_node", "abort_move")
    assert all(counts[f"asked {name}"] >= 5 for name in asked), counts
    assert all(counts[name] >= 20 for name in ("held", "passed on", "lagging", "made of parents")), counts
    assert sum(one.terms for one in each) > 60
    assert sum(one.acknowledged for one in each) > 1_500
    assert max(one.restored_s for one in each) < RESTORED_S_MAX


@pytest.mark.parametrize("seed", of_the_suite())
def test_seed(seed: int) -> None:
    """A cluster with its clients through seconds of faults: right at every step, whole, equal and complete after."""
    reached(seed)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_cluster_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    """As many seeds as SIM_SEEDS says, beyond those of the suite."""
    play_campaign(run_seed, 2_000, capsys)


def fingerprint(seed: int) -> str:
    """Everything that a run did, in one line."""
    world = run_seed(seed)
    log = sorted(world.checks.committed.items())
    side = world.workers
    history = map(str, side.ledger.history())
    story = [*world.trace, *history, str(world.events), str(log), str(sorted(side.checks.committed))]
    return digest(story)


def test_a_seed_decides_everything() -> None:
    """Two processes with other hash seeds, so with other orders of every set, play the same seed to the last event."""
    assert_decides_everything(5, fingerprint)


@dataclass(frozen=True, slots=True)
class Row:
    """A protection less, the faults and changes that this does not stand, and how many seeds it may stand them."""

    findings: tuple[str, ...]
    """What a failure says, one of them."""
    worker_kinds: tuple[str, ...]
    changes: tuple[str, ...]
    fault_every_s: float = 0.5
    change_every_s: float = 0.1
    replicas: int = 2
    protections: Protections = Protections()  # noqa: RUF009 - frozen
    switch_off: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    """For what lies between the parts."""
    seeds: int = 12

    @property
    def plan(self) -> Plan:
        """Many writes to few shards, and no faults but these."""
        seconds = 5.0
        return Plan(
            masters=raft_faults.Plan(clients=0, drift=0.03),
            workers=replica_faults.Plan(
                workers=5, replicas=self.replicas, clients=8, seconds=seconds, think_s=0.005, drift=0.03, times=TIMES
            ),
            users=4,
            seconds=seconds,
            fault_every_s=self.fault_every_s,
            master_share=0.0,
            worker_kinds=self.worker_kinds,
            changes=self.changes,
            change_every_s=self.change_every_s,
        )


def _promote_by_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MoveControl._wanted

    def wanted(self: MoveControl, move: Move, shard: Shard, is_late: bool) -> command_pb2.Command | None:
        if move.phase is MovePhase.COPYING and self._reports.of(move.target, shard) is not None:
            promote = command_pb2.PromoteReplica(move_id=move.id, expected_epoch=shard.epoch)
            return command_pb2.Command(promote_replica=promote)
        return real(self, move, shard, is_late)

    monkeypatch.setattr(MoveControl, "_wanted", wanted)


def _cut_unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    def reshape(self: MoveControl, move: Move, is_late: bool) -> command_pb2.Command:
        epochs = [self._state.shards[shard_id].epoch for shard_id in move.shard_ids]
        return command_pb2.Command(reshape=command_pb2.Reshape(move_id=move.id, expected_epochs=epochs))

    monkeypatch.setattr(MoveControl, "_reshape", reshape)


WITHOUT = {
    "wait_for_own_promise": Row(
        findings=("may answer for shard",),
        worker_kinds=("no_master", "alone"),
        changes=("move",),
        protections=Protections(waits_out_promise=False),
    ),
    "lease_before_answering": Row(
        findings=("may answer for shard", "not linearizable"),
        worker_kinds=("alone",),
        changes=("weight",),
        fault_every_s=0.3,
        protections=Protections(checks_lease=False),
    ),
    "truncation_of_conflicts": Row(
        findings=("where another one applied", "not linearizable", "is not there", "acknowledged at"),
        worker_kinds=("alone", "isolate", "hole", "no_master"),
        changes=("transfer",),
        fault_every_s=0.2,
        replicas=3,
        protections=Protections(truncates_conflicts=False),
    ),
    "promotion_by_the_primary": Row(
        findings=("where another one applied", "not linearizable", "is not there", "not equal", "not whole"),
        worker_kinds=("kill", "slow_net"),
        changes=("move",),
        change_every_s=0.05,
        switch_off=_promote_by_own_word,
    ),
    "seal_before_a_cut": Row(
        findings=("of the parents of shard",),
        worker_kinds=("slow_net", "slow_disk"),
        changes=("split", "merge"),
        change_every_s=0.05,
        switch_off=_cut_unsealed,
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_it_a_seed_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each protection is needed: one of a few seeds fails without it, in the way that it is for, and passes with it."""
    row = WITHOUT[name]
    for seed in range(row.seeds):
        with monkeypatch.context() as switched:
            row.switch_off(switched)
            try:
                run_seed(seed, row.plan, row.protections)
                continue
            except SeedFailed as failure:
                first = str(failure).partition("\n")[0]
        if any(finding in first for finding in row.findings):
            run_seed(seed, row.plan)
            return
    raise AssertionError(f"{row.seeds} seeds do without {name}")
