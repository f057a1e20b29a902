"""Reads what a run printed from the worker that ran it, and follows it until its end, across lost connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from grpc import aio

from coordinator.api.v1 import launch_pb2, types_pb2
from coordinator.client.errors import error_of
from coordinator.client.retry import may_retry
from coordinator.client.workers import WorkerLinks
from coordinator.model.errors import CoordinatorError, RefusalReason, Refused

LOOK_S = 0.3
"""How often the masters are asked while a launch that is followed has not begun, or its worker does not answer."""
_GOES_ON = (types_pb2.LAUNCH_STATE_WAITING, types_pb2.LAUNCH_STATE_COMMITTED, types_pb2.LAUNCH_STATE_RUNNING)

FindLaunch = Callable[[], Coroutine[Any, Any, types_pb2.Launch]]
FindAddress = Callable[[str], Coroutine[Any, Any, str]]


def worker_of(launch: types_pb2.Launch, attempt: int) -> str:
    """Who has, or had, this attempt; empty when nobody had."""
    if attempt == launch.attempt:
        return launch.worker
    return next((past.worker for past in launch.earlier_attempts if past.attempt == attempt), "")


class RunOutputReader:
    """One reading of one attempt."""

    def __init__(
        self, links: WorkerLinks, find_launch: FindLaunch, find_address: FindAddress, timeout_s: float
    ) -> None:
        """`find_launch` asks the masters how the launch stands, `find_address` where a worker answers."""
        self._links = links
        self._find_launch = find_launch
        self._find_address = find_address
        self._timeout_s = timeout_s

    async def read(self, attempt: int, *, follow: bool) -> AsyncGenerator[launch_pb2.ReadOutputResponse, None]:
        """The pieces of an attempt (0 for the latest), with `follow` until it has ended. Raises CoordinatorError."""
        launch = await self._begun(attempt, follow=follow)
        is_latest, attempt = not attempt, attempt or launch.attempt
        loop = asyncio.get_running_loop()
        request = launch_pb2.ReadOutputRequest(
            job_id=launch.job_id, scheduled_at_unix_ms=launch.scheduled_at_unix_ms, attempt=attempt, follow=follow
        )
        heard_at_s = loop.time()
        while True:
            try:
                async for piece in self._attempt(worker_of(launch, attempt), request):
                    heard_at_s = loop.time()
                    request.offset_bytes = piece.offset_bytes + len(piece.data)
                    yield piece
                return
            except CoordinatorError as error:
                # An order may be on its way, and a worker be away for a moment.
                can_help = may_retry(error) or (isinstance(error, Refused) and error.reason is RefusalReason.NOT_FOUND)
                if not follow or not can_help or loop.time() - heard_at_s > self._timeout_s:
                    raise
                launch = await self._find_launch()
                if is_latest and not request.offset_bytes and (launch.attempt > attempt or not launch.worker):
                    # It was declined, or lost before it printed anything: the next one is the latest.
                    launch = await self._begun(0, follow=follow)
                    request.attempt = attempt = launch.attempt
                    heard_at_s = loop.time()
                elif launch.state not in _GOES_ON or launch.attempt != attempt or not launch.worker:
                    raise
            await asyncio.sleep(LOOK_S)

    async def _begun(self, attempt: int, *, follow: bool) -> types_pb2.Launch:
        """The launch, once the attempt has a worker."""
        while True:
            launch = await self._find_launch()
            if worker_of(launch, attempt or launch.attempt):
                return launch
            if not follow or launch.state not in _GOES_ON:
                which = f"attempt {attempt}" if attempt else "launch"
                raise Refused(RefusalReason.NOT_FOUND, f"this {which} of {launch.job_id} did not run: {_why(launch)}")
            await asyncio.sleep(LOOK_S)

    async def _attempt(
        self, worker_id: str, request: launch_pb2.ReadOutputRequest
    ) -> AsyncGenerator[launch_pb2.ReadOutputResponse, None]:
        link = await self._links.connect(await self._find_address(worker_id), self._timeout_s)
        stream = link.launches.ReadOutput(request, timeout=None if request.follow else self._timeout_s)
        try:
            async for piece in stream:
                yield piece
        except aio.AioRpcError as failure:
            raise error_of(failure, link.address) from None
        finally:
            stream.cancel()


def _why(launch: types_pb2.Launch) -> str:
    state = types_pb2.LaunchState.Name(launch.state).removeprefix("LAUNCH_STATE_").lower()
    return f"{state}; {launch.reason}" if launch.reason else f"it is {state}"
