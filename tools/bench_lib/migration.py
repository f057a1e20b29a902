"""Half of 200,000 values of 200 bytes goes to other processes while clients write; beside Redis Cluster's resharding.

Ours: two workers hold every shard; two more stand by with rebalancing paused. The clock runs from the resumption until
no move is left: then half of all copies are on the two new ones. Redis: three masters, each with a replica;
`redis-cli --cluster reshard` with its own settings moves half of the slots to one of them, and so to its replica.

- `keys_per_s`: values that went with both their copies, per second. Ours moves one copy of each, which counts half.
- `client_ms`: writes on a timetable, the same for both, from when each was due: before, and during the moves.
- `pause_ms`: ours only, and in runs of their own, whose puts would be load that Redis does not have: of every primary
  that was moved and watched, the longest that a put took which was sent while its move went on: no less than the
  cutover's pause. With `moves 1` the moves go one at a time, on a small cluster, which shows the cutovers by
  themselves; `moves many` are as many at once as the default settings let, all of them in want of the same cores.
- `failed_requests`, `lost_writes`: of all writes; lost are acknowledged ones that are not there afterwards.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.client import AsyncClusterClient
from coordinator.config import ClusterConfig, PlacementSettings
from tools.bench_lib.migration_pauses import PauseWatch
from tools.bench_lib.redis_cluster import SLOTS, RedisSystem
from tools.bench_lib.result import OURS, Emit, Params, emit_quantiles
from tools.bench_lib.state_load import Ledger, Outcome, Timetable, fill, read_all
from tools.bench_lib.state_systems import KEYS_PER_USER, OurSystem, Store, user_of
from tools.lib.debian_package import PackageError

WORKERS = 2
JOINING = ("w3", "w4")
DEFAULT_SHARDS = PlacementSettings().shards
FEW_SHARDS = 32
"""About as few as the users of 200,000 values allow (users_max)."""
SINGLE_SHARDS = 96
"""While moves go one at a time: half of them are primaries', each a sample."""
WATCH_USERS = 9_999
"""Among so many are some of every shard."""
POLL_S = 0.05
QUIET_S = 1.0
"""Nothing moves for so long: the moves are over."""
MOVES_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    numbers: int = 200_000
    writes_per_s: float = 200.0
    before_s: float = 10.0
    shards: tuple[int, ...] = (DEFAULT_SHARDS, FEW_SHARDS)
    """Ours, each in turn."""
    single_numbers: int = 20_000
    """Ours, while moves go one at a time."""


QUICK = Size(numbers=10_000, writes_per_s=100.0, before_s=3.0, shards=(FEW_SHARDS,), single_numbers=2_000)


def run(emit: Emit, size: Size | None = None) -> None:
    """Measures everything; about five minutes."""
    size = size or Size()
    for shards in size.shards:
        params: Params = {} if shards == DEFAULT_SHARDS else {"shards": shards}
        _run_ours(emit, size, params, lambda placement: placement, shards)
    watched = replace(size, writes_per_s=0.0, before_s=0.0)
    _run_ours(emit, watched, {"moves": "many"}, lambda placement: placement, FEW_SHARDS)
    single = replace(watched, numbers=size.single_numbers)
    _run_ours(emit, single, {"moves": 1}, _one_at_a_time, SINGLE_SHARDS)
    with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
        try:
            system = RedisSystem(Path(directory))
        except PackageError as error:
            print(f"tools/bench: Redis is left out: {error}", file=sys.stderr)
            return
        try:
            system.start()
            asyncio.run(_measure_redis(emit, system, size))
        finally:
            system.close()


def run_quick(emit: Emit) -> None:
    """Measures everything once, in about a minute; too little for the last percent of anything."""
    run(emit, QUICK)


def _one_at_a_time(placement: PlacementSettings) -> PlacementSettings:
    return replace(placement, moves_max=1, moves_in_max=1, moves_out_max=1)


def _run_ours(
    emit: Emit, size: Size, params: Params, change: Callable[[PlacementSettings], PlacementSettings], shards: int
) -> None:
    def changed(config: ClusterConfig) -> ClusterConfig:
        return replace(config, placement=change(replace(config.placement, shards=shards)))

    with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
        system = OurSystem(Path(directory), WORKERS, changed)
        try:
            system.start()
            with system.cluster.client() as client:
                client.change_settings(rebalance_paused=True)
            for worker in JOINING:
                system.cluster.add_worker(worker)
            system.wait_whole()
            asyncio.run(_measure_ours(emit, system, size, params))
        finally:
            system.close()


async def _measure_ours(emit: Emit, system: OurSystem, size: Size, params: Params) -> None:
    store, watching, ledger = system.store(), system.store(), Ledger()
    addresses = [master.grpc_address for master in system.cluster.config.masters]
    try:
        async with AsyncClusterClient(addresses, credentials=system.cluster.credentials()) as client:
            await fill(store, ledger, size.numbers)
            await asyncio.to_thread(system.wait_whole)
            # Behind the numbers that the ledger knows: the watch's users are its own.
            users = await _users_by_shard(client, size.numbers, WATCH_USERS)
            watch = PauseWatch(client, watching.client, users)
            async with Timetable(store, ledger, size.numbers, size.writes_per_s) as timetable:
                begin_s = time.perf_counter()
                await asyncio.sleep(size.before_s)
                moves_s = time.perf_counter()
                await client.change_settings(rebalance_paused=False)
                async with nullcontext() if size.writes_per_s else watch:
                    end_s = await _wait_moved(client)
            moved = await _copies_on(client, JOINING, size.numbers) / system.cluster.config.placement.replicas
            if size.writes_per_s:
                emit(OURS, "keys_per_s", moved / (end_s - moves_s), "1/s", params)
            _emit_clients(emit, OURS, params, timetable, begin_s, moves_s, end_s)
            if watch.pauses_ms:
                emit_quantiles(emit, OURS, "pause_ms", "ms", params, watch.pauses_ms)
            if not size.writes_per_s:
                emit(OURS, "failed_requests", len(watch.problems), "1", {**params, "of": "watch"})
            await _emit_lost(emit, OURS, params, store, ledger, size)
    finally:
        await store.close()
        await watching.close()


async def _wait_moved(client: AsyncClusterClient) -> float:
    """When the last move was over."""
    give_up_at_s = time.perf_counter() + MOVES_TIMEOUT_S
    quiet_since_s = 0.0
    has_moved = False
    while True:
        moves = (await client.list_moves()).moves
        now_s = time.perf_counter()
        if moves or not has_moved:
            has_moved = has_moved or bool(moves)
            quiet_since_s = 0.0
        elif not quiet_since_s:
            quiet_since_s = now_s
        elif now_s - quiet_since_s > QUIET_S:
            return quiet_since_s
        if now_s > give_up_at_s:
            raise RuntimeError(f"{len(moves)} moves are still going on after {MOVES_TIMEOUT_S:g} s")
        await asyncio.sleep(POLL_S)


async def _copies_on(client: AsyncClusterClient, workers: tuple[str, ...], numbers: int) -> int:
    """Copies of values that these workers have."""
    users = [user_of(number) for number in range(0, numbers, KEYS_PER_USER)]
    copies: Counter[str] = Counter()
    for first in range(0, len(users), 5_000):
        for place in (await client.locate_keys(users[first : first + 5_000])).locations:
            copies.update(place.in_sync)
    return KEYS_PER_USER * sum(copies[worker] for worker in workers)


async def _users_by_shard(client: AsyncClusterClient, first: int, count: int) -> dict[int, str]:
    """A user of every shard, as far as so many users reach."""
    users = [user_of(first + KEYS_PER_USER * number) for number in range(count)]
    return {place.shard_id: place.key for place in (await client.locate_keys(users)).locations}


async def _measure_redis(emit: Emit, system: RedisSystem, size: Size) -> None:
    store, ledger = system.store(), Ledger()
    try:
        await fill(store, ledger, size.numbers)
        masters = await asyncio.to_thread(system.masters)
        target = masters[-1]
        before = (await asyncio.to_thread(system.keys))[target.port]
        async with Timetable(store, ledger, size.numbers, size.writes_per_s) as timetable:
            begin_s = time.perf_counter()
            await asyncio.sleep(size.before_s)
            moves_s = time.perf_counter()
            await asyncio.to_thread(
                system.run_cli,
                *("--cluster", "reshard", f"127.0.0.1:{target.port}", "--cluster-yes"),
                *("--cluster-from", ",".join(node.id for node in masters[:-1])),
                *("--cluster-to", target.id, "--cluster-slots", str(SLOTS // 2)),
            )
            end_s = time.perf_counter()
        moved = (await asyncio.to_thread(system.keys))[target.port] - before
        emit(system.name, "keys_per_s", moved / (end_s - moves_s), "1/s", {})
        _emit_clients(emit, system.name, {}, timetable, begin_s, moves_s, end_s)
        await _emit_lost(emit, system.name, {}, store, ledger, size)
    finally:
        await store.close()


def _emit_clients(
    emit: Emit, name: str, params: Params, timetable: Timetable, begin_s: float, moves_s: float, end_s: float
) -> None:
    before, during = timetable.between(begin_s, moves_s), timetable.between(moves_s, end_s)
    for when, outcomes in (("before", before), ("during", during)):
        samples = [outcome.latency_ms for outcome in outcomes if not outcome.problem]
        if samples:
            emit_quantiles(emit, name, "client_ms", "ms", {**params, "when": when}, samples)
            emit(name, "client_ms", max(samples), "ms", {**params, "when": when, "of": "max"}, samples)
    failed: list[Outcome] = [outcome for outcome in timetable.outcomes if outcome.problem]
    emit(name, "failed_requests", len(failed), "1", {**params, "of": "clients"})
    for problem, count in Counter(outcome.problem for outcome in failed).most_common(3):
        print(f"tools/bench: {name}: {count} writes failed: {problem}", file=sys.stderr)


async def _emit_lost(emit: Emit, name: str, params: Params, store: Store, ledger: Ledger, size: Size) -> None:
    lost = ledger.lost(await read_all(store, size.numbers))
    emit(name, "lost_writes", lost, "1", params)
