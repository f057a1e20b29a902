"""Load alone never moves the leadership: three real masters at default settings, clients that write without a pause.

`STEADY_SECONDS` sets how long the campaign lasts, 3,600 by default; `STEADY_CLIENTS` how many write at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from coordinator.client import AsyncClusterClient
from tools.lib.local_cluster import LocalCluster

SECONDS = float(os.environ.get("STEADY_SECONDS", "3600"))
CLIENTS = int(os.environ.get("STEADY_CLIENTS", "8"))


@pytest.mark.campaign
@pytest.mark.timeout(SECONDS + 300)
async def test_load_alone_causes_no_election(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The leader of the beginning leads at the end, in the same term, after every write was acknowledged."""
    waits_s: list[float] = []

    async def write(number: int, until_s: float) -> None:
        addresses = [master.grpc_address for master in cluster.config.masters]
        async with AsyncClusterClient(addresses, timeout_s=30.0, credentials=cluster.credentials()) as client:
            while (began_s := time.monotonic()) < until_s:
                await client.change_settings(rebalance_paused=(number + len(waits_s)) % 2 == 0)
                waits_s.append(time.monotonic() - began_s)

    with LocalCluster(tmp_path, masters=3, workers=0) as cluster:
        cluster.start()
        cluster.wait_leader()
        before = cluster.client().get_status()
        until_s = time.monotonic() + SECONDS
        await asyncio.gather(*(write(number, until_s) for number in range(CLIENTS)))
        after = cluster.client().get_status()
    waits_s.sort()
    figures = f"{len(waits_s)} writes in {SECONDS:g} s, p99 {waits_s[len(waits_s) * 99 // 100] * 1e3:.1f} ms"
    with capsys.disabled():
        sys.stdout.write(f"{figures}, longest {waits_s[-1] * 1e3:.0f} ms; term {before.term}, then {after.term}\n")
    assert (after.leader_id, after.term) == (before.leader_id, before.term), figures
