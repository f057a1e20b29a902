"""The worker's daemon: makes the parts, joins them, and takes them down in the right order.

    discovery --masters--> driver <--> session machine          the leader: leases, assignments, launch orders
                             |---> hosting machine --> assignment.bin
                             |---> launcher --> runs
                             |---> shards: replicas, stores <-- replication --> other workers
                                     ^---- gRPC StateService <-- clients
                                     ^---- application: told what is served, reads and writes it
    HTTP /health, /metrics <-- view of all of it

Up: the lock, then the servers (so that what is registered is what is bound), then discovery, then the
session. Down, the other way round: runs are ended and reported, the leader hears a Goodbye, the
registration is taken back, the servers close. A worker that is told to stop is away within `stop_grace_s`
plus a few seconds, whoever answers or not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from coordinator import __version__
from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import ClusterConfig, WorkerSettings
from coordinator.discovery import make_discovery
from coordinator.discovery.interface import Discovery, Registration
from coordinator.model import Clock, SystemClock
from coordinator.security import certificates
from coordinator.security.credentials import Credentials, of_daemon
from coordinator.server.http import HttpServer, join_address, split_address
from coordinator.server.lock import DirectoryLock
from worker_agent.application import Handlers, OwnedShard, load_application
from worker_agent.driver import SessionDriver
from worker_agent.files import read_if_there
from worker_agent.hosting import Hosting, Stored, decode
from worker_agent.launch_service import LaunchService
from worker_agent.launch_tally import LaunchTally
from worker_agent.launcher import Launcher
from worker_agent.local_state import LocalState
from worker_agent.metrics import figures, read_counters
from worker_agent.observe import View, health_document, make_registry
from worker_agent.replication import Replication
from worker_agent.server import WorkerServer
from worker_agent.session import WorkerSession
from worker_agent.session_interface import End, SessionTimes
from worker_agent.shard import Shard
from worker_agent.shard_context import replica_times
from worker_agent.shard_interface import ReplicaRole
from worker_agent.shards import Shards
from worker_agent.state_service import StateService

ASSIGNMENT_FILE = "assignment.bin"
ANYWHERE = frozenset({"0.0.0.0", "::"})
"""Hosts to listen at that nobody can connect to."""
STORES_DIRECTORY = "shards"
HAND_OVER_S = 1.0
"""How long a stop waits for what is in flight in the shards."""
STOPS = "the worker agent stops"
COUNT_EVERY_S = 2.0
"""How often the leader hears how much is in the shards."""
SHOW_EVERY_S = 5.0
"""How often the registration follows what the worker carries."""

_log = logging.getLogger(__name__)


class WorkerAgent:
    """One worker. `run` lasts until the worker is stopped, or the masters end its session for good."""

    def __init__(
        self,
        config: ClusterConfig,
        settings: WorkerSettings,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        times: SessionTimes | None = None,
        accepted_cluster_id: str = "",
    ) -> None:
        self._config = config
        self._settings = settings
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._times = times
        self._accepted_cluster_id = accepted_cluster_id
        self._directory = Path(config.data_directory) / settings.id
        self._assignment_path = self._directory / ASSIGNMENT_FILE
        self._stop_reason = ""
        self._stop = asyncio.Event()
        self._tally = LaunchTally()
        self._handlers: Handlers | None = None
        self._metrics = session_pb2.NodeMetrics()
        self.ready = asyncio.Event()
        """Set once the worker listens and looks for its leader."""
        self.grpc_address = ""
        """Where the worker's gRPC server really answers."""
        self.http_address = ""
        """Where `/health` and `/metrics` really answer."""

    def request_stop(self, reason: str) -> None:
        """Asks `run` to stop cleanly; harmless when it is stopping already."""
        if not self._stop.is_set():
            self._stop_reason = reason
            self._stop.set()

    async def run(self) -> End:
        """Runs the worker; returns the exit status and why.

        Raises CoordinatorError or OSError, each with one line for people, when it cannot start.
        """
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self.ready.set()
            _log.info("worker %s ready: grpc=%s http=%s", self._settings.id, self.grpc_address, self.http_address)
            stop = asyncio.create_task(self._stop.wait())
            awaited: set[asyncio.Future[Any]] = {stop, self._driver.ended}
            try:
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stop.cancel()
            if not self._driver.ended.done():
                _log.info("stopping: %s", self._stop_reason)
                await self._server.say_stopping()
                # The runs end before the Goodbye: with it the leader may start them elsewhere.
                self._launcher.take_no_orders(STOPS)
                await asyncio.gather(self._launcher.stop_all(STOPS), self._release())
                await self._shards.hand_over(HAND_OVER_S)
                self._driver.stop(self._stop_reason)
            self._stop.set()
            return await self._driver.ended

    # Up

    async def _start(self, stack: AsyncExitStack) -> None:
        lock = DirectoryLock(self._directory)
        await asyncio.to_thread(lock.acquire)
        stack.callback(lock.release)
        stored = await asyncio.to_thread(self._read_assignment)
        credentials = of_daemon(self._config, certificates.Role.WORKER, self._settings.id)
        discovery = make_discovery(self._config)
        node = self._join(discovery, stored, credentials)
        self.grpc_address = node.grpc_address = await self._reachable(await self._server.start())
        stack.push_async_callback(self._server.stop)
        stack.push_async_callback(self._replication.close)
        stack.push_async_callback(self._shards.close)
        stack.push_async_callback(self._state.close)
        if self._settings.application:
            local = LocalState(node.id, self._state.core, self._shards)
            application = load_application(self._settings.application, local)
            self._handlers = Handlers(application, release_s_max=self._settings.stop_grace_s)
        stack.push_async_callback(self._release)
        http = HttpServer(self._settings.http_address, self._health, make_registry(self._view))
        self.http_address = node.http_address = await self._reachable(await http.start())
        stack.push_async_callback(http.stop)
        await discovery.start()
        stack.push_async_callback(discovery.stop)
        await discovery.register(self._registration())
        stack.push_async_callback(_run_beside(self._measure(), self._show(discovery), self._count()))
        await self._launcher.start()
        stack.push_async_callback(self._launcher.stop)
        self._driver.start()
        stack.push_async_callback(self._driver.close)

    def _read_assignment(self) -> Stored | None:
        content = read_if_there(self._assignment_path)
        return None if content is None else decode(content, str(self._assignment_path))

    def _join(self, discovery: Discovery, stored: Stored | None, credentials: Credentials | None) -> types_pb2.Node:
        """Makes the parts; returns the worker's description, whose addresses are known once the servers listen."""
        node = types_pb2.Node(
            id=self._settings.id,
            zone=self._settings.zone,
            weight=self._settings.weight,
            version=__version__,
            incarnation=secrets.token_hex(8),
            labels=dict(self._settings.labels),
        )
        self._session = WorkerSession(
            node,
            self._config.name,
            self._rng,
            # Whoever accepts a cluster gives the data to it, so the one that it was of is refused from now on.
            cluster_id=self._accepted_cluster_id or ("" if stored is None else stored.cluster_id),
            generation=0 if stored is None else stored.assignment.generation,
            times=self._times,
        )
        self._hosting = Hosting(stored)
        state = self._config.state
        self._shards = Shards(
            node.id,
            self._directory / STORES_DIRECTORY,
            self._clock,
            state,
            replica_times(self._config),
            self._session.has_lease,
            lambda report: self._driver.report_replica(report),
            self._on_serving,
        )
        self._replication = Replication(
            node.id,
            node.incarnation,
            self._config.name,
            credentials,
            on_connected=self._shards.on_connected,
            on_lost=self._shards.on_lost,
            on_message=self._shards.on_message,
        )
        self._shards.attach(self._replication)
        self._state = StateService(self._shards, state, node.id, credentials)
        self._launcher = self._make_launcher()
        launches = LaunchService(self._launcher, self._settings.id)
        self._server = WorkerServer(self._settings.grpc_address, credentials, self._state, self._replication, launches)
        self._driver = SessionDriver(
            session=self._session,
            hosting=self._hosting,
            shards=self._shards,
            launcher=self._launcher,
            discovery=discovery,
            clock=self._clock,
            assignment_path=self._assignment_path,
            metrics=self._node_metrics,
            credentials=credentials,
        )
        return node

    def _make_launcher(self) -> Launcher:
        session = self._config.session
        return Launcher(
            self._directory,
            self._settings,
            self._settings.id,
            self._clock,
            self._on_launch_report,
            has_lease=lambda: self._session.has_lease(self._clock.monotonic()),
            # Half of what the leader counts longer; the other half is for the kill, and for clocks that drift.
            lease_grace_s=0.5 * session.session_lease_s * (session.lease_margin - 1.0),
        )

    async def _reachable(self, bound: str) -> str:
        """The address to tell others: where the worker listens everywhere, the one that its masters see."""
        host, port = split_address(bound)
        if host not in ANYWHERE or not self._config.masters:
            return bound
        master = self._config.masters[0].grpc_address
        return join_address(await asyncio.to_thread(_own_host_towards, master, host), port)

    def _registration(self) -> Registration:
        held = self._hosting.views
        meta = {
            "cluster": self._config.name,
            "grpc_address": self.grpc_address,
            "http_address": self.http_address,
            "jobs": str(len(self._hosting.jobs_owned)),
            "primaries": str(sum(shard.role is ReplicaRole.PRIMARY for shard in held)),
            "shards": str(len(held)),
            "version": __version__,
            "weight": f"{self._settings.weight:g}",
            "zone": self._settings.zone,
        }
        return Registration(
            service=self._config.discovery.consul.worker_service,
            id=self._settings.id,
            grpc_address=self.grpc_address,
            http_address=self.http_address,
            tags=(self._settings.zone,) if self._settings.zone else (),
            meta=tuple(sorted(meta.items())),
        )

    # While it runs

    async def _measure(self) -> None:
        """Keeps the figures fresh, one reading per heartbeat, in a thread: a disk that hangs delays no heartbeat."""
        before = await asyncio.to_thread(read_counters, self._clock.monotonic(), self._directory)
        while True:
            await asyncio.sleep(self._config.session.heartbeat_s)
            after = await asyncio.to_thread(read_counters, self._clock.monotonic(), self._directory)
            self._metrics, before = figures(before, after), after

    async def _show(self, discovery: Discovery) -> None:
        """Lets the registration follow what the worker carries."""
        shown = self._registration()
        while True:
            await asyncio.sleep(SHOW_EVERY_S)
            current = self._registration()
            if current != shown:
                await discovery.register(current)
                shown = current

    async def _count(self) -> None:
        """Tells the leader how much is in the shards that this worker answers for."""
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            figures = await self._shards.figures()
            if figures.shards:
                self._driver.report_figures(figures)

    def _node_metrics(self) -> session_pb2.NodeMetrics:
        metrics = session_pb2.NodeMetrics()
        metrics.CopyFrom(self._metrics)
        metrics.open_streams = self._server.open_calls
        metrics.running_launches = self._launcher.running
        metrics.unwritable_shards = sum(shard.is_unwritable for shard in self._shards.shards)
        return metrics

    def _on_serving(self, shard: Shard, is_serving: bool) -> None:
        if self._handlers is not None:
            view = shard.view
            self._handlers.on_serving(OwnedShard(view.shard_id, view.lo, view.hi, view.epoch), is_serving)

    async def _release(self) -> None:
        """The application lets go of its shards."""
        if self._handlers is not None:
            await self._handlers.close()

    def _on_launch_report(self, report: session_pb2.LaunchReport) -> None:
        self._tally.count(report)
        self._driver.report_launch(report)

    def _view(self) -> View:
        return View(
            worker_id=self._settings.id,
            zone=self._settings.zone,
            version=__version__,
            phase=self._session.phase,
            leader_id=self._session.leader_id,
            lease_left_s=self._session.lease_until - self._clock.monotonic(),
            sessions_opened=self._driver.sessions_opened,
            generation=self._hosting.generation,
            metrics=self._node_metrics(),
            queue_depth=self._launcher.waiting,
            output_bytes=self._launcher.outputs.bytes_kept,
            reports_pending=len(self._launcher.pending_reports()),
            jobs_owned=self._hosting.jobs_owned,
            jobs_backed=self._hosting.jobs_backed,
            jobs_failing=frozenset(self._tally.failing),
            replicas_by_role=Counter(view.role for view in self._hosting.views),
            shards_by_state=Counter(shard.state for shard in self._shards.shards),
            launches_by_end=self._tally.by_end,
            scrub=self._shards.scrub_tally,
            scrub_age_s=self._shards.scrub_age_s,
            damaged_shards=sum(bool(shard.care.damage) for shard in self._shards.shards),
            storage_problem=self._driver.storage_problem,
            is_stopping=self._stop.is_set(),
        )

    def _health(self) -> tuple[int, dict[str, Any]]:
        return health_document(self._view(), self._clock.wall_ms())


def _run_beside(*coroutines: Coroutine[Any, Any, None]) -> Callable[[], Awaitable[None]]:
    """Starts background work; what it returns ends it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(_log_failure)

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return end


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("background work ended by a bug", exc_info=error)


def _own_host_towards(address: str, otherwise: str) -> str:
    """The host of this machine from which packets to `address` would leave; connecting a datagram socket sends none."""
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError:
        return otherwise
