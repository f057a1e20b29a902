"""A whole cluster of real processes on this machine, for tests and measurements.

    with LocalCluster(tmp_path, masters=3, workers=3) as cluster:
        cluster.start()
        cluster.wait_ready()
        cluster.kill("m1")                      # kill -9
        cluster.client().get_status()

The configuration is written to `directory/cluster.toml`, data to `directory/data`, an authority with everybody's
certificates to `directory/certificates`, what the daemons print to `directory/logs/<id>.log`. Leaving the `with` block
ends every process, whatever happened. Nothing here sleeps for a fixed time: `wait_until` asks again until it is so, or
says what did not come true.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig, DiscoverySettings, MasterSettings, WorkerSettings
from coordinator.config_file import render
from coordinator.model.errors import CoordinatorError
from coordinator.security.credentials import PLAINTEXT, Credentials, of_client
from coordinator.security.provision import ensure_cluster
from tools.lib.daemons import Daemon
from tools.lib.ports import free_ports

Ports = Literal["free", "quickstart"]
QUICKSTART_GRPC, QUICKSTART_PEER, QUICKSTART_HTTP = 7101, 7151, 7201
QUICKSTART_WORKER_GRPC, QUICKSTART_WORKER_HTTP = 7301, 7401
READY_TIMEOUT_S = 30.0
POLL_S = 0.05

Found = TypeVar("Found")


class NotSoInTime(AssertionError):
    """What was waited for did not come true within the deadline."""


def wait_until(look: Callable[[], Found | None], timeout_s: float, what: str) -> Found:
    """Asks again until `look` answers something that counts as true, and returns that.

    A CoordinatorError of `look` counts as "not yet". Raises NotSoInTime, with `what` and the last error, after
    `timeout_s`.
    """
    give_up_at_s = time.monotonic() + timeout_s
    last: CoordinatorError | None = None
    while True:
        try:
            if found := look():
                return found
        except CoordinatorError as error:
            last = error
        if time.monotonic() >= give_up_at_s:
            raise NotSoInTime(f"not within {timeout_s:g} s: {what}{f' (last error: {last})' if last else ''}")
        time.sleep(POLL_S)


def make_config(
    masters: int, workers: int, ports: Ports = "free", discovery: DiscoverySettings | None = None
) -> ClusterConfig:
    """The configuration of a cluster on the loopback address: masters m1, m2, ... and workers w1, w2, ..."""
    numbers = range(masters)
    if ports == "free":
        given = free_ports(3 * masters)
        grpc, peer, http = given[:masters], given[masters : 2 * masters], given[2 * masters :]
    else:
        grpc = [QUICKSTART_GRPC + number for number in numbers]
        peer = [QUICKSTART_PEER + number for number in numbers]
        http = [QUICKSTART_HTTP + number for number in numbers]
    return ClusterConfig(
        name="local",
        discovery=discovery or DiscoverySettings(),
        masters=tuple(
            MasterSettings(
                id=f"m{number + 1}",
                grpc_address=f"127.0.0.1:{grpc[number]}",
                peer_address=f"127.0.0.1:{peer[number]}",
                http_address=f"127.0.0.1:{http[number]}",
            )
            for number in numbers
        ),
        workers=tuple(_worker(number, ports) for number in range(workers)),
    )


def _worker(number: int, ports: Ports) -> WorkerSettings:
    """A worker's settings; with free ports it takes what the system gives it when it starts."""
    worker = WorkerSettings(id=f"w{number + 1}")
    if ports == "free":
        return worker
    return replace(
        worker,
        grpc_address=f"127.0.0.1:{QUICKSTART_WORKER_GRPC + number}",
        http_address=f"127.0.0.1:{QUICKSTART_WORKER_HTTP + number}",
    )


class LocalCluster:
    """The daemons of one directory; a context manager. Ids are "m1", "m2", ... and "w1", "w2", ..."""

    def __init__(
        self,
        directory: Path,
        *,
        masters: int = 3,
        workers: int = 3,
        ports: Ports = "free",
        discovery: DiscoverySettings | None = None,
        change: Callable[[ClusterConfig], ClusterConfig] | None = None,
    ) -> None:
        """Writes the configuration; starts nothing. `change` may alter any setting before it is written."""
        self.directory = directory
        config = make_config(masters, workers, ports, discovery)
        self.config = config if change is None else change(config)
        directory.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(render(self.config), encoding="utf-8")
        self._certify()
        self._daemons: dict[str, Daemon] = {
            **{master.id: Daemon.master(master.id, directory) for master in self.config.masters},
            **{worker.id: Daemon.worker(worker.id, directory) for worker in self.config.workers},
        }
        self._clients: list[ClusterClient] = []

    @property
    def config_path(self) -> Path:
        """The cluster.toml that all daemons read."""
        return self.directory / "cluster.toml"

    @property
    def master_ids(self) -> list[str]:
        """Ids of the masters."""
        return [master.id for master in self.config.masters]

    @property
    def worker_ids(self) -> list[str]:
        """Ids of the workers that were configured or added."""
        return [daemon_id for daemon_id in self._daemons if daemon_id not in self.master_ids]

    def process(self, daemon_id: str) -> Daemon:
        """A daemon's process: `process_id`, `exit_status`, `log`, `last_words()`."""
        return self._daemons[daemon_id]

    @property
    def certificates(self) -> Path:
        """Where the authority and all certificates are."""
        return self.directory / self.config.security.directory

    def credentials(self) -> Credentials | None:
        """The operator's; None for a cluster in plain text."""
        return of_client(self.config, directory=self.certificates)

    def _certify(self, *workers: str) -> None:
        if self.config.security.mode != PLAINTEXT:
            ensure_cluster(self.certificates, self.config, workers)

    # Processes

    def start(self, daemon_ids: Iterable[str] | None = None) -> None:
        """Starts the daemons named, or all; those that run are left alone. Returns at once."""
        for daemon_id in list(self._daemons) if daemon_ids is None else daemon_ids:
            self._daemons[daemon_id].start()

    def stop(self, daemon_ids: Iterable[str] | None = None) -> list[str]:
        """Stops the daemons named, or all, workers first, with SIGTERM; the ids of those that had to be killed."""
        chosen = list(self._daemons) if daemon_ids is None else list(daemon_ids)
        masters = [self._daemons[daemon_id] for daemon_id in chosen if daemon_id in self.master_ids]
        workers = [self._daemons[daemon_id] for daemon_id in chosen if daemon_id not in self.master_ids]
        killed = []
        for group in (workers, masters):
            for daemon in group:
                daemon.ask_to_stop()
            killed += [daemon.id for daemon in group if not daemon.wait()]
        return killed

    def kill(self, daemon_id: str) -> None:
        """Ends a daemon at once (kill -9)."""
        self._daemons[daemon_id].kill()

    def restart(self, daemon_id: str) -> None:
        """Stops a daemon if it runs, and starts it again."""
        self._daemons[daemon_id].stop()
        self._daemons[daemon_id].start()

    def restart_with(self, daemon_id: str, *arguments: str) -> None:
        """Starts a daemon anew with further arguments, which it keeps from then on."""
        self._daemons[daemon_id].stop()
        self._daemons[daemon_id].arguments = arguments
        self._daemons[daemon_id].start()

    def add_worker(self, worker_id: str) -> None:
        """Starts a further worker, with the settings that the configuration gives to workers that it does not name."""
        self._certify(worker_id)
        self._daemons.setdefault(worker_id, Daemon.worker(worker_id, self.directory)).start()

    # Questions

    def client(self, master_ids: Sequence[str] | None = None, timeout_s: float = 10.0) -> ClusterClient:
        """A client of the masters named, or of all; closed with the cluster."""
        wanted = self.master_ids if master_ids is None else master_ids
        addresses = [master.grpc_address for master in self.config.masters if master.id in wanted]
        client = ClusterClient(addresses, timeout_s=timeout_s, credentials=self.credentials())
        self._clients.append(client)
        return client

    def wait_leader(self, timeout_s: float = READY_TIMEOUT_S, other_than: str = "") -> str:
        """Waits until a master leads and answers, and returns its id; `other_than` is one that does not count."""
        with self._short_client() as client:

            def leader() -> str:
                self.raise_if_dead()
                status = client.get_status()
                return status.leader_id if status.cluster_id and status.leader_id != other_than else ""

            return wait_until(leader, timeout_s, f"a master leads{f', other than {other_than}' if other_than else ''}")

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> cluster_pb2.GetStatusResponse:
        """Waits until all runs well: a leader, every started worker active, every shard at its replica count."""
        running = {worker_id for worker_id in self.worker_ids if self._daemons[worker_id].process_id is not None}
        with self._short_client() as client:

            def ready() -> cluster_pb2.GetStatusResponse | None:
                self.raise_if_dead()
                status = client.get_status()
                nodes = client.list_nodes().nodes
                active = {
                    view.node.id
                    for view in nodes
                    if view.node.state == types_pb2.NODE_STATE_ACTIVE and not view.node.suspect_since_unix_ms
                }
                is_whole = not status.shards_short_of_replicas and not status.shards_unavailable
                if not status.leader_id or not status.cluster_id or not running <= active:
                    return None
                is_busy = is_whole and not status.jobs_without_owner
                return status if is_busy or not running else None

            return wait_until(ready, timeout_s, f"a leader, {len(running)} active workers, all shards whole")

    def wait_back(self, master_id: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until a master that was started takes part: it follows a leader, or leads."""
        with self._short_client() as client:

            def is_back() -> bool:
                self.raise_if_dead()
                return any(master.id == master_id and master.leader_id for master in client.get_status().masters)

            wait_until(is_back, timeout_s, f"{master_id} takes part again")

    def raise_if_dead(self) -> None:
        """Raises AssertionError with its last words when a daemon failed by itself."""
        for daemon in self._daemons.values():
            if daemon.exit_status not in (None, 0, -9, -15):
                raise AssertionError(f"{daemon.id} ended with status {daemon.exit_status}: {daemon.last_words()}")

    def _short_client(self) -> ClusterClient:
        """A client for waiting: an answer that takes long is asked for again."""
        addresses = [master.grpc_address for master in self.config.masters]
        return ClusterClient(addresses, timeout_s=5.0, credentials=self.credentials())

    def close(self) -> None:
        """Ends everything, at once."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        for daemon in self._daemons.values():
            daemon.kill()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
