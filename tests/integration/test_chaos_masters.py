"""Three real masters under kill -9, SIGSTOP, restarts, clean stops, damaged logs and full disks: linearizable.

`CHAOS_SECONDS` sets how long the campaign lasts (600 by default), `CHAOS_SEED` the order of the faults.
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
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.model.errors import CoordinatorError
from tests.chaos import Clients, shown_by
from tests.disk_faults import damage_a_log, fill_until_it_ends, start_damaged
from tests.small_disk import small_disk_or_none
from tools.lib.local_cluster import LocalCluster

SUITE_S = 60.0
CAMPAIGN_S = float(os.environ.get("CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
BACK_S_MAX = 10.0
"""From the end of the last fault to the next acknowledged write: two processes have to start in that time."""

DISK_BYTES = 96 << 20
"""Of each master's disk, where the system lets us make some: room for two snapshots and their logs."""

log = logging.getLogger(__name__)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX's")


class Faults:
    """Does things to the masters of a cluster; after each fault all of them run again."""

    def __init__(self, cluster: LocalCluster, clients: Clients, seed: int, *, has_small_disks: bool) -> None:
        self._has_small_disks = has_small_disks
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._clients = clients
        self._rng = random.Random(f"faults {seed}")
        self._kinds: list[Callable[[], Awaitable[None]]] = []

    async def run(self, seconds: float) -> None:
        """Every kind in turn, in a random order, those of disks first, until the time is over."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if not self._kinds:
                self._kinds = [
                    self.kill_leader,
                    self.kill_follower,
                    self.pause_leader,
                    self.pause_leader_long,
                    self.pause_follower,
                    self.kill_all,
                    self.stop_leader,
                    self.transfer,
                    self.kill_leader_while_another_pauses,
                ]
                self._rng.shuffle(self._kinds)
                # They are rare enough to be missed in a minute, and leave no state that another one is needed for.
                self._kinds += [self.damage_log] + [self.fill_disk] * self._has_small_disks
            fault = self._kinds.pop()
            self.done[fault.__name__] += 1
            await fault()
            await asyncio.sleep(self._rng.uniform(0.3, 2.0))

    async def leader(self) -> str:
        """The leader's id."""
        return await asyncio.to_thread(self._cluster.wait_leader)

    async def follower(self) -> str:
        """Another master's id."""
        leader = await self.leader()
        return self._rng.choice([id for id in self._cluster.master_ids if id != leader])

    async def kill_leader(self) -> None:
        """kill -9, and it comes back after a while."""
        await self._kill(await self.leader())

    async def kill_follower(self) -> None:
        """The same to a follower."""
        await self._kill(await self.follower())

    async def kill_all(self) -> None:
        """A power cut without the loss of what was written."""
        for master_id in self._cluster.master_ids:
            self._cluster.kill(master_id)
        self._cluster.start()
        await self.leader()

    async def stop_leader(self) -> None:
        """A clean stop, which hands the leadership on."""
        leader = await self.leader()
        await asyncio.to_thread(self._cluster.stop, [leader])
        stopped = self._cluster.process(leader)
        assert stopped.exit_status == 0, f"{leader} ended with {stopped.exit_status}: {stopped.last_words()}"
        self._cluster.start([leader])

    async def transfer(self) -> None:
        """The leadership goes to another master, as an operator asks for it."""
        target = await self.follower()
        try:
            async with self._clients.client() as client:
                await client.transfer_leadership(target)
        except CoordinatorError as error:
            # A follower that is behind cannot take over; nothing is promised then.
            log.info("transfer to %s: %s", target, error)

    async def pause_leader(self) -> None:
        """About as long as an election takes: the leader may or may not lead afterwards."""
        await self._pause(await self.leader(), self._rng.uniform(0.2, 1.0))

    async def pause_leader_long(self) -> None:
        """Others lead meanwhile; what the old leader answers when it goes on must not be stale."""
        await self._pause(await self.leader(), self._rng.uniform(2.0, 8.0))

    async def pause_follower(self) -> None:
        """Its connections fall silent."""
        await self._pause(await self.follower(), self._rng.uniform(0.2, 4.0))

    async def kill_leader_while_another_pauses(self) -> None:
        """No majority for a moment, and then one with a master that missed the end."""
        leader = await self.leader()
        other = self._rng.choice([id for id in self._cluster.master_ids if id != leader])
        pausing = asyncio.create_task(self._pause(other, self._rng.uniform(0.5, 3.0)))
        await self._kill(leader)
        await pausing

    async def damage_log(self) -> None:
        """A follower's log is flipped or cut while it is down: it refuses and is replaced, or loses nothing by it."""
        master_id = await self.follower()
        self._cluster.kill(master_id)
        # Committed without it, so the others have everything that it ever acknowledged.
        await wait_progress(self._clients, self._cluster)
        what = damage_a_log(self._cluster.directory / "data" / master_id, self._rng)
        said = await asyncio.to_thread(start_damaged, self._cluster, master_id)
        self.done["refused logs"] += bool(said)
        log.info("%s: %s: %s", master_id, what, said or "started")

    async def fill_disk(self) -> None:
        """The disk of any master is full: it ends and says so, and is back once there is room."""
        master_id = await self.leader() if self._rng.random() < 0.5 else await self.follower()
        await asyncio.to_thread(fill_until_it_ends, self._cluster, master_id)

    async def _kill(self, master_id: str) -> None:
        self._cluster.kill(master_id)
        await asyncio.sleep(self._rng.uniform(0.0, 2.0))
        self._cluster.start([master_id])

    async def _pause(self, master_id: str, seconds: float) -> None:
        process_id = self._cluster.process(master_id).process_id
        assert process_id is not None, f"{master_id} ended: {self._cluster.process(master_id).last_words()}"
        address = next(one.grpc_address for one in self._cluster.config.masters if one.id == master_id)
        os.kill(process_id, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
            # These wait in its socket, and are the first that it answers when it goes on.
            probing = asyncio.create_task(self._clients.read_at(address))
            await asyncio.sleep(0.05)
        finally:
            os.kill(process_id, signal.SIGCONT)
        await probing


async def wait_progress(clients: Clients, cluster: LocalCluster) -> float:
    """Seconds until a new client's write is acknowledged."""
    began_s = time.monotonic()
    fresh = Clients(cluster, 1.0, seed=0)
    fresh.history = clients.history
    try:
        async with asyncio.timeout(BACK_S_MAX):
            client = next(iter(fresh._clients.values()))
            while not await fresh.write(client, "job-end-0", "last"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await fresh.close()
    return time.monotonic() - began_s


async def wait_equal(cluster: LocalCluster) -> None:
    """Returns once all masters show the same state; controllers may be at work for a moment."""
    addresses, credentials = [master.grpc_address for master in cluster.config.masters], cluster.credentials()
    async with asyncio.timeout(20.0):
        while len(set(await asyncio.gather(*(shown_by(one, credentials) for one in addresses)))) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # Three masters, without one event.


async def chaos(directory: Path, seconds: float, seed: int) -> str:
    """Runs it and checks everything; the figures for people."""
    with ExitStack() as disks:
        made = [small_disk_or_none(directory / "data" / id, DISK_BYTES) for id in ("m1", "m2", "m3")]
        problems = [disks.enter_context(disk) for disk in made]
        cluster = disks.enter_context(LocalCluster(directory, masters=3, workers=0))
        cluster.start()
        await asyncio.to_thread(cluster.wait_leader)
        clients = Clients(cluster, seconds, seed)
        faults = Faults(cluster, clients, seed, has_small_disks=not any(problems))
        try:
            await clients.register_nodes()
            until = asyncio.Event()
            working = asyncio.create_task(clients.run(until))
            try:
                await faults.run(seconds)
                back_s = await wait_progress(clients, cluster)
            finally:
                until.set()
                await working
            await wait_equal(cluster)
        finally:
            await clients.close()
        cluster.raise_if_dead()
        began_s = time.monotonic()
        problem = clients.history.problem()
        assert not problem, f"seed {seed}: {problem}"
        happened = ", ".join(f"{count} {name}" for name, count in sorted(faults.done.items()))
        checked_s = time.monotonic() - began_s
        return (
            f"{clients.history.figures()}; faults: {happened}; progress after the last in {back_s:.2f} s; "
            f"no violation, checked in {checked_s:.1f} s"
        )


@pytest.mark.timeout(SUITE_S + 90)
async def test_nothing_is_lost_or_stale_under_faults(tmp_path: Path) -> None:
    """A minute of every kind of fault: linearizable, what was denied is never seen, all masters equal at the end."""
    log.info("%s", await chaos(tmp_path, SUITE_S, SEED))


@pytest.mark.campaign
@pytest.mark.timeout(CAMPAIGN_S + 300)
async def test_campaign(tmp_path: Path) -> None:
    """The same for CHAOS_SECONDS."""
    log.info("%s", await chaos(tmp_path, CAMPAIGN_S, SEED))
