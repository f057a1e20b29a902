"""A cluster of real daemons in one working directory, with or without a Consul beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from coordinator.security.credentials import PLAINTEXT, of_client
from coordinator.security.provision import OPERATOR, ensure_cluster
from tools.lib.consul_agent import ConsulAgent
from tools.lib.daemons import Daemon, running_with
from tools.lib.quickstart_directory import QuickstartError, listeners, ports_in_use

READY_TIMEOUT_S = 60.0
POLL_S = 0.05


class QuickstartCluster:
    """The daemons of one working directory. Use in `with`: whatever happens, nothing is left running."""

    def __init__(self, directory: Path, config: ClusterConfig, consul: ConsulAgent | None = None) -> None:
        self.directory = directory
        self.config = config
        self.consul = consul
        self.masters = {master.id: Daemon.master(master.id, directory) for master in config.masters}
        self.workers: dict[str, Daemon] = {}
        self._client: ClusterClient | None = None

    def __enter__(self) -> QuickstartCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()
        self.stop()

    @property
    def client(self) -> ClusterClient:
        """The cluster's operator; works once the cluster was started, which makes the certificates."""
        if self._client is None:
            self._client = self.new_client(timeout_s=10.0)
        return self._client

    def new_client(self, timeout_s: float) -> ClusterClient:
        """A client of this cluster, as its operator."""
        addresses = [master.grpc_address for master in self.config.masters]
        credentials = of_client(self.config, OPERATOR, self.certificates)
        return ClusterClient(addresses, timeout_s=timeout_s, credentials=credentials)

    @property
    def config_path(self) -> Path:
        """The cluster.toml of all daemons."""
        return self.directory / "cluster.toml"

    @property
    def certificates(self) -> Path:
        """Where the cluster's own authority and all certificates are."""
        return self.directory / self.config.security.directory

    def _ensure_certificates(self, *workers: str) -> None:
        if self.config.security.mode == PLAINTEXT:
            return
        try:
            ensure_cluster(self.certificates, self.config, workers)
        except OSError as error:
            raise QuickstartError(
                f"cannot write {error.filename or self.certificates}: {error.strerror}; choose another place with --dir"
            ) from None

    def refuse_if_occupied(self, worker_ids: Sequence[str]) -> None:
        """Raises QuickstartError when something listens where a daemon will."""
        left = sorted(running_with(self.config_path))
        if left:
            which = ", ".join(f"{name} (process {process})" for process, name in left)
            raise QuickstartError(
                f"daemons of this directory are running: {which}; end the quickstart that started them, or, if it was "
                f"killed, them: kill {' '.join(str(process) for process, _ in left)}"
            )
        if taken := ports_in_use(listeners(self.config, worker_ids)):
            more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            raise QuickstartError(f"port in use: {taken[0]}{more}; stop what uses it (another quickstart?)")

    def start(self, worker_ids: Sequence[str]) -> None:
        """Starts Consul where there is one, the masters, and these workers; returns at once."""
        self._ensure_certificates(*worker_ids)
        if self.consul is not None:
            self.consul.start()
        for master in self.masters.values():
            master.start()
        for worker_id in worker_ids:
            self.start_worker(worker_id)

    def start_worker(self, worker_id: str) -> Daemon:
        """Starts one worker; it need not be in the configuration."""
        self._ensure_certificates(worker_id)
        worker = self.workers.setdefault(worker_id, Daemon.worker(worker_id, self.directory))
        worker.start()
        return worker

    def stop(self) -> list[str]:
        """Stops everything cleanly, the workers first; the ids of those that had to be killed."""
        killed = []
        # All workers at once, then all masters at once: each waits for nothing but its own work.
        for daemons in (self.workers.values(), self.masters.values()):
            for daemon in daemons:
                daemon.ask_to_stop()
            killed += [daemon.id for daemon in daemons if not daemon.wait()]
        if self.consul is not None:
            self.consul.stop()
        return killed

    def died(self) -> list[str]:
        """One line for each daemon that ended although it should run, with the last thing that it said."""
        return [
            f"{daemon.id} ended with status {daemon.exit_status}: {daemon.last_words() or 'no word'} ({daemon.log})"
            for daemon in [*self.masters.values(), *self.workers.values()]
            if daemon.exit_status is not None and daemon.process_id is None
        ]

    # What people and checks wait for

    def wait(self, what: str, done: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> float:
        """Waits until `done`; the seconds that it took. Raises QuickstartError when it takes longer than it may.

        An error of the cluster counts as "not yet": masters that elect a leader answer with one.
        """
        begun_s = time.monotonic()
        last = ""
        while True:
            try:
                if done():
                    return time.monotonic() - begun_s
                last = ""
            except CoordinatorError as error:
                last = f" ({error})"
            if time.monotonic() - begun_s > timeout_s:
                raise QuickstartError(
                    f"no {what} after {timeout_s:.0f} s{last}; the logs are in {self.directory / 'logs'}"
                )
            time.sleep(POLL_S)

    def leader(self) -> str:
        """Id of the leader; empty while the masters do not agree on one that answers."""
        masters = self.client.list_masters().masters
        return next((master.id for master in masters if master.role == "leader"), "")

    def active(self) -> set[str]:
        """Ids of the workers that are in, that the leader hears, and that may receive."""
        return {
            view.node.id
            for view in self.client.list_nodes().nodes
            if view.node.state == types_pb2.NODE_STATE_ACTIVE and view.connected and not view.node.suspect_since_unix_ms
        }

    def node(self, worker_id: str) -> types_pb2.Node:
        """What the masters have agreed on about a worker; empty when they do not know it."""
        return next((view.node for view in self.client.list_nodes(node_id=worker_id).nodes), types_pb2.Node())

    def shards(self) -> list[types_pb2.Shard]:
        """All shards."""
        return list(self.client.list_shards().shards)

    def is_whole(self) -> bool:
        """True when every shard has a primary and its full count of in-sync replicas on workers that serve."""
        active, replicas = self.active(), self.config.placement.replicas
        shards = self.shards()
        return bool(shards) and all(
            shard.primary in active and len(set(shard.in_sync) & active) >= min(replicas, len(active))
            for shard in shards
        )

    def is_at_rest(self) -> bool:
        """True when nothing moves, and the planner would not start anything."""
        return not self.client.list_moves().moves and not self.plan().moves

    def plan(self) -> cluster_pb2.PlanRebalanceResponse:
        """What the planner would do now."""
        return self.client.plan_rebalance()

    def wait_ready(self, worker_ids: Sequence[str], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until there is a leader, the workers are in, and every shard and job has its owners."""

        def ready() -> bool:
            if died := self.died():
                raise QuickstartError(died[0])
            if not set(worker_ids) <= self.active():
                return False
            jobs = self.client.list_jobs().jobs
            return self.is_whole() and all(view.job.owner for view in jobs) and len(jobs) >= len(self.config.cron.jobs)

        self.wait("healthy cluster", ready, timeout_s)
