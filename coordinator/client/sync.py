"""The client for programs without an event loop: the methods of AsyncClusterClient, each waiting for its answer.

An event loop of its own runs in a thread of its own, so any thread may call, also several at once, and connections are
kept alive between calls.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from types import TracebackType

from coordinator.api.v1 import cluster_pb2, cron_pb2, launch_pb2, types_pb2
from coordinator.client.client import LINEARIZABLE, TIMEOUT_S, AsyncClusterClient, Consistency
from coordinator.client.loop_thread import LoopThread
from coordinator.security.credentials import Credentials


class ClusterClient:
    """A client of one cluster; a context manager. Close it, or its thread ends only with the process."""

    def __init__(
        self, addresses: Sequence[str], *, timeout_s: float = TIMEOUT_S, credentials: Credentials | None = None
    ) -> None:
        """`addresses` are host:port of the masters; `timeout_s` bounds each call, all retries included.

        Without credentials it speaks plain text, which only a cluster with `mode = "plaintext"` takes.
        """
        self._client = AsyncClusterClient(addresses, timeout_s=timeout_s, credentials=credentials)
        self._calls = LoopThread("cluster-client", self._client.close)

    def close(self) -> None:
        """Ends all connections and the thread; harmless when there are none."""
        self._calls.close()

    def __enter__(self) -> ClusterClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def stream_events(
        self, *, from_sequence: int = 0, latest: int = 0, follow: bool = False, kind: str = ""
    ) -> Generator[types_pb2.Event, None, None]:
        """The cluster's story: the `latest` events (0 means 100), all from a sequence on; `follow` waits for more."""
        events = self._client.stream_events(from_sequence=from_sequence, latest=latest, follow=follow, kind=kind)
        return self._calls.iterate(events)

    def read_output(
        self, job_id: str, scheduled_at_unix_ms: int, *, attempt: int = 0, follow: bool = False
    ) -> Generator[launch_pb2.ReadOutputResponse, None, None]:
        """What an attempt of a launch printed (0 for the latest); `follow` waits until the run has ended."""
        return self._calls.iterate(
            self._client.read_output(job_id, scheduled_at_unix_ms, attempt=attempt, follow=follow)
        )

    def backup(self) -> Generator[cluster_pb2.BackupResponse, None, None]:
        """The whole state as the parts of a backup file, in order; what they are about is in the first."""
        return self._calls.iterate(self._client.backup())

    def transfer_leadership(
        self, target_id: str = "", *, leader_id: str = ""
    ) -> cluster_pb2.TransferLeadershipResponse:
        """Hands the leadership to a master, or to the one with most of the log; the answer says who leads now."""
        return self._calls.run(self._client.transfer_leadership(target_id, leader_id=leader_id))

    def replace_master(self, master_id: str, peer_address: str = "") -> cluster_pb2.ReplaceMasterResponse:
        """Lets a master with a new, empty disk take its place, at another peer port when one is given."""
        return self._calls.run(self._client.replace_master(master_id, peer_address))

    def get_status(self, *, consistency: Consistency = LINEARIZABLE) -> cluster_pb2.GetStatusResponse:
        """Who leads, how much there is of everything, and what is wrong."""
        return self._calls.run(self._client.get_status(consistency=consistency))

    def list_masters(self) -> cluster_pb2.ListMastersResponse:
        """The masters with their Raft figures; those that do not answer are listed as unreachable."""
        return self._calls.run(self._client.list_masters())

    def get_master(self, address: str) -> cluster_pb2.Master:
        """The figures of the master at `address`, from that master alone; not retried."""
        return self._calls.run(self._client.get_master(address))

    def change_settings(
        self,
        *,
        rebalance_paused: bool | None = None,
        cron_paused: bool | None = None,
        replicas: int | None = None,
        copy_bytes_per_s: int | None = None,
        request_id: str = "",
    ) -> cluster_pb2.ChangeSettingsResponse:
        """Changes the settings that are named; the answer has all of them."""
        return self._calls.run(
            self._client.change_settings(
                rebalance_paused=rebalance_paused,
                cron_paused=cron_paused,
                replicas=replicas,
                copy_bytes_per_s=copy_bytes_per_s,
                request_id=request_id,
            )
        )

    def list_nodes(
        self, *, node_id: str = "", consistency: Consistency = LINEARIZABLE
    ) -> cluster_pb2.ListNodesResponse:
        """The workers, or the one with `node_id`."""
        return self._calls.run(self._client.list_nodes(node_id=node_id, consistency=consistency))

    def drain_node(self, node_id: str, *, dry_run: bool = False, request_id: str = "") -> cluster_pb2.DrainNodeResponse:
        """Asks for a worker to be emptied; with `dry_run` only whether that is safe. An unsafe drain is Refused."""
        return self._calls.run(self._client.drain_node(node_id, dry_run=dry_run, request_id=request_id))

    def undrain_node(self, node_id: str, *, request_id: str = "") -> cluster_pb2.UndrainNodeResponse:
        """Takes a drain back."""
        return self._calls.run(self._client.undrain_node(node_id, request_id=request_id))

    def remove_node(self, node_id: str, *, request_id: str = "") -> cluster_pb2.RemoveNodeResponse:
        """Forgets a worker that is down or has left."""
        return self._calls.run(self._client.remove_node(node_id, request_id=request_id))

    def set_node_weight(
        self, node_id: str, weight: float, *, request_id: str = ""
    ) -> cluster_pb2.SetNodeWeightResponse:
        """Changes a worker's share of the load; above 0."""
        return self._calls.run(self._client.set_node_weight(node_id, weight, request_id=request_id))

    def list_shards(
        self,
        *,
        shard_ids: Iterable[int] = (),
        node_id: str = "",
        with_figures: bool = False,
        consistency: Consistency = LINEARIZABLE,
    ) -> cluster_pb2.ListShardsResponse:
        """The shards: all, or those named, or those that a worker holds or receives; with how much is in them."""
        return self._calls.run(
            self._client.list_shards(
                shard_ids=shard_ids, node_id=node_id, with_figures=with_figures, consistency=consistency
            )
        )

    def locate_keys(
        self, keys: Iterable[str], *, consistency: Consistency = LINEARIZABLE
    ) -> cluster_pb2.LocateKeysResponse:
        """Where keys live, in their order; at most 10,000 of them."""
        return self._calls.run(self._client.locate_keys(keys, consistency=consistency))

    def split_shard(self, shard_id: int, *, at: int = 0, request_id: str = "") -> cluster_pb2.SplitShardResponse:
        """Cuts a shard in two at key hash `at`; 0 for the median of its users, or the middle of an empty one."""
        return self._calls.run(self._client.split_shard(shard_id, at=at, request_id=request_id))

    def merge_shards(
        self, lower_shard_id: int, upper_shard_id: int, *, request_id: str = ""
    ) -> cluster_pb2.MergeShardsResponse:
        """Joins two neighbours with the same replicas."""
        return self._calls.run(self._client.merge_shards(lower_shard_id, upper_shard_id, request_id=request_id))

    def release_shard(self, shard_id: int, *, request_id: str = "") -> cluster_pb2.ReleaseShardResponse:
        """Ends the quarantine of a shard."""
        return self._calls.run(self._client.release_shard(shard_id, request_id=request_id))

    def plan_rebalance(self, *, consistency: Consistency = LINEARIZABLE) -> cluster_pb2.PlanRebalanceResponse:
        """What the planner would do now, and what that would do to the balance."""
        return self._calls.run(self._client.plan_rebalance(consistency=consistency))

    def list_moves(
        self,
        *,
        include_ended: bool = False,
        move_id: int = 0,
        with_progress: bool = False,
        consistency: Consistency = LINEARIZABLE,
    ) -> cluster_pb2.ListMovesResponse:
        """The moves in progress, with `include_ended` the latest that ended as well; or the one named."""
        return self._calls.run(
            self._client.list_moves(
                include_ended=include_ended, move_id=move_id, with_progress=with_progress, consistency=consistency
            )
        )

    def abort_move(self, move_id: int, reason: str = "", *, request_id: str = "") -> cluster_pb2.AbortMoveResponse:
        """Rolls a move back; Refused after its cutover."""
        return self._calls.run(self._client.abort_move(move_id, reason, request_id=request_id))

    def list_jobs(
        self, *, job_id: str = "", next: int = 0, consistency: Consistency = LINEARIZABLE
    ) -> cron_pb2.ListJobsResponse:
        """The cron jobs, or one, with the `next` scheduled times (0 means 1)."""
        return self._calls.run(self._client.list_jobs(job_id=job_id, next=next, consistency=consistency))

    def apply_jobs(
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
        return self._calls.run(self._client.apply_jobs(jobs, dry_run=dry_run, prune=prune, request_id=request_id))

    def delete_job(self, job_id: str, *, request_id: str = "") -> cron_pb2.DeleteJobResponse:
        """Forgets a job and its history."""
        return self._calls.run(self._client.delete_job(job_id, request_id=request_id))

    def set_job_paused(self, job_id: str, paused: bool, *, request_id: str = "") -> cron_pb2.SetJobPausedResponse:
        """Pauses or resumes a job."""
        return self._calls.run(self._client.set_job_paused(job_id, paused, request_id=request_id))

    def trigger_job(self, job_id: str, *, request_id: str = "") -> cron_pb2.TriggerJobResponse:
        """Launches a job now, beside its schedule."""
        return self._calls.run(self._client.trigger_job(job_id, request_id=request_id))

    def cancel_launches(
        self, job_id: str, *, scheduled_at_unix_ms: int = 0, reason: str = "", request_id: str = ""
    ) -> cron_pb2.CancelLaunchesResponse:
        """Tells the launches of a job, or the one of a scheduled time, to stop; those that wait are dropped."""
        return self._calls.run(
            self._client.cancel_launches(
                job_id, scheduled_at_unix_ms=scheduled_at_unix_ms, reason=reason, request_id=request_id
            )
        )

    def list_launches(
        self,
        *,
        job_id: str = "",
        latest: int = 0,
        missed: bool = False,
        since_unix_ms: int = 0,
        consistency: Consistency = LINEARIZABLE,
    ) -> cron_pb2.ListLaunchesResponse:
        """The launches that are kept, the latest first (`latest` 0 means 100); with `missed` only those not made."""
        return self._calls.run(
            self._client.list_launches(
                job_id=job_id, latest=latest, missed=missed, since_unix_ms=since_unix_ms, consistency=consistency
            )
        )
