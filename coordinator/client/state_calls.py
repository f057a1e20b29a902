"""Brings operations on users' state to the workers that answer them, again and again within the caller's time.

An attempt goes to the primary of the shard map, or to where the last answer pointed. After one that failed the map is
fetched again, and the next comes after a short, random wait. Retries are limited in number per second; over the limit
they wait, they do not fail. What is retried can do no harm: reads, and writes with a request id.

An attempt that stays silent is watched: every WATCH_S the map is fetched, and when it has another primary the attempt
is given up for that one. So a frozen worker costs its clients no more than a killed one.

Doubt: once a write's attempt has ended with an unknown outcome, a later error that says "not applied" is no longer
believed, unless it holds for the earlier attempt too: that one may still be on its way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from grpc import aio

from coordinator.api.v1 import state_pb2
from coordinator.client.errors import error_of
from coordinator.client.masters import Masters
from coordinator.client.retry import Backoff, RetryBudget, may_retry
from coordinator.client.shard_map import ShardMap, ShardTable, Target
from coordinator.client.workers import WorkerLink, WorkerLinks
from coordinator.model.errors import (
    CoordinatorError,
    Forbidden,
    InvalidRequest,
    NotPrimary,
    OutcomeUnknown,
    TimedOut,
    Unauthenticated,
    Unreachable,
    VersionConflict,
)
from coordinator.security.credentials import Credentials

SHARD_METADATA = "coordinator-shard"
WATCH_S = 0.5
ATTEMPT_S_MIN = 1.0
"""One attempt takes at most half of the time left, but at least this."""
WAIT_S_MAX = 0.25
RETRIES_AT_ONCE = 200.0
RETRIES_PER_S = 100.0

Answer = TypeVar("Answer")
Method = Callable[[WorkerLink], Any]
"""Picks a call of a link, for example `lambda link: link.state.Read`."""


class Tries:
    """What is known of one operation that may take several attempts."""

    def __init__(self, message: Any) -> None:
        self._message = message
        self._is_write = isinstance(message, state_pb2.WriteRequest)
        self._doubt: CoordinatorError | None = None
        self._last: CoordinatorError | None = None
        self.hint = ""
        """Where the last answer pointed; empty for nowhere."""

    def failed(self, error: CoordinatorError, address: str = "") -> bool:
        """Takes an attempt's end in; False when the operation has ended with it."""
        self.hint = ""
        if isinstance(error, NotPrimary) and error.primary_address != address:
            self.hint = error.primary_address
        if self._is_write and not error.DEFINITE:
            self._doubt = error
        # "Accepts no connection", or no answer, says less than what a worker has said before.
        if self._last is None or not isinstance(error, Unreachable | TimedOut):
            self._last = error
        return may_retry(error)

    def final(self) -> CoordinatorError:
        """What the caller is told."""
        last = self._last or TimedOut("the time was over before anything was done")
        if isinstance(last, Unreachable):  # Which is said of masters: without them nothing is found at all.
            last = NotPrimary(f"{last}, and the shard has no other primary yet; see `clusterctl nodes list`")
        if self._doubt is None or not last.DEFINITE or self._is_certain(last):
            return last
        return OutcomeUnknown(f"{self._doubt}; and: {last}")

    def _is_certain(self, error: CoordinatorError) -> bool:
        """True when the error also says that no earlier attempt was or will be applied.

        An applied one would have been recognised by its request id. One that is still on its way would be judged later:
        by then it is still faulty, and a version that has passed does not come back. But a key may be deleted, and room
        be made.
        """
        if isinstance(error, VersionConflict):
            return all(mutation.expected_version != 0 for mutation in self._message.mutations if _has(mutation))
        return isinstance(error, InvalidRequest | Forbidden | Unauthenticated)


def _has(mutation: state_pb2.Mutation) -> bool:
    return mutation.HasField("expected_version")


class Clockwork:
    """The time of one call: its deadline, its waits."""

    def __init__(self, timeout_s: float, rng: random.Random) -> None:
        self._loop = asyncio.get_running_loop()
        self._give_up_at_s = self._loop.time() + timeout_s
        self._backoff = Backoff(rng, WAIT_S_MAX)

    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._give_up_at_s - self._loop.time())

    def attempt_s(self) -> float:
        """How long one attempt may take."""
        left_s = self.left_s()
        return min(left_s, max(ATTEMPT_S_MIN, left_s / 2))

    async def pause(self, budget: RetryBudget, *, at_once: bool) -> bool:
        """Waits before the next attempt; False when there is no time for one."""
        wait_s = 0.0 if at_once else self._backoff.next_s()
        while not budget.take(self._loop.time()):
            wait_s = max(wait_s, self._backoff.next_s())
            if wait_s >= self.left_s():
                return False
            await asyncio.sleep(wait_s)
            wait_s = 0.0
        if wait_s >= self.left_s():
            return False
        await asyncio.sleep(wait_s)
        return True


class StateCalls:
    """The calls of one client. Belongs to one event loop."""

    def __init__(self, masters: Masters, credentials: Credentials | None, rng: random.Random) -> None:
        self._rng = rng
        self._budget = RetryBudget(RETRIES_AT_ONCE, RETRIES_PER_S)
        self.map = ShardMap(masters)
        self.links = WorkerLinks(credentials)

    async def close(self) -> None:
        """Ends all connections to workers."""
        await self.map.close()
        await self.links.close()

    def clock(self, timeout_s: float) -> Clockwork:
        """The time of a new call."""
        return Clockwork(timeout_s, self._rng)

    async def call(self, method: Method, message: Any, timeout_s: float, *, any_replica: bool = False) -> Any:
        """The answer to one operation. Raises an error of model/errors.py."""
        clock, tries = self.clock(timeout_s), Tries(message)
        table = await self.map.table(timeout_s)
        while True:
            address = ""
            try:
                target = table.locate(message.user)
                address = tries.hint or self._address(target, any_replica)
                if not address:
                    raise NotPrimary(f"shard {target.shard_id} has no primary at the moment", shard_id=target.shard_id)
                link = await self.links.connect(address, clock.left_s())
                metadata = ((SHARD_METADATA, f"{target.shard_id}:{target.epoch}"),)
                call = method(link)(message, timeout=clock.attempt_s(), metadata=metadata)
                return await self.watched(call, link, [(message.user, target)])
            except CoordinatorError as error:
                if not tries.failed(error, address):
                    raise tries.final() from None
            table = await self.next_table(clock, tries, table)

    async def next_table(self, clock: Clockwork, tries: Tries, table: ShardTable) -> ShardTable:
        """Waits for the next attempt, and for a new table where nobody said where to ask. Raises the final error."""
        if not await self.wait(clock, at_once=bool(tries.hint)):
            raise tries.final()
        return table if tries.hint else await self.newer(clock, table)

    async def wait(self, clock: Clockwork, *, at_once: bool) -> bool:
        """Waits before a retry; False when there is no time for one."""
        if at_once:
            self.map.renew_soon()
        return await clock.pause(self._budget, at_once=at_once)

    async def newer(self, clock: Clockwork, table: ShardTable) -> ShardTable:
        """A new table; the old one when no master answers: shards go on without them."""
        try:
            return await self.map.renew(clock.left_s())
        except CoordinatorError as error:
            if not may_retry(error):
                raise
            return table

    def _address(self, target: Target, any_replica: bool) -> str:
        if any_replica and target.addresses:
            return self._rng.choice(target.addresses)
        return target.primary_address

    async def watched(self, call: Any, link: WorkerLink, aims: Sequence[tuple[str, Target]]) -> Any:
        """The answer to a call that was begun, given up once one of the users that it is about has another primary."""
        watch = _Watch(self.map, call, link.address, aims)
        try:
            return await call
        except aio.AioRpcError as failure:
            raise error_of(failure, link.address) from None
        except asyncio.CancelledError:
            if not watch.has_moved:
                raise
            raise OutcomeUnknown(f"{link.address} did not answer, and is no longer the primary") from None
        finally:
            watch.stop()


class _Watch:
    """Looks after a silent call."""

    def __init__(self, shards: ShardMap, call: Any, address: str, aims: Sequence[tuple[str, Target]]) -> None:
        self._shards = shards
        self._call = call
        self._address = address
        self._aims = aims
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_S, self._begin)
        self.has_moved = False

    def stop(self) -> None:
        """The call has ended."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            try:
                table = await self._shards.renew(WATCH_S * 4)
            except CoordinatorError:
                pass  # Nobody knows better than that the call still may be answered.
            else:
                # One that was sent where an answer pointed may be ahead of the map.
                if any(
                    table.locate(user).primary_address not in ("", target.primary_address, self._address)
                    for user, target in self._aims
                ):
                    self.has_moved = True
                    self._call.cancel()
                    return
            await asyncio.sleep(WATCH_S)
