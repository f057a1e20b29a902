"""Real workers under kill -9, SIGSTOP, restarts, drains, joins and master changes, while clients write and read state.

`STATE_CHAOS_SECONDS` sets how long each campaign lasts (600 by default), `CHAOS_SEED` the order of the faults:
`STATE_CHAOS_SECONDS=600 tools/test -m campaign tests/integration/test_state_chaos.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.state_chaos import StateClients
from tests.state_faults import Faults, Operator, small, wait_whole
from tools.lib.local_cluster import LocalCluster

SUITE_S = 40.0
"""Of faults; the planned changes last as long again."""
CAMPAIGN_S = float(os.environ.get("STATE_CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
WORKERS = 4

log = logging.getLogger(__name__)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX's")


@asynccontextmanager
async def clients_at_work(directory: Path, seed: int) -> AsyncIterator[tuple[LocalCluster, StateClients]]:
    """A cluster with clients that write and read all the time; what must hold in any case is checked at the end."""
    with LocalCluster(directory, masters=3, workers=WORKERS, change=small) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        clients = StateClients(addresses, cluster.credentials(), seed)
        until = asyncio.Event()
        working = asyncio.create_task(clients.run(until))
        try:
            yield cluster, clients
            began_s = time.monotonic()
            await asyncio.to_thread(wait_whole, cluster)
            log.info("whole after %.1f s", time.monotonic() - began_s)
        finally:
            until.set()
            await working
            await clients.close()
        cluster.raise_if_dead()
    log.info("%s", clients.history.figures())
    problem = clients.history.problem()
    assert not problem, f"seed {seed}: {problem}"


async def play_faults(directory: Path, seconds: float) -> None:
    """Every kind of fault in turn until the time is over."""
    async with clients_at_work(directory, SEED) as (cluster, _):
        faults = Faults(cluster, SEED)
        await faults.run(seconds)
    log.info("faults: %s", ", ".join(f"{count} {name}" for name, count in sorted(faults.done.items())))


async def change_everything(cluster: LocalCluster, clients: StateClients) -> None:
    """Everything that an operator does by plan, once, each when what came before is done."""
    operator = Operator(cluster)
    for change in (
        operator.has_a_worker_join,
        operator.changes_a_weight,
        operator.drains_a_worker,
        operator.cuts_and_joins,
        operator.restarts_every_worker,
        operator.restarts_every_master,
        operator.has_a_worker_leave,
    ):
        began_s, clients.history.longest_s = time.monotonic(), 0.0
        await asyncio.to_thread(change)
        took_s = time.monotonic() - began_s
        log.info("%.1f s: %s; longest call %.2f s", took_s, change.__name__, clients.history.longest_s)


@pytest.mark.timeout(SUITE_S + 180)
async def test_nothing_is_lost_or_stale_when_workers_fail(tmp_path: Path) -> None:
    """Every kind of fault in turn: linearizable per user, nothing lost, nothing denied seen, whole at the end."""
    await play_faults(tmp_path, SUITE_S)


@pytest.mark.timeout(300)
async def test_planned_changes_fail_no_request(tmp_path: Path) -> None:
    """A worker joins and leaves, moves, a drain, cuts, restarts of every worker and master: no request fails."""
    async with clients_at_work(tmp_path, SEED) as (cluster, clients):
        await change_everything(cluster, clients)
    assert clients.history.errors == []


@pytest.mark.campaign
@pytest.mark.timeout(CAMPAIGN_S + 300)
async def test_state_campaign(tmp_path: Path) -> None:
    """The first of these for STATE_CHAOS_SECONDS."""
    await play_faults(tmp_path, CAMPAIGN_S)


@pytest.mark.campaign
@pytest.mark.timeout(CAMPAIGN_S + 300)
async def test_planned_campaign(tmp_path: Path) -> None:
    """The second of these, again and again for STATE_CHAOS_SECONDS."""
    end_s = time.monotonic() + CAMPAIGN_S
    async with clients_at_work(tmp_path, SEED) as (cluster, clients):
        while time.monotonic() < end_s and not clients.history.errors:
            await change_everything(cluster, clients)
    assert clients.history.errors == []
