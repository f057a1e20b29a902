"""Our side of the Raft benchmark: three `coordinator` processes, and the cheapest call that really changes something.

That is CronService.SetJobPaused: it passes the interceptors and the servicer, is committed and applied, changes the
state, adds a line to the story, is remembered under its request id, and wakes the leader's controllers. Each number
stands for one of a thousand jobs that are due once a year, paused and resumed in turns.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path

from coordinator.api.v1 import cluster_pb2, cron_pb2, types_pb2
from coordinator.client.masters import Link, Masters
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CronJobSpec
from coordinator.model.errors import Unreachable
from tools.bench_lib.raft_load import POLL_S, READY_TIMEOUT_S, Writer
from tools.bench_lib.result import OURS
from tools.lib.daemons import Daemon
from tools.lib.local_cluster import LocalCluster

JOBS = 1_000
"""As many as etcd's keys. An ApplyJobs changes all of them."""
STATUS_TIMEOUT_S = 2.0


def job_spec(number: int, description: str = "") -> types_pb2.CronJobSpec:
    """The definition of a job that does not run."""
    return job_spec_to_proto(
        CronJobSpec(id=job_id(number), schedule="0 0 1 1 *", command=("true",), description=description)
    )


def job_id(number: int) -> str:
    """Name of the job that a number stands for."""
    return f"bench-{number % JOBS}"


def is_pause(number: int) -> bool:
    """Every write changes its job: the first round over all jobs pauses, the next one resumes."""
    return number // JOBS % 2 == 0


class OurMember:
    """A client's connection to one master."""

    def __init__(self, masters: Masters, link: Link) -> None:
        self._masters = masters
        self._cron = link.cron
        self._cluster = link.cluster

    async def write(self, number: int, timeout_s: float) -> None:
        """Pauses or resumes a job."""
        request = cron_pb2.SetJobPausedRequest(
            job_id=job_id(number), paused=is_pause(number), request_id=uuid.uuid4().hex
        )
        await self._cron.SetJobPaused(request, timeout=timeout_s)

    async def write_many(self, number: int, timeout_s: float) -> int:
        """Changes the definition of all jobs in one call."""
        request = cron_pb2.ApplyJobsRequest(
            jobs=[job_spec(job, f"version {number}") for job in range(JOBS)], request_id=uuid.uuid4().hex
        )
        response = await self._cron.ApplyJobs(request, timeout=timeout_s)
        return len(response.created) + len(response.changed)

    async def standing(self) -> tuple[bool, int]:
        """Whether it leads, and the index up to which it has applied the log."""
        response = await self._cluster.GetMaster(cluster_pb2.GetMasterRequest(), timeout=STATUS_TIMEOUT_S)
        master = response.master
        return master.role == "leader", master.applied_index if master.leader_id else 0

    async def close(self) -> None:
        """Ends the connection."""
        await self._masters.close()


class OurCluster:
    """Three masters of one directory."""

    name = OURS

    def __init__(self, directory: Path) -> None:
        self._cluster = LocalCluster(directory, masters=3, workers=0)
        self.ids = self._cluster.master_ids
        self.addresses = {master.id: master.grpc_address for master in self._cluster.config.masters}

    def process(self, member_id: str) -> Daemon:
        """A master's process."""
        return self._cluster.process(member_id)

    async def connect(self, member_id: str) -> OurMember:
        """A new connection."""
        give_up_at_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            address, credentials = self.addresses[member_id], self._cluster.credentials()
            masters = Masters([address], timeout_s=READY_TIMEOUT_S, credentials=credentials)
            try:
                return OurMember(masters, await masters.connect(address, READY_TIMEOUT_S))
            except Unreachable:
                # Before gRPC listens, a starting master probes its port for a moment.
                await masters.close()
                if time.monotonic() > give_up_at_s:
                    raise
                await asyncio.sleep(POLL_S)

    async def prepare(self, writer: Writer) -> None:
        """Makes the jobs; the leader has founded the cluster by then."""
        await writer.write_many(0, READY_TIMEOUT_S)

    def close(self) -> None:
        """Ends everything, at once."""
        self._cluster.close()
