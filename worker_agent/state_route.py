"""Where a request of users' state is answered: here, by another worker, or nowhere yet.

Every change that is planned (a move, a drain, a cut) shows to clients as a pause, never as an error: while this worker
is primary and does not serve (it takes over, cedes, or is sealed) requests wait, and go on here or are passed on as
soon as that is decided. They wait within their deadline, and not too many of them.

A request is passed on once at most (`is_forwarded`). With it goes the epoch that the sender knows of the shard, in the
metadata `coordinator-shard`: a worker whose assignment is older waits for the newer one instead of sending the request
back. Clients say the epoch of their map in the same way.

What was not begun is told by definite errors; a failure that leaves the outcome open makes every later one open too.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from grpc import aio

from coordinator.client.errors import error_of
from coordinator.client.workers import WorkerLink, WorkerLinks
from coordinator.model.errors import (
    CoordinatorError,
    Expired,
    IndefiniteError,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    Unreachable,
    VersionConflict,
)
from worker_agent.state_interface import Elsewhere, HostedShard, Place, ShardHost

SHARD_METADATA = "coordinator-shard"
"""Metadata "ID:EPOCH": a shard, and the epoch of it that the sender knows."""
NEWS_WAIT_S = 1.0
"""How long a request waits for an assignment that others seem to have already."""
AGAIN_WAIT_S = 0.05
"""How long one waits that was turned away by a shard that says that it serves."""
HELD_MAX = 10_000
HELD_BYTES_MAX = 64 << 20
"""Requests that wait, and their bytes; more are refused, and may come again later."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Known:
    """What the sender of a request knows of its shard."""

    shard_id: int = 0
    epoch: int = 0


def known_of(value: str) -> Known:
    """The metadata's value read; nothing known when it cannot be."""
    shard_id, _, epoch = value.partition(":")
    try:
        return Known(int(shard_id), int(epoch))
    except ValueError:
        return Known()


def metadata_of(known: Known) -> tuple[tuple[str, str], ...]:
    """The metadata that says it."""
    return ((SHARD_METADATA, f"{known.shard_id}:{known.epoch}"),) if known.shard_id else ()


@dataclass(frozen=True, slots=True)
class Scope:
    """The bounds of one request."""

    give_up_at_s: float
    """By the event loop's clock."""
    is_forwarded: bool = False
    known: Known = Known()
    size: int = 0
    """Bytes of the request."""
    may_repeat: bool = True
    """It only reads, or has a request id: doing it again after an unknown outcome does no harm."""


class Again(Exception):
    """The shard stopped serving meanwhile: look again where the request belongs. `cause` may leave the outcome open."""

    def __init__(self, cause: CoordinatorError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def with_doubt(doubt: CoordinatorError, error: CoordinatorError) -> CoordinatorError:
    """What a caller hears of a write that ended with `error`, when `doubt` left open what became of an earlier try.

    A definite error is about the try that it ends; the earlier one may be applied later. So it is with a full disk:
    what was sent before it was full keeps its place in the log, what is tried again is refused. Only a conflict counts
    for both: it is judged on applied rows, where an earlier try that is in the log would be recognised.
    """
    if not error.DEFINITE or isinstance(error, VersionConflict):
        return error
    return OutcomeUnknown(f"{doubt}; then: {error}")


class Wait(enum.Enum):
    """How long to wait for a change."""

    UNTIL_DEADLINE = enum.auto()
    FOR_NEWS = enum.auto()


@dataclass(frozen=True, slots=True)
class PassOn:
    """To this worker."""

    primary: Place
    known: Known


@dataclass(frozen=True, slots=True)
class Hold:
    """Wait for a change; `error` is the answer when none comes."""

    wait: Wait
    error: NotPrimary


Direction = HostedShard | PassOn | Hold | NotPrimary


def direct(found: HostedShard | Elsewhere, scope: Scope, node_id: str) -> Direction:
    """Where the request goes as things stand. Pure."""
    primary, shard_id = found.primary, found.shard_id
    is_behind = scope.known.shard_id == shard_id != 0 and scope.known.epoch > found.epoch
    if not isinstance(found, Elsewhere):
        if found.is_serving:  # Also in an older epoch than others know: its leases say whether it may answer.
            return found
        if is_behind:
            return Hold(Wait.FOR_NEWS, _not_primary(found, node_id))
        if found.is_primary:
            error = NotPrimary(f"{node_id} is primary of shard {shard_id} and does not serve yet", shard_id=shard_id)
            return Hold(Wait.UNTIL_DEADLINE, error)
        if not primary.node_id:
            error = NotPrimary(f"shard {shard_id} has no primary, as far as {node_id} knows", shard_id=shard_id)
            return Hold(Wait.UNTIL_DEADLINE, error)
    elif is_behind or scope.is_forwarded:
        # Somebody believes that it is here: its assignment may be on the way.
        return Hold(Wait.FOR_NEWS, _not_primary(found, node_id))
    if scope.is_forwarded or not primary.address or primary.node_id == node_id:
        return _not_primary(found, node_id)
    # One that this worker has ceded to may not know it yet: it holds the request for the next epoch.
    return PassOn(primary, Known(shard_id, found.epoch if isinstance(found, Elsewhere) else found.primary_epoch))


def _not_primary(found: HostedShard | Elsewhere, node_id: str) -> NotPrimary:
    which = f"shard {found.shard_id}" if found.shard_id else "the user's shard"
    known = f"ask {found.primary.node_id}" if found.primary.node_id else "ask a master where it is"
    primary = found.primary if found.primary.node_id != node_id else Place()
    return NotPrimary(
        f"{node_id} does not answer for {which}; {known}", primary.node_id, primary.address, found.shard_id
    )


class Router:
    """Brings requests to where they are answered."""

    def __init__(self, host: ShardHost, links: WorkerLinks, node_id: str) -> None:
        self._host = host
        self._links = links
        self._node_id = node_id
        self.held = 0
        """Requests that wait now."""
        self.held_bytes = 0
        self.forwarded = 0
        """Requests that were passed on since the start."""

    async def answer(
        self,
        key_hash: int,
        scope: Scope,
        here: Callable[[HostedShard], Awaitable[Answer]],
        method: str,
        request: Any,
    ) -> Answer:
        """Runs `here` on the shard when it serves here, else asks the primary's StateService for `method`.

        `here` raises Again when the shard stops serving before it is done. Raises what the primary raised; NotPrimary
        and Expired when nobody could be asked in time.
        """
        doubt: CoordinatorError | None = None
        while True:
            direction = direct(self._host.locate(key_hash), scope, self._node_id)
            try:
                match direction:
                    case PassOn():
                        link = await self._connect(direction, scope)
                        if link is not None:
                            return cast("Answer", await self._pass_on(link, direction, scope, method, request))
                    case Hold():
                        await self._hold(direction, scope)
                    case NotPrimary():
                        raise direction
                    case _:
                        return await here(direction)
            except Again as again:
                if isinstance(again.cause, IndefiniteError):
                    if not scope.may_repeat:
                        raise again.cause from None
                    doubt = again.cause
                next_direction = direct(self._host.locate(key_hash), scope, self._node_id)
                if not isinstance(next_direction, PassOn | Hold | NotPrimary):
                    await self._wait(scope, AGAIN_WAIT_S, again.cause)
            except CoordinatorError as error:
                if doubt is not None:
                    raise with_doubt(doubt, error) from None
                raise

    async def _connect(self, direction: PassOn, scope: Scope) -> WorkerLink | None:
        """The connection to pass a request on; None when there was none, and then a change. Raises NotPrimary."""
        primary, shard_id = direction.primary, direction.known.shard_id
        left_s = scope.give_up_at_s - asyncio.get_running_loop().time()
        try:
            return await self._links.connect(primary.address, left_s)
        except Unreachable as error:
            # Nothing was sent. If it is gone for good, word of its successor will come.
            told = NotPrimary(f"{error}; it is {primary.node_id}, primary of shard {shard_id}", shard_id=shard_id)
        await self._hold(Hold(Wait.FOR_NEWS, told), scope)
        return None

    async def _pass_on(
        self, link: WorkerLink, direction: PassOn, scope: Scope, method: str, request: Any
    ) -> Any:
        left_s = scope.give_up_at_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise Expired("the deadline came before the request could be passed on")
        self.forwarded += 1
        request.is_forwarded = True
        try:
            call = getattr(link.state, method)
            return await call(request, timeout=left_s, metadata=metadata_of(direction.known))
        except aio.AioRpcError as failure:
            raise error_of(failure, link.address) from None

    async def _hold(self, hold: Hold, scope: Scope) -> None:
        """Returns at the next change; raises the error of `hold` when none comes in time."""
        match hold.wait:
            case Wait.UNTIL_DEADLINE:
                wait_s = float("inf")
            case Wait.FOR_NEWS:
                wait_s = NEWS_WAIT_S
        if not await self._wait(scope, wait_s, hold.error):
            raise hold.error

    async def _wait(self, scope: Scope, wait_s: float, error: CoordinatorError) -> bool:
        """Waits for a change within the deadline; False when none came. Raises Overloaded when too many wait."""
        now_s = asyncio.get_running_loop().time()
        if scope.give_up_at_s <= now_s:
            raise Expired(f"the deadline came before the request could be begun: {error}")
        if self.held >= HELD_MAX or (self.held and self.held_bytes + scope.size > HELD_BYTES_MAX):
            raise Overloaded(f"{self.held} requests wait for their shards at {self._node_id} already; try again later")
        self.held += 1
        self.held_bytes += scope.size
        try:
            async with asyncio.timeout_at(min(scope.give_up_at_s, now_s + wait_s)):
                await self._host.changed()
        except TimeoutError:
            return False
        finally:
            self.held -= 1
            self.held_bytes -= scope.size
        return True
