"""The gRPC LaunchService of a worker: what the runs printed that it kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc import aio

from coordinator.api.v1 import launch_pb2, launch_pb2_grpc
from coordinator.control.schedule import format_wall
from coordinator.model import WallMs
from coordinator.model.errors import CoordinatorError, RefusalReason, Refused
from worker_agent.launch_output import LaunchKey
from worker_agent.launcher import Launcher

Context = aio.ServicerContext[Any, Any]


class LaunchService(launch_pb2_grpc.LaunchServiceServicer):
    """Serves the outputs of one worker's runs."""

    def __init__(self, launcher: Launcher, worker_id: str) -> None:
        self._launcher = launcher
        self._worker_id = worker_id

    async def ReadOutput(
        self, request: launch_pb2.ReadOutputRequest, context: Context
    ) -> AsyncIterator[launch_pb2.ReadOutputResponse]:
        """What one attempt printed. The first message says which, and has no data."""
        key = self._find(request)
        yield launch_pb2.ReadOutputResponse(attempt=key.attempt, offset_bytes=request.offset_bytes)
        try:
            pieces = self._launcher.outputs.read(key, request.offset_bytes, follow=request.follow)
            async with aclosing(pieces):
                async for offset_bytes, data in pieces:
                    yield launch_pb2.ReadOutputResponse(attempt=key.attempt, offset_bytes=offset_bytes, data=data)
        except OSError as error:
            raise CoordinatorError(f"worker {self._worker_id} cannot read the output of {key.token}: {error}") from None

    def _find(self, request: launch_pb2.ReadOutputRequest) -> LaunchKey:
        job_id, scheduled_at_ms = request.job_id, request.scheduled_at_unix_ms
        attempt = request.attempt or self._launcher.latest_attempt(job_id, scheduled_at_ms)
        key = LaunchKey(job_id, scheduled_at_ms, attempt)
        if not attempt or not self._launcher.knows(key):
            which = f"attempt {request.attempt} of " if request.attempt else ""
            raise Refused(
                RefusalReason.NOT_FOUND,
                f"worker {self._worker_id} has no output of {which}{job_id} at {format_wall(WallMs(scheduled_at_ms))}:"
                " it did not run here, or is no longer kept",
            )
        return key
