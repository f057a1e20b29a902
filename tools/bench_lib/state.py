"""Users' state beside Redis Cluster: single puts and gets of one client and of 64, and batches.

- `put_ms`, `get_ms`: each call of one client after the other, and of 64 at once; values of 200 bytes.
- `puts_per_s`, `gets_per_s`: the same, and with `call batch` 500 operations in one call (a pipeline there).

Ours is durable: acknowledged means synced on two workers' disks. `redis` acknowledges from the memory of one process;
`redis-durable` syncs its log at every write and waits for the replica, which is the like of ours. Ours speaks mutual
TLS, Redis plain text. Clients run in this process and share the machine with the servers.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.bench_lib.redis_cluster import RedisSystem
from tools.bench_lib.result import Emit, Params, emit_quantiles
from tools.bench_lib.state_load import BATCH, Ledger, closed_loop, fill, value_of
from tools.bench_lib.state_systems import OurSystem, Store, System
from tools.lib.debian_package import PackageError


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    numbers: int = 20_000
    load_s: float = 8.0
    warm_up_s: float = 1.0


QUICK = Size(numbers=2_000, load_s=1.5, warm_up_s=0.5)
CLIENTS = (1, 64)
BATCH_CLIENTS = (1, 4)


def run(emit: Emit, size: Size | None = None) -> None:
    """Measures everything; about three minutes."""
    makers: list[Callable[[Path], System]] = [OurSystem, RedisSystem, partial(RedisSystem, is_durable=True)]
    for make in makers:
        with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
            try:
                system = make(Path(directory))
            except PackageError as error:
                print(f"tools/bench: Redis is left out: {error}", file=sys.stderr)
                continue
            try:
                system.start()
                asyncio.run(_measure(emit, system, size or Size()))
            finally:
                system.close()


def run_quick(emit: Emit) -> None:
    """Measures everything once, in about a minute; too little for the last percent of anything."""
    run(emit, QUICK)


async def _measure(emit: Emit, system: System, size: Size) -> None:
    store, ledger = system.store(), Ledger()
    try:
        await fill(store, ledger, size.numbers)
        for clients in CLIENTS:
            await _measure_calls(emit, system.name, store, ledger, size, clients)
        for clients in BATCH_CLIENTS:
            await _measure_batches(emit, system.name, store, ledger, size, clients)
    finally:
        await store.close()


async def _measure_calls(emit: Emit, name: str, store: Store, ledger: Ledger, size: Size, clients: int) -> None:
    rng = random.Random(clients)

    async def put() -> int:
        await store.put(rng.randrange(size.numbers), value_of(ledger.next()))
        return 1

    async def get() -> int:
        await store.get(rng.randrange(size.numbers))
        return 1

    params: Params = {"clients": clients}
    for what, work in (("put", put), ("get", get)):
        rate, taken_ms = await closed_loop(work, clients, size.load_s, size.warm_up_s)
        emit(name, f"{what}s_per_s", rate, "1/s", params)
        emit_quantiles(emit, name, f"{what}_ms", "ms", params, taken_ms)


async def _measure_batches(emit: Emit, name: str, store: Store, ledger: Ledger, size: Size, clients: int) -> None:
    rng = random.Random(clients)

    async def put() -> int:
        await store.put_many([(rng.randrange(size.numbers), value_of(ledger.next())) for _ in range(BATCH)])
        return BATCH

    async def get() -> int:
        await store.get_many([rng.randrange(size.numbers) for _ in range(BATCH)])
        return BATCH

    params: Params = {"clients": clients, "call": "batch"}
    for what, work in (("put", put), ("get", get)):
        if what == "get" and "durable" in name:
            continue  # Reads do not know of it.
        rate, taken_ms = await closed_loop(work, clients, size.load_s, size.warm_up_s)
        emit(name, f"{what}s_per_s", rate, "1/s", params)
        emit_quantiles(emit, name, f"{what}_ms", "ms", params, taken_ms)
