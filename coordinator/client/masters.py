"""Asks whichever master can answer: finds one, follows hints to the leader, retries what is safe, gives up in time.

One call goes to the master that answered last, then to the others in turn; a NotLeader that names the leader sends it
there next. After each round without an answer it waits (retry.py). Three clocks bound it: the caller's timeout; the
budget of retries; and, while not one master accepts a connection, `UNREACHABLE_AFTER_S`, so that a person who mistyped
an address is told soon.

A connection is made before a call is sent on it, so "no connection" is known to be definite: nothing was sent.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
from grpc import aio

from coordinator.api.v1 import cluster_pb2, cluster_pb2_grpc, cron_pb2_grpc
from coordinator.client.channels import channel_options
from coordinator.client.errors import error_of
from coordinator.client.retry import Backoff, RetryBudget, may_retry
from coordinator.model.errors import CoordinatorError, InvalidRequest, NotLeader, TimedOut, Unreachable
from coordinator.security.credentials import Credentials, open_channel

CONNECT_TIMEOUT_S = 1.5
UNREACHABLE_AFTER_S = 2.0
ATTEMPT_S_MIN = 1.0
"""While other masters are left to ask, one attempt takes at most half of the time left, but at least this."""

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Link:
    """The connection to one master."""

    address: str
    channel: aio.Channel
    cluster: cluster_pb2_grpc.ClusterServiceAsyncStub
    cron: cron_pb2_grpc.CronServiceAsyncStub


Method = Callable[[Link], aio.UnaryUnaryMultiCallable[Request, Response]]
"""Picks a call of a link, for example `lambda link: link.cluster.GetStatus`."""


class Masters:
    """The masters of one cluster, as a client sees them. Belongs to one event loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_s: float,
        credentials: Credentials | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`addresses` are host:port of the masters' gRPC servers. Raises InvalidRequest when there is none."""
        if not addresses:
            raise InvalidRequest("a client needs the address of at least one master, as host:port")
        self.addresses = tuple(dict.fromkeys(addresses))
        self.timeout_s = timeout_s
        self._credentials = credentials
        self._rng = rng or random.Random()
        self._budget = RetryBudget()
        self._links: dict[str, Link] = {}
        self._preferred = self.addresses[0]

    async def close(self) -> None:
        """Ends all connections."""
        links = list(self._links.values())
        self._links.clear()
        await asyncio.gather(*(link.channel.close() for link in links))

    async def call(
        self, method: Method[Request, Response], request: Request, timeout_s: float | None = None
    ) -> Response:
        """The answer of the first master that can give one.

        Raises what that master raised; Unreachable when none accepts a connection; TimedOut, NoLeader and the like when
        the time is over. `request` must read only, or carry a request id: it may be sent more than once.
        """
        loop = asyncio.get_running_loop()
        bound_s = self.timeout_s if timeout_s is None else timeout_s
        search = Search(self, loop.time(), bound_s, changes_something=hasattr(request, "request_id"))
        while True:
            address = search.next_address()
            try:
                link = await self.connect(address, search.time_left_s(loop.time()))
                response = await self._attempt(method, link, request, search.attempt_s(loop.time()))
            except CoordinatorError as error:
                await search.failed(address, error)
            else:
                self._preferred = address
                return response

    async def any(self) -> Link:
        """An open connection to a master that answers now. Raises as `call` does."""
        await self.call(lambda link: link.cluster.GetMaster, cluster_pb2.GetMasterRequest())
        return self._links[self._preferred]

    @staticmethod
    async def _attempt(method: Method[Request, Response], link: Link, request: Request, timeout_s: float) -> Response:
        try:
            return await method(link)(request, timeout=timeout_s)
        except aio.AioRpcError as failure:
            raise error_of(failure, link.address) from None

    async def connect(self, address: str, timeout_s: float) -> Link:
        """An open connection to one master. Raises Unreachable when there is none within CONNECT_TIMEOUT_S."""
        link = self._links.get(address)
        if link is None:
            channel = open_channel(address, channel_options(), self._credentials)
            link = Link(
                address,
                channel,
                cluster_pb2_grpc.ClusterServiceStub(channel),
                cron_pb2_grpc.CronServiceStub(channel),
            )
            self._links[address] = link
        try:
            async with asyncio.timeout(min(CONNECT_TIMEOUT_S, max(timeout_s, 0.001))):
                while (state := link.channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise Unreachable(f"{address} accepts no connection")
                    await link.channel.wait_for_state_change(state)
        except TimeoutError:
            raise Unreachable(f"{address} accepted no connection in time") from None
        return link

    def order(self) -> list[str]:
        """The addresses in the order in which they are asked: the one that answered last comes first."""
        others = [address for address in self.addresses if address != self._preferred]
        return [self._preferred, *others]

    def take_retry(self, now_s: float) -> bool:
        """True when the budget has another round of retries."""
        return self._budget.take(now_s)

    def backoff(self) -> Backoff:
        """The waits of a new call."""
        return Backoff(self._rng)


class Search:
    """One call's way from master to master."""

    def __init__(self, masters: Masters, now_s: float, timeout_s: float, *, changes_something: bool) -> None:
        self._masters = masters
        self._changes_something = changes_something
        self._started_at_s = now_s
        self._give_up_at_s = now_s + timeout_s
        self._timeout_s = timeout_s
        self._backoff = masters.backoff()
        self._todo: list[str] = []
        """Addresses still to be asked in this round."""
        self._hint = ""
        """The leader as the last answer named it."""
        self._told: CoordinatorError | None = None
        """The answer that says most so far: of a master that was reached; None while none was."""

    def time_left_s(self, now_s: float) -> float:
        """Seconds until the caller's timeout, at least 0."""
        return max(0.0, self._give_up_at_s - now_s)

    def attempt_s(self, now_s: float) -> float:
        """Timeout of one attempt: leaves time to ask another master when this one hangs."""
        left_s = self.time_left_s(now_s)
        return left_s if len(self._masters.addresses) == 1 else min(left_s, max(ATTEMPT_S_MIN, left_s / 2))

    def next_address(self) -> str:
        """Whom to ask next."""
        if self._hint:
            hint, self._hint = self._hint, ""
            return hint
        if not self._todo:
            self._todo = self._masters.order()
        return self._todo.pop(0)

    async def failed(self, address: str, error: CoordinatorError) -> None:
        """Takes a failure in: returns when there is somebody to ask (again), raises the final error otherwise."""
        if not may_retry(error):
            raise error
        loop = asyncio.get_running_loop()
        self._remember(error)
        if isinstance(error, NotLeader) and error.leader_address not in ("", address):
            self._hint = error.leader_address
        if self.time_left_s(loop.time()) <= 0:
            raise self._final()
        if self._todo or (self._hint and self._masters.take_retry(loop.time())):
            return
        if self._told is None and loop.time() - self._started_at_s >= UNREACHABLE_AFTER_S:
            raise self._final()
        wait_s = self._backoff.next_s()
        if wait_s >= self.time_left_s(loop.time()) or not self._masters.take_retry(loop.time()):
            raise self._final()
        await asyncio.sleep(wait_s)

    def _remember(self, error: CoordinatorError) -> None:
        """A change that may have been applied stays so, whatever the masters that were asked later say."""
        is_doubtful = self._changes_something and self._told is not None and not self._told.DEFINITE
        if not isinstance(error, Unreachable) and not is_doubtful:
            self._told = error

    def _final(self) -> CoordinatorError:
        tried = ", ".join(self._masters.addresses)
        if self._told is None:
            return Unreachable(f"no master answers; tried {tried}")
        if isinstance(self._told, TimedOut):
            return TimedOut(f"no answer within {self._timeout_s:g} s; asked {tried}")
        return self._told
