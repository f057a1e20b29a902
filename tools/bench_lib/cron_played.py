"""Workers that are played: they take orders and report at once, without a process, so that the leader is what limits.

They speak the sessions' protocol from this process, with real certificates; shards are accepted and kept nowhere.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import ClusterConfig
from coordinator.security.certificates import Role
from coordinator.security.credentials import Credentials, of_daemon
from worker_agent.stream import MasterStream

NS_PER_S = 1_000_000_000
RETRY_S = 0.1


class PlayedWorker:
    """One worker; `orders_ns` has when each order came."""

    def __init__(self, config: ClusterConfig, worker_id: str) -> None:
        self.orders_ns: list[int] = []
        self.welcomed = asyncio.Event()
        self._config = config
        self._node = types_pb2.Node(id=worker_id, weight=1.0, incarnation="played", grpc_address="127.0.0.1:1")
        self._credentials: Credentials | None = of_daemon(config, Role.WORKER, worker_id)
        self._stream: MasterStream | None = None
        self._generation = 0
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends its session."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._stream is not None:
            await self._stream.close()

    async def _run(self) -> None:
        """Goes from master to master until one welcomes it, and says that it lives."""
        while True:
            for master in self._config.masters:
                ended = asyncio.Event()
                self._stream = MasterStream(
                    master.grpc_address,
                    self._credentials,
                    on_opened=self._say_hello,
                    on_response=self._on_response,
                    on_ended=lambda code, reason, ended=ended: ended.set(),  # type: ignore[misc]
                )
                sequence = 0
                while not ended.is_set():
                    try:
                        await asyncio.wait_for(ended.wait(), self._config.session.heartbeat_s)
                    except TimeoutError:
                        sequence += 1
                        if self.welcomed.is_set():
                            beat = session_pb2.Heartbeat(sequence=sequence, applied_generation=self._generation)
                            self._say(session_pb2.OpenRequest(heartbeat=beat))
                self.welcomed.clear()
            await asyncio.sleep(RETRY_S)

    def _say(self, request: session_pb2.OpenRequest) -> None:
        assert self._stream is not None
        self._stream.send(request)

    def _say_hello(self) -> None:
        hello = session_pb2.Hello(node=self._node, cluster_name=self._config.name, protocol_version=1)
        self._say(session_pb2.OpenRequest(hello=hello))

    def _on_response(self, response: session_pb2.OpenResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self.welcomed.set()
            case "assignment":
                self._generation = response.assignment.generation
                reports = [_report(entry) for entry in response.assignment.shards]
                self._say(session_pb2.OpenRequest(replica_reports=session_pb2.ReplicaReports(reports=reports)))
            case "launch_order":
                self.orders_ns.append(time.time_ns())
                self._report_run(response.launch_order.launch)
            case _:
                pass

    def _report_run(self, launch: types_pb2.Launch) -> None:
        now_ms = time.time_ns() // 1_000_000
        for state in (types_pb2.LAUNCH_STATE_RUNNING, types_pb2.LAUNCH_STATE_SUCCEEDED):
            report = session_pb2.LaunchReport(
                job_id=launch.job_id,
                scheduled_at_unix_ms=launch.scheduled_at_unix_ms,
                attempt=launch.attempt,
                state=state,
                started_unix_ms=now_ms,
                finished_unix_ms=now_ms if state == types_pb2.LAUNCH_STATE_SUCCEEDED else 0,
            )
            self._say(session_pb2.OpenRequest(launch_report=report))


def _report(entry: session_pb2.ShardAssignment) -> session_pb2.ReplicaReport:
    """All is well, at once."""
    is_joining = entry.role == session_pb2.REPLICA_ROLE_JOINING
    progress = session_pb2.REPLICA_PROGRESS_CAUGHT_UP if is_joining else session_pb2.REPLICA_PROGRESS_ACCEPTED
    if entry.cede_to:
        progress = session_pb2.REPLICA_PROGRESS_CEDED
    report = session_pb2.ReplicaReport(shard_id=entry.shard.id, epoch=entry.shard.epoch, progress=progress)
    if entry.role == session_pb2.REPLICA_ROLE_PRIMARY:
        report.caught_up.extend(entry.shard.joining)
    return report


class PlayedWorkers:
    """All workers of a configuration; a context manager."""

    def __init__(self, config: ClusterConfig, certificates: Path) -> None:
        self._config = replace(config, security=replace(config.security, directory=str(certificates)))
        self._workers: list[PlayedWorker] = []

    async def __aenter__(self) -> PlayedWorkers:
        self._workers = [PlayedWorker(self._config, worker.id) for worker in self._config.workers]
        await asyncio.gather(*(worker.welcomed.wait() for worker in self._workers))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))

    def orders_per_s(self, from_ns: int, until_ns: int) -> float:
        """Orders that came in the window."""
        count = sum(from_ns <= at_ns < until_ns for worker in self._workers for at_ns in worker.orders_ns)
        return count * NS_PER_S / (until_ns - from_ns)
