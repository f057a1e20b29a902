"""kill -9 of a worker that takes writes: how long its keys take none, and whether an acknowledged write is lost.

Ours at default settings and at the fast ones of cluster.toml, with three workers; Redis Cluster with three masters,
their replicas, and `cluster-node-timeout` 5000. All the while writes to all keys are sent on a timetable. Quarantine is
off: a shard that loses its primaries again and again is what it is for.

- `worker_failover_s`: from the kill to the first acknowledged write of a key that the killed process had, and to the
  time when every watched key (each of another part of the data) has had one. Writes of ours are those of the client
  that everybody uses; to Redis they are sent straight to the survivors, so it is not charged for its client.
- `lost_writes`: acknowledged ones that are not there at the end; `failed_requests`: of the timetable, which are not
  repeated by hand.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coordinator.config import ClusterConfig
from tools.bench_lib.redis_cluster import RedisSystem
from tools.bench_lib.result import Emit, Params, emit_quantiles
from tools.bench_lib.state_load import Ledger, Timetable, fill, read_all, value_of
from tools.bench_lib.state_systems import FailingSystem, NotAcknowledged, OurSystem, Store, close_all
from tools.lib.debian_package import PackageError

NODE_TIMEOUT_MS = 5_000
WATCHED = 8
SETTLE_S = 1.0
FIRST_WRITE_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    numbers: int = 20_000
    writes_per_s: float = 100.0
    faults: int = 10


QUICK = Size(numbers=2_000, writes_per_s=50.0, faults=2)


def default(config: ClusterConfig) -> ClusterConfig:
    """Default settings, for workers that are killed in turn."""
    return replace(config, moves=replace(config.moves, quarantine_workers=0))


def fast(config: ClusterConfig) -> ClusterConfig:
    """The fast setting that cluster.toml documents."""
    return replace(
        config,
        session=replace(config.session, heartbeat_s=0.2, suspect_s=0.6),
        state=replace(config.state, replica_lease_s=0.5, lagging_s=0.5),
    )


def run(emit: Emit, size: Size | None = None) -> None:
    """Measures everything; about eight minutes."""
    cases: list[tuple[Callable[[Path], FailingSystem], Params]] = [
        (partial(OurSystem, change=default), {"setting": "default"}),
        (partial(OurSystem, change=lambda config: default(fast(config))), {"setting": "fast"}),
        (partial(RedisSystem, node_timeout_ms=NODE_TIMEOUT_MS), {"setting": f"node timeout {NODE_TIMEOUT_MS} ms"}),
    ]
    for make, params in cases:
        with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
            try:
                system = make(Path(directory))
            except PackageError as error:
                print(f"tools/bench: Redis is left out: {error}", file=sys.stderr)
                continue
            try:
                system.start()
                asyncio.run(_measure(emit, system, params, size or Size()))
            finally:
                system.close()


def run_quick(emit: Emit) -> None:
    """Measures everything with two faults each, in about two minutes."""
    run(emit, QUICK)


async def _measure(emit: Emit, system: FailingSystem, params: Params, size: Size) -> None:
    store, ledger = system.store(), Ledger()
    recoveries: list[list[float]] = []
    try:
        await fill(store, ledger, size.numbers)
        async with Timetable(store, ledger, size.numbers, size.writes_per_s) as timetable:
            for _ in range(size.faults):
                await asyncio.sleep(SETTLE_S)
                await asyncio.to_thread(system.wait_whole)
                recoveries.append(await _recover(system, size))
        firsts, lasts = [min(times) for times in recoveries], [max(times) for times in recoveries]
        emit_quantiles(emit, system.name, "worker_failover_s", "s", {**params, "until": "first write"}, firsts)
        emit_quantiles(emit, system.name, "worker_failover_s", "s", {**params, "until": "all keys"}, lasts)
        failed = [outcome.problem for outcome in timetable.outcomes if outcome.problem]
        emit(system.name, "failed_requests", len(failed), "1", params)
        for problem, count in Counter(failed).most_common(3):
            print(f"tools/bench: {system.name}: {count} writes failed: {problem}", file=sys.stderr)
        lost = ledger.lost(await read_all(store, size.numbers))
        emit(system.name, "lost_writes", lost, "1", params)
    finally:
        await store.close()


async def _recover(system: FailingSystem, size: Size) -> list[float]:
    """Kills one, and brings it back: seconds until each watched key had a write."""
    victim = await asyncio.to_thread(system.victim)
    # Numbers beyond those that the ledger knows.
    beyond = range(size.numbers, size.numbers + 10 * 400, 10)
    held = await asyncio.to_thread(system.held_by, victim, beyond)
    if not held:
        raise RuntimeError(f"{victim} of {system.name} takes no writes")
    watched = held[:: max(1, len(held) // WATCHED)][:WATCHED]
    stores = [system.store() for _ in watched]
    try:
        for number, store in zip(watched, stores, strict=True):
            await _warm(store, number)
        begun_s = time.perf_counter()
        system.kill(victim)
        async with asyncio.timeout(FIRST_WRITE_S_MAX):
            return await asyncio.gather(
                *(_first_write(system, store, number, begun_s) for number, store in zip(watched, stores, strict=True))
            )
    finally:
        await close_all(stores)
        await asyncio.to_thread(system.bring_back, victim)


async def _warm(store: Store, number: int) -> None:
    """Lets a client know its way."""
    try:
        await store.put(number, value_of(0))
    except NotAcknowledged as error:
        raise RuntimeError(f"a write before the kill failed: {error}") from None


async def _first_write(system: FailingSystem, store: Store, number: int, begun_s: float) -> float:
    await system.first_write(store, number, value_of(0))
    return time.perf_counter() - begun_s
