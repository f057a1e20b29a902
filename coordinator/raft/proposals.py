"""Commands on their way through the consensus, on the side of those who wait for them.

What is definitely not applied because the leader was changing is proposed again until the deadline; what may be applied
never is. Every proposal ends at its deadline, also when the engine never calls back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from pysyncobj import FAIL_REASON

from coordinator.api.v1 import command_pb2
from coordinator.config import RaftSettings
from coordinator.model.errors import (
    CoordinatorError,
    InvalidRequest,
    NoLeader,
    OutcomeUnknown,
    Overloaded,
    TimedOut,
)
from coordinator.raft.consensus import Consensus
from coordinator.raft.engine import Callback

RETRY_S = 0.02
"""Pause before a command that was definitely not applied is proposed again; a fraction of an election."""
_PROPOSE_AGAIN = frozenset({FAIL_REASON.MISSING_LEADER, FAIL_REASON.NOT_LEADER, FAIL_REASON.DISCARDED})


def error_of(reason: int) -> CoordinatorError:
    """The exception for a FAIL_REASON other than SUCCESS. pysyncobj/syncobj.py shows which are definite:

    QUEUE_FULL, MISSING_LEADER, NOT_LEADER and REQUEST_DENIED are said before anything was appended; DISCARDED when
    another entry was committed at the command's index. LEADER_CHANGED, in spite of its documentation, leaves it open.
    """
    match reason:
        case FAIL_REASON.QUEUE_FULL:
            return Overloaded("the leader's queue is full; try again later")
        case FAIL_REASON.MISSING_LEADER | FAIL_REASON.NOT_LEADER:
            return NoLeader("the leader is changing; try again")
        case FAIL_REASON.DISCARDED:
            return NoLeader("a new leader put another command in the place of this one; try again")
        case FAIL_REASON.REQUEST_DENIED:
            return InvalidRequest("the leader does not take this command; do the masters have the same configuration?")
        case _:
            return OutcomeUnknown("the leader changed while the command was on its way; it may be applied")


@dataclass(slots=True)
class _Waiter:
    """A proposal that waits for its outcome; the engine calls it once, or never."""

    future: asyncio.Future[command_pb2.CommandResult]
    reason: int | None = None

    def __call__(self, result: command_pb2.CommandResult | None, reason: int) -> None:
        if self.future.done():
            return
        self.reason = reason
        if reason == FAIL_REASON.SUCCESS and result is not None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error_of(reason))


class Proposals:
    """All proposals of one master. `consensus` is None while it takes no part; `wake` has a step done soon."""

    def __init__(self, self_id: str, settings: RaftSettings, wake: Callable[[], None]) -> None:
        self.consensus: Consensus | None = None
        self.leader_known = asyncio.Event()
        self._self_id = self_id
        self._settings = settings
        self._wake = wake
        self.in_flight = 0
        """Commands that wait for their outcome; at most proposals_max."""
        self._waiting: dict[asyncio.Future[command_pb2.CommandResult], None] = {}
        """In the order in which they came: a simulation plays the same twice."""
        self._has_expired = False
        self._following_barrier: asyncio.Future[None] | None = None
        self._barrier_runner: asyncio.Task[None] | None = None

    async def propose(
        self, command: command_pb2.Command, timeout_s: float | None = None, *, is_urgent: bool = False
    ) -> command_pb2.CommandResult:
        """See RaftNode.propose."""
        payload = command.SerializeToString()
        settings = self._settings
        if len(payload) > settings.command_bytes_max:
            limit = settings.command_bytes_max
            raise InvalidRequest(f"the command has {len(payload)} bytes, at most {limit} are allowed; send less")
        if self.in_flight >= settings.proposals_max:
            raise Overloaded(f"{self.in_flight} proposals are in flight at master {self._self_id}; try again later")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (settings.propose_timeout_s if timeout_s is None else timeout_s)
        self.in_flight += 1
        try:
            while True:
                await self._await_leader(loop, deadline)
                outcome = await self._propose_once(loop, payload, deadline, is_urgent)
                if not isinstance(outcome, int):
                    return outcome
                await asyncio.sleep(min(RETRY_S, max(0.0, deadline - loop.time())))
        finally:
            self.in_flight -= 1

    async def _await_leader(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if not self.leader_known.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self.leader_known.wait()
        if loop.time() >= deadline:
            raise NoLeader(f"master {self._self_id} reaches no leader; is a majority of the masters running?")

    async def _propose_once(
        self, loop: asyncio.AbstractEventLoop, payload: bytes, deadline: float, is_urgent: bool
    ) -> command_pb2.CommandResult | int:
        """The result, or the reason for which the command may be proposed again."""
        if self.consensus is None:
            raise NoLeader(f"master {self._self_id} does not run")
        waiter = _Waiter(loop.create_future())
        timer = loop.call_at(deadline, self._expire, waiter.future)
        self._waiting[waiter.future] = None
        try:
            self.consensus.propose(payload, waiter, is_urgent=is_urgent)
            self._wake()
            return await waiter.future
        except CoordinatorError:
            if waiter.reason is None or waiter.reason not in _PROPOSE_AGAIN:
                raise
            return waiter.reason
        finally:
            timer.cancel()
            self._waiting.pop(waiter.future, None)
            self._has_expired |= waiter.reason is None

    def _expire(self, future: asyncio.Future[command_pb2.CommandResult]) -> None:
        if not future.done():
            future.set_exception(TimedOut("no answer within the deadline; the command may be applied"))

    def prune(self) -> None:
        """Has the engine forget proposals that nobody waits for; cheap when there is none."""
        if self._has_expired and self.consensus is not None:
            self._has_expired = False
            self.consensus.forget(_is_done)

    def halt(self) -> None:
        """Ends all that waits: this master takes no part any more."""
        self.consensus = None
        self.leader_known.clear()
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(OutcomeUnknown(f"master {self._self_id} stopped; the command may be applied"))

    async def close(self) -> None:
        """Ends the barriers too; to be called after `halt`."""
        if self._barrier_runner:
            self._barrier_runner.cancel()
            await asyncio.gather(self._barrier_runner, return_exceptions=True)

    # Barriers

    async def barrier(self, timeout_s: float | None = None) -> None:
        """See RaftNode.barrier. Who comes while one is on its way shares the next: an older one proves too little."""
        loop = asyncio.get_running_loop()
        if self._following_barrier is None:
            self._following_barrier = loop.create_future()
            # When everybody has left before it failed, nobody needs to hear of it.
            self._following_barrier.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._barrier_runner is None:
            self._barrier_runner = loop.create_task(self._run_barriers(), name="raft barriers")
        shared = asyncio.shield(self._following_barrier)
        try:
            await asyncio.wait_for(shared, self._settings.propose_timeout_s if timeout_s is None else timeout_s)
        except TimeoutError:
            raise TimedOut("no majority of the masters answered within the deadline") from None

    async def _run_barriers(self) -> None:
        try:
            while (current := self._following_barrier) is not None:
                self._following_barrier = None
                try:
                    await self.propose(command_pb2.Command(cause="barrier", barrier=command_pb2.Barrier()))
                except CoordinatorError as error:
                    current.set_exception(error)
                except asyncio.CancelledError:
                    current.set_exception(NoLeader(f"master {self._self_id} stopped"))
                    raise
                else:
                    current.set_result(None)
        finally:
            self._barrier_runner = None


def _is_done(callback: Callback) -> bool:
    return isinstance(callback, _Waiter) and callback.future.done()
