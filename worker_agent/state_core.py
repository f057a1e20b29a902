"""Reads and writes of users' state on this worker: for the gRPC service, and for applications beside it.

A **read** is answered from applied rows while the shard may read, asked before and after; in doubt behind a barrier.
A **write** is judged (user_state.py) and submitted in one step of the event loop, so that what was judged still holds
when it takes its place in the log. Where the judgement has to wait for pending writes of the same user, later writes of
that user queue up behind, so that none is overtaken for ever. What waits is not submitted: it can end in a definite
error, and does so when the deadline comes first.

Where fewer replicas are in sync than `min_in_sync`, a write is refused, and what was on its way when they became so few
is **acknowledged** only once there are enough again: then it is on all of them. Until the deadline, that is; it may
stay, so it ends as TimedOut.

Where a read meets **damage** on the disk, the shard gives this replica up if there is another one, and the request goes
to that one as after any failover; of a last copy the caller hears what is damaged.

`StateCore.write`, `read`, `scan`, `describe` go to wherever the user's shard is; `try_write` and `try_read` answer at
once or not at all, and are what makes a batch cheap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from coordinator.api.v1 import state_pb2
from coordinator.config import StateSettings
from coordinator.model import key_hash
from coordinator.model.errors import (
    CoordinatorError,
    Damaged,
    Expired,
    IndefiniteError,
    NotPrimary,
    OutcomeUnknown,
    TimedOut,
    TooFewReplicas,
)
from worker_agent import user_state
from worker_agent.state_interface import Elsewhere, HostedShard, ShardHost
from worker_agent.state_route import Again, Router, Scope, with_doubt
from worker_agent.store_interface import Reader
from worker_agent.user_state import Accept, Overlay, PendingWrite, Refuse, Repeat, SameAs, WaitFor

Answer = TypeVar("Answer", state_pb2.ReadResponse, state_pb2.ScanResponse, state_pb2.DescribeUserResponse)
Looked = TypeVar("Looked")
Submitted = asyncio.Future[int]


class StateCore:
    """Users' state as this worker sees it. Belongs to one event loop."""

    def __init__(self, host: ShardHost, router: Router, settings: StateSettings) -> None:
        self._host = host
        self._router = router
        self._settings = settings
        self._overlay = Overlay()
        self._submitted: dict[PendingWrite, Submitted] = {}
        self._lines: dict[str, _Line] = {}
        """Users with a write that waits for others of the same user."""

    # Wherever it is

    async def write(self, request: state_pb2.WriteRequest, scope: Scope) -> state_pb2.WriteResponse:
        """Applies the mutations, all or none."""
        user_state.check_write(request, self._settings)

        async def here(shard: HostedShard) -> state_pb2.WriteResponse:
            return await self._write(shard, request, scope)

        return await self._router.answer(key_hash(request.user), scope, here, "Write", request)

    async def read(self, request: state_pb2.ReadRequest, scope: Scope) -> state_pb2.ReadResponse:
        """The keys that exist."""
        user_state.check_read(request)

        def look(reader: Reader) -> state_pb2.ReadResponse:
            return user_state.read(request, reader)

        if request.stale and (response := self._stale(request.user, look)) is not None:
            return response

        async def here(shard: HostedShard) -> state_pb2.ReadResponse:
            return await self._look(shard, look, scope)

        return await self._router.answer(key_hash(request.user), scope, here, "Read", request)

    async def scan(self, request: state_pb2.ScanRequest, scope: Scope) -> state_pb2.ScanResponse:
        """A page of keys."""
        user_state.check_scan(request)

        def look(reader: Reader) -> state_pb2.ScanResponse:
            return user_state.scan(request, reader)

        if request.stale and (response := self._stale(request.user, look)) is not None:
            return response

        async def here(shard: HostedShard) -> state_pb2.ScanResponse:
            return await self._look(shard, look, scope)

        return await self._router.answer(key_hash(request.user), scope, here, "Scan", request)

    async def describe(
        self, request: state_pb2.DescribeUserRequest, scope: Scope
    ) -> state_pb2.DescribeUserResponse:
        """How much the user keeps."""
        user_state.check_user(request.user)

        async def here(shard: HostedShard) -> state_pb2.DescribeUserResponse:
            response = await self._look(shard, lambda reader: user_state.describe(request, reader), scope)
            response.keys_max, response.bytes_max = self._settings.user_keys_max, self._settings.user_bytes_max
            response.shard_id, response.key_hash = shard.shard_id, key_hash(request.user)
            return response

        return await self._router.answer(key_hash(request.user), scope, here, "DescribeUser", request)

    async def users(self, shard_id: int, lo: int, after: str, limit: int, scope: Scope) -> list[str]:
        """A page of the users of a shard that is served here, from behind `after` on, as of one moment."""

        async def here(shard: HostedShard) -> list[str]:
            if shard.shard_id != shard_id:
                raise NotPrimary(f"shard {shard_id} was cut or joined; {shard.shard_id} is in its place")
            return await self._look(shard, lambda reader: reader.users(after, limit), scope)

        return await self._router.answer(lo, scope, here, "", None)

    # At once

    def try_write(self, request: state_pb2.WriteRequest) -> Submitted | state_pb2.WriteResponse | None:
        """Submits a write when that can be done right now: the future has its version. None: use `write`.

        Raises what the write is refused with, when that is certain already.
        """
        user_state.check_write(request, self._settings)
        shard = self._host.locate(key_hash(request.user))
        if isinstance(shard, Elsewhere) or not shard.is_serving or request.user in self._lines or self._is_short(shard):
            return None
        try:
            return self._step(shard, request, is_confirmed=False)
        except Again:
            return None

    def try_read(self, request: state_pb2.ReadRequest) -> state_pb2.ReadResponse | None:
        """The answer when it can be given right now. None: use `read`."""
        user_state.check_read(request)
        shard = self._host.locate(key_hash(request.user))
        if isinstance(shard, Elsewhere) or request.stale or not shard.may_read() or shard.reader is None:
            return None
        try:
            with _noting_damage(shard):
                response = user_state.read(request, shard.reader)
        except Again:
            return None
        return response if shard.may_read() else None

    async def settle(
        self, submitted: Submitted, request: state_pb2.WriteRequest, scope: Scope
    ) -> state_pb2.WriteResponse:
        """The answer to what `try_write` submitted, by way of `write` where the shard stopped serving meanwhile."""
        try:
            return state_pb2.WriteResponse(version=await self._applied(submitted, scope))
        except Again as again:
            first = again.cause
        if isinstance(first, IndefiniteError) and not scope.may_repeat:
            raise first
        try:
            return await self.write(request, scope)
        except CoordinatorError as error:
            if isinstance(first, IndefiniteError):
                raise with_doubt(first, error) from None
            raise

    # Reading here

    def _stale(self, user: str, look: Callable[[Reader], Answer]) -> Answer | None:
        """What this replica has applied, and how old that may be; None when it has nothing to tell."""
        shard = self._host.locate(key_hash(user))
        if isinstance(shard, Elsewhere) or shard.reader is None or (age_s := shard.stale_age_s()) is None:
            return None
        try:
            with _noting_damage(shard):
                response = look(shard.reader)
        except Again:
            return None
        if not isinstance(response, state_pb2.DescribeUserResponse):
            response.age_s = age_s
        return response

    async def _look(self, shard: HostedShard, look: Callable[[Reader], Looked], scope: Scope) -> Looked:
        if shard.may_read() and shard.reader is not None:
            with _noting_damage(shard):
                response = look(shard.reader)
            if shard.may_read():
                return response
        await self._barrier(shard, scope)
        if shard.reader is None:
            raise Again(_stopped(shard))
        with _noting_damage(shard):
            return look(shard.reader)

    async def _barrier(self, shard: HostedShard, scope: Scope) -> None:
        """Once it returns, what is applied at this moment may be shown. Raises Again, or Expired."""
        try:
            async with asyncio.timeout_at(scope.give_up_at_s):
                await shard.barrier()
        except TimeoutError:
            message = f"the replicas of shard {shard.shard_id} did not confirm in time that it may be read; try again"
            raise Expired(message) from None
        except CoordinatorError as error:
            # Nothing was changed, whatever became of the question.
            raise Again(NotPrimary(f"shard {shard.shard_id} stopped serving: {error}")) from None

    # Writing here

    async def _write(
        self, shard: HostedShard, request: state_pb2.WriteRequest, scope: Scope
    ) -> state_pb2.WriteResponse:
        outcome = None if request.user in self._lines else self._step(shard, request, is_confirmed=False)
        is_repeated = False
        if outcome is None:
            line = self._lines.setdefault(request.user, _Line())
            line.waiting += 1
            try:
                outcome, is_repeated = await self._in_line(line, shard, request, scope)
            finally:
                line.waiting -= 1
                if not line.waiting:
                    del self._lines[request.user]
        if isinstance(outcome, state_pb2.WriteResponse):
            if self._is_short(shard):
                await self._applied(_ignored(self._when_copied(shard, outcome.version)), scope)
            return outcome
        return state_pb2.WriteResponse(version=await self._applied(outcome, scope), is_repeated=is_repeated)

    async def _in_line(
        self, line: _Line, shard: HostedShard, request: state_pb2.WriteRequest, scope: Scope
    ) -> tuple[Submitted | state_pb2.WriteResponse, bool]:
        """Waits for the user's writes before this one, then judges and submits it; True when it is pending already."""
        try:
            async with asyncio.timeout_at(scope.give_up_at_s):
                async with line.turn:
                    return await self._turn(shard, request, scope)
        except TimeoutError:
            raise Expired("the deadline came while the write waited for others of the same user") from None

    async def _turn(
        self, shard: HostedShard, request: state_pb2.WriteRequest, scope: Scope
    ) -> tuple[Submitted | state_pb2.WriteResponse, bool]:
        is_confirmed = False
        while True:
            if not shard.is_serving or shard.reader is None:
                raise Again(_stopped(shard))
            with _noting_damage(shard):
                verdict = user_state.judge(request, shard.reader, self._overlay, self._settings)
            match verdict:
                case SameAs(write):
                    return self._acknowledged(shard, self._submitted[write]), True
                case WaitFor(writes):
                    is_confirmed = False
                    await asyncio.wait([self._submitted[write] for write in writes])
                case Refuse() if not is_confirmed and not shard.may_read():
                    await self._barrier(shard, scope)
                    is_confirmed = True
                case _:
                    outcome = self._step(shard, request, is_confirmed=is_confirmed)
                    if outcome is not None:
                        return outcome, False

    def _step(
        self, shard: HostedShard, request: state_pb2.WriteRequest, *, is_confirmed: bool
    ) -> Submitted | state_pb2.WriteResponse | None:
        """Judges, and submits what is accepted, in one step. None when the write has to wait. Raises a refusal.

        A refusal shows what is applied, so it needs the right to read: now, or by a barrier (`is_confirmed`).
        """
        if shard.reader is None:
            return None
        with _noting_damage(shard):
            verdict = user_state.judge(request, shard.reader, self._overlay, self._settings)
        match verdict:
            case Repeat(version):
                return state_pb2.WriteResponse(version=version, is_repeated=True)
            case Refuse(error):
                if is_confirmed or shard.may_read():
                    raise error
                return None
            case SameAs() | WaitFor():
                return None
            case Accept(payload, write):
                if self._is_short(shard):
                    raise TooFewReplicas(
                        f"shard {shard.shard_id} has {shard.in_sync_count} in-sync replicas, and writes need "
                        f"{self._settings.min_in_sync} (state.min_in_sync); wait until it is repaired"
                    )
                return self._acknowledged(shard, self._submit(shard, payload, write))

    def _is_short(self, shard: HostedShard) -> bool:
        return shard.in_sync_count < self._settings.min_in_sync

    def _acknowledged(self, shard: HostedShard, submitted: Submitted) -> Submitted:
        """Ends with what was submitted, and not before that is on as many replicas as writes need."""
        if self._settings.min_in_sync < 2:
            return submitted

        async def when_applied() -> int:
            return await self._when_copied(shard, await asyncio.shield(submitted))

        return _ignored(when_applied())

    async def _when_copied(self, shard: HostedShard, version: int) -> int:
        """Returns the version of what is applied here once as many replicas are in sync as writes need.

        Replicas may have left while the write was on its way; who joins has it before it counts as in sync. Raises
        OutcomeUnknown when the shard stops serving before: its next primary is asked again.
        """
        while self._is_short(shard):
            if not shard.is_serving:
                raise OutcomeUnknown(f"shard {shard.shard_id} stopped serving before enough replicas had the write")
            await self._host.changed()
        return version

    def _submit(self, shard: HostedShard, payload: bytes, write: PendingWrite) -> Submitted:
        submitted = shard.submit(payload)
        self._overlay.add(write)
        self._submitted[write] = submitted

        def ended(future: Submitted) -> None:
            self._overlay.drop(write)
            del self._submitted[write]
            _take(future)

        submitted.add_done_callback(ended)
        return submitted

    async def _applied(self, submitted: Submitted, scope: Scope) -> int:
        """The version. Raises Again when the shard stopped serving, TimedOut when the deadline came first."""
        try:
            async with asyncio.timeout_at(scope.give_up_at_s):
                return await asyncio.shield(submitted)
        except TimeoutError:
            raise TimedOut("the write was begun and not confirmed within the deadline; it may still be") from None
        except (NotPrimary, IndefiniteError) as error:
            raise Again(error) from None


def _take(future: Submitted) -> None:
    """Asks for the exception of what has ended: its writer may have gone, and then nobody else would."""
    if not future.cancelled():
        future.exception()


def _ignored(work: Coroutine[Any, Any, int]) -> Submitted:
    """A task that nobody need wait for."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(_take)
    return task


class _Line:
    """The writes of one user that wait for their turn."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0


@contextmanager
def _noting_damage(shard: HostedShard) -> Iterator[None]:
    """Raises Again where the replica is given up because of what the block reads."""
    try:
        yield
    except Damaged as error:
        if shard.note_damage(error):
            raise Again(_stopped(shard)) from error
        raise


def _stopped(shard: HostedShard) -> NotPrimary:
    return NotPrimary(f"shard {shard.shard_id} stopped serving", shard_id=shard.shard_id)
