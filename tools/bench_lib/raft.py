"""The consensus beside etcd: three members of each on this machine, real processes, data on one file system, one load.

- `commit_ms`: one client, one write after the other, through the leader and through a follower.
- `commits_per_s`: with 64 and 256 clients at work through the leader; and in calls that carry many commands.
- `leader_failover_s`: from kill -9 of the leader to the next acknowledged write.
- `clean_stop_s`: around SIGTERM of the leader: the longest time without an acknowledged write, and the process' end.
- `memory_mib`: resident memory of the leader, new and with the log filled.
- `catch_up_s`: a follower that was killed and missed the fill, from the start of its process until it has applied all.

Systems are measured one after the other, as two at a time would share two cores. Writes: raft_ours.py, etcd.py. Where a
figure is ours alone, `layer raft` is RaftNode without gRPC, servicers and controllers in front: three processes, each
with its own clients (raft_layer.py).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.bench_lib import raft_layer
from tools.bench_lib.etcd import EtcdCluster
from tools.bench_lib.raft_load import Load, System
from tools.bench_lib.raft_ours import OurCluster
from tools.bench_lib.result import Emit, emit_quantiles
from tools.lib.debian_package import PackageError


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    latencies: int = 3_000
    load_s: float = 10.0
    fill: int = 100_000
    faults: int = 20


QUICK = Size(latencies=500, load_s=2.0, fill=5_000, faults=3)
FILL_CLIENTS = 256


def run(emit: Emit, size: Size | None = None) -> None:
    """Measures everything; about ten minutes."""
    size = size or Size()
    makers: list[Callable[[Path], System]] = [OurCluster, EtcdCluster]
    for make in makers:
        with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
            try:
                system = make(Path(directory))
            except PackageError as error:
                print(f"tools/bench: etcd is left out: {error}", file=sys.stderr)
                continue
            asyncio.run(_measure(emit, system, size))
    with tempfile.TemporaryDirectory(prefix="coordinator-bench-") as directory:
        asyncio.run(raft_layer.measure(emit, Path(directory), size.latencies, size.load_s))


def run_quick(emit: Emit) -> None:
    """Measures everything once, in about a minute and a half; too little for the last percent of anything."""
    run(emit, QUICK)


async def _measure(emit: Emit, system: System, size: Size) -> None:
    async with Load(system) as load:
        await _measure_fill(emit, load, size)
        await _measure_load(emit, load, size)
        await _measure_faults(emit, load, size)


async def _measure_fill(emit: Emit, load: Load, size: Size) -> None:
    name, leader, away = load.system.name, await load.leader(), await load.follower()
    emit(name, "memory_mib", _memory_mib(load.system, leader), "MiB", {"entries": 0})
    load.system.process(away).kill()
    await load.fill(leader, FILL_CLIENTS, size.fill)
    emit(name, "memory_mib", _memory_mib(load.system, leader), "MiB", {"entries": size.fill})
    emit(name, "catch_up_s", await load.bring_back(away), "s", {"commands_missed": size.fill})
    load.system.process(away).kill()
    emit(name, "catch_up_s", await load.bring_back(away), "s", {"commands_missed": 0})


def _memory_mib(system: System, member_id: str) -> float:
    return float(psutil.Process(system.process(member_id).process_id).memory_info().rss) / 2**20


async def _measure_load(emit: Emit, load: Load, size: Size) -> None:
    name, leader, follower = load.system.name, await load.leader(), await load.follower()
    for through, member_id in (("leader", leader), ("follower", follower)):
        samples = await load.latencies_ms(member_id, size.latencies)
        emit_quantiles(emit, name, "commit_ms", "ms", {"clients": 1, "through": through}, samples)
    for clients in (64, 256):
        rate = await load.commits_per_s(leader, clients, size.load_s)
        emit(name, "commits_per_s", rate, "1/s", {"clients": clients, "through": "leader"})
    for clients in (1, 8):
        rate = await load.batched_per_s(leader, clients, size.load_s)
        emit(name, "commits_per_s", rate, "1/s", {"clients": clients, "through": "leader", "call": "batch"})


async def _measure_faults(emit: Emit, load: Load, size: Size) -> None:
    name = load.system.name
    failovers = [await load.failover_s() for _ in range(size.faults)]
    emit_quantiles(emit, name, "leader_failover_s", "s", {"cause": "kill -9"}, failovers)
    stops = [await load.clean_stop_s() for _ in range(size.faults)]
    emit_quantiles(emit, name, "clean_stop_s", "s", {"what": "longest without a write"}, [gap for gap, _ in stops])
    emit_quantiles(emit, name, "clean_stop_s", "s", {"what": "process ended"}, [ended for _, ended in stops])
