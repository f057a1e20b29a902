"""Jobs of every second while leaders and owners die and pause: each second is accounted for, nothing is doubled.

`CRON_CHAOS_SECONDS` sets how long the campaign lasts (600 by default), `CHAOS_SEED` the order of the faults.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.client import AsyncClusterClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tests.cron_chaos import Expected, check, command, figures, read_sink
from tools.lib.local_cluster import LocalCluster

SUITE_S = 45.0
ISSUE_S = 120.0
CAMPAIGN_S = float(os.environ.get("CRON_CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
WORKERS = 4
SETTLED_S_MAX = 60.0
"""From the end of the last fault until every launch of the time before it has ended."""
ALLOW, SKIP = types_pb2.OVERLAP_POLICY_ALLOW, types_pb2.OVERLAP_POLICY_SKIP
QUEUE, CANCEL = types_pb2.OVERLAP_POLICY_QUEUE, types_pb2.OVERLAP_POLICY_CANCEL_PREVIOUS
NEVER, ON_LOST = types_pb2.RETRY_POLICY_NEVER, types_pb2.RETRY_POLICY_ON_LOST
ON_FAILURE = types_pb2.RETRY_POLICY_ON_FAILURE

log = logging.getLogger(__name__)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX's, and so is the shell")


def quick(config: ClusterConfig) -> ClusterConfig:
    """Few shards, and leases so short that workers are given up within the test."""
    return replace(
        config,
        session=replace(config.session, heartbeat_s=0.3, suspect_s=0.9, session_lease_s=2.0),
        placement=replace(config.placement, shards=8, hold_s=3.0, dwell_s=2.0),
        # Killing workers in turn is what quarantine is for; here it would end the test.
        moves=replace(config.moves, quarantine_workers=0),
        state=replace(config.state, replica_lease_s=0.8),
        cron=replace(config.cron, launches_kept=20_000, order_timeout_s=2.0),
    )


def jobs(sink: Path) -> list[types_pb2.CronJobSpec]:
    """One job for each way in which a second can go, every second; the Python one every third, as it costs the most.

    Of "whole" no second may be missed, whatever happens.
    """
    fails_first = 'if [ "$LAUNCH_ATTEMPT" = 1 ]; then exit 3; fi'
    made = [
        _job("never", sink, retry=NEVER, overlap=ALLOW, overlap_limit=100),
        _job("never-long", sink, "sleep 0.7", retry=NEVER, overlap=ALLOW, overlap_limit=100),
        _job("lost", sink, "sleep 0.4", retry=ON_LOST, overlap=ALLOW, overlap_limit=100),
        _job("failing", sink, fails_first, retry=ON_FAILURE, overlap=ALLOW, overlap_limit=100),
        _job("queue", sink, "sleep 0.2", retry=ON_LOST, overlap=QUEUE, overlap_limit=5),
        _job("skip", sink, "sleep 1.2", retry=ON_LOST, overlap=SKIP),
        _job("newest", sink, "sleep 1.2", retry=NEVER, overlap=CANCEL),
        _job("hasty", sink, retry=NEVER, overlap=ALLOW, overlap_limit=100, start_deadline_s=1.0, jitter_s=1.0),
    ]
    whole = _job("whole", sink, retry=ON_LOST, overlap=ALLOW, overlap_limit=100, start_deadline_s=300.0)
    whole.attempts_max, whole.catch_up = 20, types_pb2.CATCH_UP_POLICY_ALL
    whole.catch_up_window_s, whole.catch_up_limit = 600.0, 600
    python = _job("python", sink, retry=NEVER, overlap=ALLOW, overlap_limit=100)
    del python.command[:]
    python.python, python.schedule = "tests.launch_targets:tell_sink", "*/3 * * * * *"
    python.environment["SINK"] = str(sink)
    return [*made, whole, python]


def _job(job_id: str, sink: Path, work: str = "", **fields: object) -> types_pb2.CronJobSpec:
    settings: dict[str, object] = {
        "overlap_limit": 10,
        "start_deadline_s": 30.0,
        "attempts_max": 6,
        "retry_backoff_s": 0.2,
        "retry_backoff_s_max": 2.0,
    }
    spec = types_pb2.CronJobSpec(
        id=job_id,
        schedule="* * * * * *",
        time_zone="UTC",
        priority_class=4,
        command=command(str(sink), work),
        timeout_s=20.0,
        catch_up=types_pb2.CATCH_UP_POLICY_NONE,
    )
    spec.MergeFrom(types_pb2.CronJobSpec(**(settings | fields)))  # type: ignore[arg-type]
    return spec


class Faults:
    """Does things to the leader and to owners of jobs; after each all daemons run again."""

    def __init__(self, cluster: LocalCluster, client: AsyncClusterClient, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._client = client
        self._rng = random.Random(f"faults {seed}")
        self._kinds: list[Callable[[], Awaitable[None]]] = []

    async def run(self, seconds: float) -> None:
        """Every kind in turn, in a random order, until the time is over."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if not self._kinds:
                self._kinds = [
                    self.kill_leader,
                    self.kill_owner,
                    self.kill_leader_and_owner,
                    self.kill_owner_briefly,
                    self.pause_leader,
                    self.pause_owner,
                    self.pause_owner_beyond_its_lease,
                    self.pause_leader_kill_owner,
                    self.stop_owner,
                    self.stop_leader,
                ]
                self._rng.shuffle(self._kinds)
            fault = self._kinds.pop()
            self.done[fault.__name__] += 1
            log.info("%.1f s left: %s", end_s - time.monotonic(), fault.__name__)
            await fault()
            await asyncio.sleep(self._rng.uniform(0.2, 2.0))

    async def leader(self) -> str:
        """The leader's id."""
        return await asyncio.to_thread(self._cluster.wait_leader)

    async def owner(self) -> str:
        """The owner of some job."""
        while True:
            try:
                views = (await self._client.list_jobs()).jobs
            except CoordinatorError:
                continue  # The client has waited its own time.
            owners = sorted({view.job.owner for view in views if view.job.owner})
            if owners:
                return self._rng.choice(owners)
            await asyncio.sleep(0.05)

    async def kill_leader(self) -> None:
        """kill -9, and it comes back after a while."""
        await self._kill(await self.leader())

    async def kill_owner(self) -> None:
        """kill -9 of a worker, shorter or longer than its lease."""
        await self._kill(await self.owner())

    async def kill_owner_briefly(self) -> None:
        """It is back before anybody gives it up, without the runs that it had."""
        owner = await self.owner()
        self._cluster.kill(owner)
        self._cluster.start([owner])

    async def kill_leader_and_owner(self) -> None:
        """Both at once."""
        owner, leader = await self.owner(), await self.leader()
        self._cluster.kill(owner)
        await self._kill(leader)
        self._cluster.start([owner])

    async def pause_leader(self) -> None:
        """Others lead meanwhile; what it decides when it goes on must not count."""
        await self._pause(await self.leader(), self._rng.uniform(0.3, 4.0))

    async def pause_owner(self) -> None:
        """Suspected, perhaps, while its runs go on."""
        await self._pause(await self.owner(), self._rng.uniform(0.3, 1.5))

    async def pause_owner_beyond_its_lease(self) -> None:
        """Given up while its runs go on; what they and it do afterwards must not count."""
        await self._pause(await self.owner(), self._rng.uniform(3.0, 5.0))

    async def pause_leader_kill_owner(self) -> None:
        """An owner is lost while a change of leader goes on."""
        owner, leader = await self.owner(), await self.leader()
        pausing = asyncio.create_task(self._pause(leader, self._rng.uniform(0.5, 2.0)))
        await self._kill(owner)
        await pausing

    async def stop_owner(self) -> None:
        """A clean stop of a worker, which ends its runs."""
        owner = await self.owner()
        await asyncio.to_thread(self._cluster.stop, [owner])
        self._cluster.start([owner])

    async def stop_leader(self) -> None:
        """A clean stop of the leader, which hands the leadership on."""
        leader = await self.leader()
        await asyncio.to_thread(self._cluster.stop, [leader])
        self._cluster.start([leader])
        await asyncio.to_thread(self._cluster.wait_back, leader)

    async def _kill(self, daemon_id: str) -> None:
        self._cluster.kill(daemon_id)
        await asyncio.sleep(self._rng.uniform(0.0, 4.0))
        self._cluster.start([daemon_id])

    async def _pause(self, daemon_id: str, seconds: float) -> None:
        process_id = self._cluster.process(daemon_id).process_id
        assert process_id is not None, f"{daemon_id} ended: {self._cluster.process(daemon_id).last_words()}"
        os.kill(process_id, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(process_id, signal.SIGCONT)


async def history(client: AsyncClusterClient, job_ids: list[str]) -> list[types_pb2.Launch]:
    """Every launch and every record of the jobs."""
    found: list[types_pb2.Launch] = []
    for job_id in job_ids:
        found += (await client.list_launches(job_id=job_id, latest=10_000)).launches
    return found


async def settle(client: AsyncClusterClient, job_ids: list[str], until_s: int) -> None:
    """Returns once every time before `until_s` is decided and its launch has ended."""
    open_now: list[str] = []
    try:
        async with asyncio.timeout(SETTLED_S_MAX):
            while True:
                try:
                    views = (await client.list_jobs()).jobs
                    open_now = [f"{v.job.spec.id} is undecided" for v in views if _decided_s(v.job) < until_s - 3]
                    for launch in await history(client, job_ids):
                        is_open = not launch.finished_unix_ms and launch.scheduled_at_unix_ms < until_s * 1_000
                        open_now += [str(launch)] if is_open else []
                    if not open_now:
                        return
                except CoordinatorError as error:
                    open_now = [str(error)]
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise AssertionError(f"not settled within {SETTLED_S_MAX:g} s: {open_now[:5]}") from None


def _decided_s(job: types_pb2.CronJob) -> float:
    return job.decided_until_unix_ms / 1_000


async def chaos(directory: Path, seconds: float, seed: int) -> None:
    """Runs it and checks everything; logs the figures."""
    sink = directory / "sink"
    specs = jobs(sink)
    job_ids = [spec.id for spec in specs]
    with LocalCluster(directory, masters=3, workers=WORKERS, change=quick) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        async with AsyncClusterClient(addresses, credentials=cluster.credentials(), timeout_s=20.0) as client:
            await client.apply_jobs(specs)
            from_s = int(time.time()) + 1
            faults = Faults(cluster, client, seed)
            await faults.run(seconds)
            until_s = int(time.time())
            await settle(client, job_ids, until_s)
            # In this order: what has begun was committed before.
            seen = read_sink(sink.read_text())
            launches = await history(client, job_ids)
        cluster.raise_if_dead()
    expected = [
        Expected(spec.id, spec.retry == NEVER, 3 if spec.python else 1, is_whole=spec.id == "whole") for spec in specs
    ]
    happened = ", ".join(f"{count} {name}" for name, count in sorted(faults.done.items()))
    log.info("seed %d: %s; faults: %s", seed, figures(launches, seen), happened)
    problems = check(expected, launches, seen, from_s, until_s)
    assert not problems, f"seed {seed}: {len(problems)} problems:\n" + "\n".join(problems[:20])
    for job_id in job_ids:
        assert any(time[0] == job_id for time in seen.effects), f"{job_id} never had an effect"


@pytest.mark.timeout(SUITE_S + 180)
async def test_every_second_is_accounted_for(tmp_path: Path) -> None:
    """Leaders and owners die and pause all the time: each second has its launch or its reason, none two effects."""
    await chaos(tmp_path, SUITE_S, SEED)


@pytest.mark.campaign
@pytest.mark.timeout(ISSUE_S + 240)
async def test_two_minutes(tmp_path: Path) -> None:
    """The same for the two minutes that were asked for."""
    await chaos(tmp_path, ISSUE_S, SEED)


@pytest.mark.campaign
@pytest.mark.timeout(CAMPAIGN_S + 300)
async def test_cron_campaign(tmp_path: Path) -> None:
    """The same for CRON_CHAOS_SECONDS."""
    await chaos(tmp_path, CAMPAIGN_S, SEED)
