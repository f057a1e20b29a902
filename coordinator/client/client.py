"""The asynchronous client: one typed method for each call of ClusterService and CronService.

Methods return the messages of coordinator/api/v1 and raise the exceptions of coordinator/model/errors.py. A method that
changes something takes a `request_id`; one is made when it is left out, so a retry inside the client never applies
twice. Give your own to make a retry of *yours* safe, after a crash for example. The masters remember the results of the
newest 65,536 requests, for about 10 minutes: a retry that comes later than that may apply again.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TypeAlias

from grpc import aio

from coordinator.api.v1 import cluster_pb2, cron_pb2, launch_pb2, types_pb2
from coordinator.client.errors import error_of
from coordinator.client.masters import Link, Masters
from coordinator.client.retry import may_retry
from coordinator.client.run_output import RunOutputReader
from coordinator.client.workers import WorkerLinks
from coordinator.model.errors import CoordinatorError, RefusalReason, Refused, TimedOut
from coordinator.security.credentials import Credentials

TIMEOUT_S = 10.0
Consistency: TypeAlias = cluster_pb2.Consistency.ValueType
STALE = cluster_pb2.CONSISTENCY_STALE
LINEARIZABLE = cluster_pb2.CONSISTENCY_LINEARIZABLE


class AsyncClusterClient:
    """A client of one cluster. Belongs to the event loop that it is first used in; an async context manager."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S,
        credentials: Credentials | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`addresses` are host:port of the masters; `timeout_s` bounds each call, all retries included.

        Without credentials it speaks plain text, which only a cluster with `mode = "plaintext"` takes.
        """
        self._masters = Masters(addresses, timeout_s=timeout_s, credentials=credentials, rng=rng)
        self._workers = WorkerLinks(credentials)

    async def close(self) -> None:
        """Ends all connections."""
        await self._masters.close()
        await self._workers.close()

    async def __aenter__(self) -> AsyncClusterClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # The cluster and its masters

    async def get_status(self, *, consistency: Consistency = LINEARIZABLE) -> cluster_pb2.GetStatusResponse:
        """Who leads, how much there is of everything, and what is wrong."""
        request = cluster_pb2.GetStatusRequest(consistency=consistency)
        return await self._masters.call(lambda link: link.cluster.GetStatus, request)

    async def list_masters(self) -> cluster_pb2.ListMastersResponse:
        """The masters with their Raft figures; those that do not answer are listed as unreachable."""
        return await self._masters.call(lambda link: link.cluster.ListMasters, cluster_pb2.ListMastersRequest())

    async def get_master(self, address: str) -> cluster_pb2.Master:
        """The figures of the master at `address`, from that master alone; not retried."""
        link = await self._masters.connect(address, self._masters.timeout_s)
        try:
            response = await link.cluster.GetMaster(cluster_pb2.GetMasterRequest(), timeout=self._masters.timeout_s)
        except aio.AioRpcError as failure:
            raise error_of(failure, address) from None
        return response.master

    async def change_settings(
        self,
        *,
        rebalance_paused: bool | None = None,
        cron_paused: bool | None = None,
        replicas: int | None = None,
        copy_bytes_per_s: int | None = None,
        request_id: str = "",
    ) -> cluster_pb2.ChangeSettingsResponse:
        """Changes the settings that are named; the answer has all of them."""
        request = cluster_pb2.ChangeSettingsRequest(
            rebalance_paused=rebalance_paused,
            cron_paused=cron_paused,
            replicas=replicas,
            copy_bytes_per_s=copy_bytes_per_s,
            request_id=request_id or _new_id(),
        )
        return await self._masters.call(lambda link: link.cluster.ChangeSettings, request)

    async def stream_events(
        self, *, from_sequence: int = 0, latest: int = 0, follow: bool = False, kind: str = ""
    ) -> AsyncGenerator[types_pb2.Event, None]:
        """The cluster's story: the `latest` events (0 means 100), or all from a sequence on; with `follow` what comes.

        A story that is followed goes on at another master when one fails; it ends only with an exception.
        """
        request = cluster_pb2.StreamEventsRequest(from_sequence=from_sequence, latest=latest, follow=follow, kind=kind)
        search_from_s: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            link = await self._masters.any()
            try:
                async for event in self._read_events(link, request):
                    request.from_sequence = event.sequence + 1
                    search_from_s = None
                    yield event
                if not follow:
                    return
            except CoordinatorError as error:
                if search_from_s is None:
                    search_from_s = loop.time()
                if not may_retry(error) or loop.time() - search_from_s > self._masters.timeout_s:
                    raise
            await asyncio.sleep(0.1)

    async def _read_events(
        self, link: Link, request: cluster_pb2.StreamEventsRequest
    ) -> AsyncGenerator[types_pb2.Event, None]:
        timeout_s = None if request.follow else self._masters.timeout_s
        stream = link.cluster.StreamEvents(request, timeout=timeout_s)
        try:
            async for response in stream:
                for event in response.events:
                    yield event
        except aio.AioRpcError as failure:
            raise error_of(failure, link.address) from None
        finally:
            stream.cancel()

    async def transfer_leadership(
        self, target_id: str = "", *, leader_id: str = ""
    ) -> cluster_pb2.TransferLeadershipResponse:
        """Hands the leadership to a master, or to the one with most of the log; the answer says who leads now.

        With `leader_id` that one shall stop leading: nothing is done when another one leads already, so that retries
        are safe. It is asked for when it is left out.
        """
        leader_id = leader_id or (await self.get_status()).leader_id
        request = cluster_pb2.TransferLeadershipRequest(target_id=target_id, leader_id=leader_id)
        return await self._masters.call(lambda link: link.cluster.TransferLeadership, request)

    async def replace_master(self, master_id: str, peer_address: str = "") -> cluster_pb2.ReplaceMasterResponse:
        """Lets a master with a new, empty disk take its place, at another peer port when one is given.

        Waits until it has caught up, as long as the client's timeout allows. Safe to repeat.
        """
        request = cluster_pb2.ReplaceMasterRequest(master_id=master_id, peer_address=peer_address)
        return await self._masters.call(lambda link: link.cluster.ReplaceMaster, request)

    async def backup(self) -> AsyncGenerator[cluster_pb2.BackupResponse, None]:
        """The whole state as the parts of a backup file, in order; what they are about is in the first.

        Raises TimedOut when the next part does not come within the client's timeout. An exception after the first part
        means that the backup is to be taken anew.
        """
        link = await self._masters.any()
        stream = link.cluster.Backup(cluster_pb2.BackupRequest())
        parts = aiter(stream)
        try:
            while True:
                async with asyncio.timeout(self._masters.timeout_s):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
        except aio.AioRpcError as failure:
            raise error_of(failure, link.address) from None
        except TimeoutError:
            raise TimedOut(f"master {link.address} sent nothing for {self._masters.timeout_s:g} s") from None
        finally:
            stream.cancel()

    # Workers

    async def list_nodes(
        self, *, node_id: str = "", consistency: Consistency = LINEARIZABLE
    ) -> cluster_pb2.ListNodesResponse:
        """The workers, or the one with `node_id`."""
        request = cluster_pb2.ListNodesRequest(consistency=consistency, node_id=node_id)
        return await self._masters.call(lambda link: link.cluster.ListNodes, request)

    async def drain_node(
        self, node_id: str, *, dry_run: bool = False, request_id: str = ""
    ) -> cluster_pb2.DrainNodeResponse:
        """Asks for a worker to be emptied; with `dry_run` only whether that is safe. An unsafe drain is Refused."""
        request = cluster_pb2.DrainNodeRequest(node_id=node_id, dry_run=dry_run, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.DrainNode, request)

    async def undrain_node(self, node_id: str, *, request_id: str = "") -> cluster_pb2.UndrainNodeResponse:
        """Takes a drain back."""
        request = cluster_pb2.UndrainNodeRequest(node_id=node_id, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.UndrainNode, request)

    async def remove_node(self, node_id: str, *, request_id: str = "") -> cluster_pb2.RemoveNodeResponse:
        """Forgets a worker that is down or has left."""
        request = cluster_pb2.RemoveNodeRequest(node_id=node_id, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.RemoveNode, request)

    async def set_node_weight(
        self, node_id: str, weight: float, *, request_id: str = ""
    ) -> cluster_pb2.SetNodeWeightResponse:
        """Changes a worker's share of the load; above 0."""
        request = cluster_pb2.SetNodeWeightRequest(node_id=node_id, weight=weight, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.SetNodeWeight, request)

    # Shards and moves

    async def list_shards(
        self,
        *,
        shard_ids: Iterable[int] = (),
        node_id: str = "",
        with_figures: bool = False,
        consistency: Consistency = LINEARIZABLE,
    ) -> cluster_pb2.ListShardsResponse:
        """The shards: all, or those named, or those that a worker holds or receives; with how much is in them."""
        request = cluster_pb2.ListShardsRequest(
            consistency=consistency, shard_ids=shard_ids, node_id=node_id, with_figures=with_figures
        )
        return await self._masters.call(lambda link: link.cluster.ListShards, request)

    async def locate_keys(
        self, keys: Iterable[str], *, consistency: Consistency = LINEARIZABLE
    ) -> cluster_pb2.LocateKeysResponse:
        """Where keys live, in their order; at most 10,000 of them."""
        request = cluster_pb2.LocateKeysRequest(keys=keys, consistency=consistency)
        return await self._masters.call(lambda link: link.cluster.LocateKeys, request)

    async def split_shard(self, shard_id: int, *, at: int = 0, request_id: str = "") -> cluster_pb2.SplitShardResponse:
        """Cuts a shard in two at key hash `at`; 0 for the median of its users, or the middle of an empty one."""
        request = cluster_pb2.SplitShardRequest(shard_id=shard_id, at=at, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.SplitShard, request)

    async def merge_shards(
        self, lower_shard_id: int, upper_shard_id: int, *, request_id: str = ""
    ) -> cluster_pb2.MergeShardsResponse:
        """Joins two neighbours with the same replicas."""
        request = cluster_pb2.MergeShardsRequest(
            lower_shard_id=lower_shard_id, upper_shard_id=upper_shard_id, request_id=request_id or _new_id()
        )
        return await self._masters.call(lambda link: link.cluster.MergeShards, request)

    async def release_shard(self, shard_id: int, *, request_id: str = "") -> cluster_pb2.ReleaseShardResponse:
        """Ends the quarantine of a shard."""
        request = cluster_pb2.ReleaseShardRequest(shard_id=shard_id, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.ReleaseShard, request)

    async def plan_rebalance(self, *, consistency: Consistency = LINEARIZABLE) -> cluster_pb2.PlanRebalanceResponse:
        """What the planner would do now, and what that would do to the balance."""
        request = cluster_pb2.PlanRebalanceRequest(consistency=consistency)
        return await self._masters.call(lambda link: link.cluster.PlanRebalance, request)

    async def list_moves(
        self,
        *,
        include_ended: bool = False,
        move_id: int = 0,
        with_progress: bool = False,
        consistency: Consistency = LINEARIZABLE,
    ) -> cluster_pb2.ListMovesResponse:
        """The moves in progress, with `include_ended` the latest that ended as well; or the one named."""
        request = cluster_pb2.ListMovesRequest(
            consistency=consistency, include_ended=include_ended, move_id=move_id, with_progress=with_progress
        )
        return await self._masters.call(lambda link: link.cluster.ListMoves, request)

    async def abort_move(
        self, move_id: int, reason: str = "", *, request_id: str = ""
    ) -> cluster_pb2.AbortMoveResponse:
        """Rolls a move back; Refused after its cutover."""
        request = cluster_pb2.AbortMoveRequest(move_id=move_id, reason=reason, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cluster.AbortMove, request)

    # Cron

    async def list_jobs(
        self, *, job_id: str = "", next: int = 0, consistency: Consistency = LINEARIZABLE
    ) -> cron_pb2.ListJobsResponse:
        """The cron jobs, or one, with the `next` scheduled times (0 means 1)."""
        request = cron_pb2.ListJobsRequest(consistency=consistency, job_id=job_id, next=next)
        return await self._masters.call(lambda link: link.cron.ListJobs, request)

    async def apply_jobs(
        self,
        jobs: Iterable[types_pb2.CronJobSpec],
        *,
        dry_run: bool = False,
        prune: bool = False,
        request_id: str = "",
    ) -> cron_pb2.ApplyJobsResponse:
        """Creates or replaces jobs; with `dry_run` only says what would change.

        With `prune` it forgets all other jobs that came through the API. Those of the configuration stay.
        """
        request = cron_pb2.ApplyJobsRequest(
            jobs=jobs, dry_run=dry_run, prune=prune, request_id=request_id or _new_id()
        )
        return await self._masters.call(lambda link: link.cron.ApplyJobs, request)

    async def delete_job(self, job_id: str, *, request_id: str = "") -> cron_pb2.DeleteJobResponse:
        """Forgets a job and its history."""
        request = cron_pb2.DeleteJobRequest(job_id=job_id, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cron.DeleteJob, request)

    async def set_job_paused(self, job_id: str, paused: bool, *, request_id: str = "") -> cron_pb2.SetJobPausedResponse:
        """Pauses or resumes a job."""
        request = cron_pb2.SetJobPausedRequest(job_id=job_id, paused=paused, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cron.SetJobPaused, request)

    async def trigger_job(self, job_id: str, *, request_id: str = "") -> cron_pb2.TriggerJobResponse:
        """Launches a job now, beside its schedule."""
        request = cron_pb2.TriggerJobRequest(job_id=job_id, request_id=request_id or _new_id())
        return await self._masters.call(lambda link: link.cron.TriggerJob, request)

    async def cancel_launches(
        self, job_id: str, *, scheduled_at_unix_ms: int = 0, reason: str = "", request_id: str = ""
    ) -> cron_pb2.CancelLaunchesResponse:
        """Tells the launches of a job, or the one of a scheduled time, to stop; those that wait are dropped."""
        request = cron_pb2.CancelLaunchesRequest(
            job_id=job_id,
            scheduled_at_unix_ms=scheduled_at_unix_ms,
            reason=reason,
            request_id=request_id or _new_id(),
        )
        return await self._masters.call(lambda link: link.cron.CancelLaunches, request)

    async def list_launches(
        self,
        *,
        job_id: str = "",
        latest: int = 0,
        missed: bool = False,
        since_unix_ms: int = 0,
        consistency: Consistency = LINEARIZABLE,
    ) -> cron_pb2.ListLaunchesResponse:
        """The launches that are kept, the latest first (`latest` 0 means 100); with `missed` only those not made."""
        request = cron_pb2.ListLaunchesRequest(
            consistency=consistency, job_id=job_id, latest=latest, missed=missed, since_unix_ms=since_unix_ms
        )
        return await self._masters.call(lambda link: link.cron.ListLaunches, request)

    async def read_output(
        self, job_id: str, scheduled_at_unix_ms: int, *, attempt: int = 0, follow: bool = False
    ) -> AsyncGenerator[launch_pb2.ReadOutputResponse, None]:
        """What an attempt of a launch printed (0 for the latest), from the worker that ran it; pieces in order.

        A jump of `offset_bytes` leaves out what was not kept. With `follow` it goes on until the run has ended.
        """

        async def find_launch() -> types_pb2.Launch:
            answer = await self.list_launches(job_id=job_id, latest=10_000, since_unix_ms=scheduled_at_unix_ms)
            for launch in answer.launches:
                if launch.scheduled_at_unix_ms == scheduled_at_unix_ms:
                    return launch
            raise Refused(RefusalReason.NOT_FOUND, f"{job_id} has no launch scheduled at {scheduled_at_unix_ms} ms")

        async def find_address(worker_id: str) -> str:
            nodes = (await self.list_nodes(node_id=worker_id)).nodes
            return nodes[0].node.grpc_address

        reader = RunOutputReader(self._workers, find_launch, find_address, self._masters.timeout_s)
        async with aclosing(reader.read(attempt, follow=follow)) as pieces:
            async for piece in pieces:
                yield piece


def _new_id() -> str:
    return uuid.uuid4().hex
