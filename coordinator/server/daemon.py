"""One master: wires Raft, the leader's controllers, the servicers, HTTP and discovery together, and takes them down.

Order of the start: what can be wrong for this process alone comes first (directory, ports), so that it fails before it
touches the log or is seen by anybody. Then Raft, then the callers, then discovery. The stop goes the other way: a
leader hands its leadership on while it still answers, so that workers and clients lose nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import __version__
from coordinator.api.v1 import cluster_pb2, cluster_pb2_grpc, cron_pb2, cron_pb2_grpc, session_pb2, session_pb2_grpc
from coordinator.client.channels import server_options
from coordinator.config import ClusterConfig
from coordinator.config_file import master_settings
from coordinator.discovery import make_discovery
from coordinator.discovery.interface import Registration
from coordinator.model import Clock, SystemClock
from coordinator.model.errors import CoordinatorError
from coordinator.placement import Planner
from coordinator.raft.node import RaftNode
from coordinator.security.certificates import Role
from coordinator.security.credentials import add_port, of_daemon
from coordinator.server import health as health_view
from coordinator.server.authorize import AuthorizationInterceptor
from coordinator.server.cluster import ClusterServicer
from coordinator.server.cluster_parts import ClusterParts
from coordinator.server.context import MasterContext
from coordinator.server.cron import CronService
from coordinator.server.cron_metrics import CronMetrics
from coordinator.server.errors import ErrorInterceptor
from coordinator.server.forward import Forwarder, MasterChannels
from coordinator.server.handlers import registering_once
from coordinator.server.http import HttpServer, split_address
from coordinator.server.leader import LeaderDriver
from coordinator.server.lock import DirectoryLock
from coordinator.server.metrics import MasterMetrics
from coordinator.server.sessions import SessionHub, SessionServicer
from coordinator.server.story import Story

WATCH_PERIOD_S = 0.1
"""How often the master's own standing is compared with what it shows of itself."""
TRANSFER_TIMEOUT_S = 1.0
GRACE_S = 0.5
"""Time for calls in progress when the daemon stops."""
STOP_TIMEOUT_S = 3.0

SERVICES = (
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
    cron_pb2.DESCRIPTOR.services_by_name["CronService"].full_name,
    session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
)

_log = logging.getLogger(__name__)


class Master:
    """One master of the cluster, in this process and on this event loop."""

    def __init__(self, config: ClusterConfig, self_id: str, clock: Clock | None = None) -> None:
        """Reads this master's certificate. Raises ConfigError when that, or `self_id`, is not as it must be."""
        self._config = config
        self._settings = master_settings(config, self_id)
        self._clock = clock or SystemClock()
        self._credentials = of_daemon(config, Role.MASTER, self_id)
        directory = Path(config.data_directory) / self_id
        self._lock = DirectoryLock(directory)
        self._raft = RaftNode(
            self_id=self_id,
            masters=config.masters,
            cluster_name=config.name,
            directory=directory,
            settings=config.raft,
            clock=self._clock,
            credentials=self._credentials,
        )
        self._stopping = asyncio.Event()
        self._hub = SessionHub()
        self._metrics = MasterMetrics(self_id, self._raft, self._hub)
        self._master = MasterContext(
            config=config,
            self_id=self_id,
            raft=self._raft,
            clock=self._clock,
            started_ms=self._clock.wall_ms(),
            stopping=self._stopping,
            count_proposal=self._metrics.count_proposal,
        )
        self._discovery = make_discovery(config)
        self._channels = MasterChannels(config, self._credentials)
        self._story = Story(self._raft, self._stopping)
        self._driver = LeaderDriver(
            master=self._master, hub=self._hub, discovery=self._discovery, on_fatal=self._on_fatal
        )
        cron_metrics = CronMetrics(
            self._metrics.registry, lambda: self._raft.state, lambda: self._driver.is_running
        )
        self._raft.on_transition(cron_metrics.on_transition)
        self._http = HttpServer(self._settings.http_address, self._health_document, self._metrics.registry)
        self._health = health.aio.HealthServicer()
        self._server: aio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[None] | None = None
        self._shown: tuple[bool, bool, str] | None = None
        """What is shown of this master: ready, leading, leader's id."""

    # Life

    async def start(self) -> None:
        """Listens and takes part. Raises a CoordinatorError or OSError with one line; then nothing is left running."""
        self._failure = asyncio.get_running_loop().create_future()
        try:
            self._lock.acquire()
            self._server = self._make_server()
            await self._http.start()
            await self._raft.start()
            self._raft.fatal.add_done_callback(self._on_end_of_work)
            await self._server.start()
            await self._discovery.start()
            self._watcher = asyncio.create_task(self._watch())
            self._watcher.add_done_callback(self._on_end_of_work)
        except BaseException:
            await self._take_down()
            raise
        _log.info(
            "master %s of cluster %s listens: gRPC %s, peers %s, HTTP %s",
            self._settings.id,
            self._config.name,
            self._settings.grpc_address,
            self._settings.peer_address,
            self._settings.http_address,
        )

    def _make_server(self) -> aio.Server:
        """The gRPC server with its port taken; calls are answered once it is started."""
        guards = () if self._credentials is None else (AuthorizationInterceptor(self._config.name),)
        interceptors = (ErrorInterceptor(self._metrics.count_call), *guards)
        server = aio.server(interceptors=interceptors, options=server_options())
        parts = ClusterParts(
            master=self._master,
            driver=self._driver,
            forwarder=Forwarder(self._master, self._channels),
            channels=self._channels,
            story=self._story,
            discovery=self._discovery,
            planner=Planner(self._config.placement),
        )
        sessions = SessionServicer(self._hub, self._config.name, self._driver.redirect_unless_leading)
        generic = registering_once(server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterServicer(parts), generic)
        cron_pb2_grpc.add_CronServiceServicer_to_server(CronService(self._master), generic)
        session_pb2_grpc.add_SessionServiceServicer_to_server(sessions, generic)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, generic)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = self._settings.grpc_address
        require_free(address)
        if add_port(server, address, self._credentials) == 0:
            raise CoordinatorError(_unusable(address, "gRPC cannot bind it"))
        return server

    async def wait_failed(self) -> None:
        """Waits until this master cannot go on, and raises why."""
        if self._failure is None:
            raise AssertionError("wait_failed before start")
        await asyncio.shield(self._failure)

    async def stop(self) -> None:
        """Leaves cleanly, within STOP_TIMEOUT_S: hands the leadership on, ends sessions and streams, closes the log."""
        self._stopping.set()
        self._story.wake()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._health.enter_graceful_shutdown()
                await self._hand_over()
                await self._take_down()
        except TimeoutError:
            _log.warning("master %s did not stop cleanly within %g s", self._settings.id, STOP_TIMEOUT_S)

    async def _hand_over(self) -> None:
        if not self._raft.is_leader or len(self._config.masters) == 1:
            return
        try:
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                await self._raft.transfer_leadership(None)
                await self._master.wait_for_leader(TRANSFER_TIMEOUT_S)
        except (CoordinatorError, TimeoutError) as error:
            _log.info("the leadership could not be handed on: %s", str(error) or f"not within {TRANSFER_TIMEOUT_S:g} s")

    async def _take_down(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._driver.stop()
        # Deregistration may wait for Consul; nobody else needs to wait for that.
        leaving = asyncio.create_task(self._discovery.stop())
        if self._server is not None:
            await self._server.stop(GRACE_S)
        await self._channels.close()
        await self._http.stop()
        await self._raft.stop()
        with contextlib.suppress(CoordinatorError, OSError):
            await leaving
        self._lock.release()

    # Failures

    def _on_fatal(self, error: BaseException) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    def _on_end_of_work(self, work: asyncio.Future[None]) -> None:
        """Background work has no end but the daemon's; one that fails takes the daemon with it."""
        if not work.cancelled() and (error := work.exception()) is not None:
            self._on_fatal(error)

    # What is shown of this master

    @property
    def leads(self) -> bool:
        """True while it is the leader, by what it knows."""
        return self._raft.is_leader

    def _health_document(self) -> tuple[int, Mapping[str, Any]]:
        view = health_view.View(
            master_id=self._settings.id,
            cluster_name=self._config.name,
            leader_id=self._master.leader_id,
            is_stopping=self._stopping.is_set(),
            sessions=self._hub.count,
            masters=len(self._config.masters),
            discovery=self._config.discovery.backend,
        )
        machine = health_view.read_machine(Path(self._config.data_directory))
        return health_view.health_document(
            view, self._raft.status(), self._raft.state, machine, self._clock.wall_ms()
        )

    async def _watch(self) -> None:
        """Keeps the health service and discovery in step with where this master stands."""
        while True:
            leader_id = self._master.leader_id
            standing = (self._raft.is_ready and bool(leader_id), self._raft.is_leader, leader_id)
            if standing != self._shown:
                await self._show(*standing)
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _show(self, is_ready: bool, is_leader: bool, leader_id: str) -> None:
        before, self._shown = self._shown, (is_ready, is_leader, leader_id)
        serving = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, serving)
        if leader_id and leader_id != (before[2] if before is not None else ""):
            self._metrics.count_leader_change()
            _log.info("%s leads in term %d", leader_id, self._raft.term)
        if before is None or before[1] != is_leader:
            await self._discovery.register(self._registration(is_leader))

    def _registration(self, is_leader: bool) -> Registration:
        meta = {
            "id": self._settings.id,
            "cluster": self._config.name,
            "version": __version__,
            "grpc_address": self._settings.grpc_address,
            "http_address": self._settings.http_address,
            "peer_address": self._settings.peer_address,
        }
        return Registration(
            service=self._config.discovery.consul.coordinator_service,
            id=self._settings.id,
            grpc_address=self._settings.grpc_address,
            http_address=self._settings.http_address,
            tags=("leader" if is_leader else "follower",),
            meta=tuple(sorted(meta.items())),
        )


def require_free(address: str) -> None:
    """Raises CoordinatorError with the system's reason when nothing can listen at "host:port".

    gRPC itself would say only that it failed, and write a line of its own to standard error.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # Elsewhere it would let two listeners share the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        raise CoordinatorError(_unusable(address, error.strerror or str(error))) from None


def _unusable(address: str, reason: str) -> str:
    return (
        f"gRPC address {address} cannot be used ({reason}); stop what listens there or configure another grpc_address"
    )
