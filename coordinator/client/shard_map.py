"""Where users live, as a client knows it: a table made of what the masters say, fetched once and again when it is old.

A table is used until a call shows that it is old: a worker that does not answer, or says that it is not the primary.
Then it is fetched again, once for all calls that wait for it, and not too often. A table of an older generation never
takes the place of a newer one. While no master leads, any master's table will do: workers that were changed since
say so themselves.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.client.masters import Masters
from coordinator.model import check_key, key_hash
from coordinator.model.errors import InvalidRequest, NoLeader, NotLeader, NotPrimary, TimedOut

LEADER_TIMEOUT_S = 0.5
FETCH_TIMEOUT_S = 2.0
"""How long the masters may take: to answer with a leader, and any of them after that."""
FETCH_PAUSE_S = 0.05
SHARDS_PER_PAUSE_S = 20_000
"""Between two fetches: 50 ms, and 50 ms more for every 1,000 shards, whose table has about 100 kB."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where one user lives."""

    shard_id: int
    epoch: int
    primary: str
    """Id of a worker; empty when the shard has no primary."""
    primary_address: str
    """Empty when it is not known."""
    addresses: tuple[str, ...]
    """Of all in-sync replicas whose addresses are known."""


class ShardTable:
    """All shards as of one generation. Immutable."""

    def __init__(self, shards: Sequence[types_pb2.Shard], addresses: Mapping[str, str], generation: int) -> None:
        ordered = sorted(shards, key=lambda shard: shard.lo)
        self._lows = [shard.lo for shard in ordered]
        self._shards = ordered
        self._addresses = dict(addresses)
        self.generation = generation

    def __len__(self) -> int:
        return len(self._shards)

    def locate(self, user: str) -> Target:
        """Where the user lives. Raises NotPrimary when the cluster has no shards yet, InvalidRequest for a bad name."""
        try:
            place = key_hash(user)
        except InvalidRequest:
            check_key(user, "user")  # Says it in the words of whoever asks.
            raise
        position = bisect_right(self._lows, place) - 1
        if position < 0:
            raise NotPrimary("the cluster has no shards yet; wait until it has workers")
        shard = self._shards[position]
        known = (self._addresses.get(node_id, "") for node_id in shard.in_sync)
        return Target(
            shard.id,
            shard.epoch,
            shard.primary,
            self._addresses.get(shard.primary, ""),
            tuple(address for address in known if address),
        )


class ShardMap:
    """The table that is in use. Belongs to one event loop."""

    def __init__(self, masters: Masters) -> None:
        self._masters = masters
        self._table: ShardTable | None = None
        self._fetch: asyncio.Task[ShardTable] | None = None
        self._fetched_at_s = -1e9
        self.fetches = 0
        """Tables that were asked for since the start."""

    async def close(self) -> None:
        """Ends what is on its way."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.gather(self._fetch, return_exceptions=True)

    async def table(self, timeout_s: float) -> ShardTable:
        """The table, fetched when there is none yet. Raises as Masters.call does."""
        return self._table if self._table is not None else await self.renew(timeout_s)

    async def renew(self, timeout_s: float) -> ShardTable:
        """A table that was asked for after this call began, or at most FETCH_PAUSE_S before."""
        fetch = self.renew_soon()
        try:
            async with asyncio.timeout(max(timeout_s, 0.001)):
                return await asyncio.shield(fetch)
        except TimeoutError:
            raise TimedOut("no master told in time where the shards are") from None

    def renew_soon(self) -> asyncio.Task[ShardTable]:
        """Begins to fetch, unless that is on its way."""
        if self._fetch is None or self._fetch.done():
            self._fetch = asyncio.create_task(self._renew())
            self._fetch.add_done_callback(_look)
        return self._fetch

    async def _renew(self) -> ShardTable:
        loop = asyncio.get_running_loop()
        shards = 0 if self._table is None else len(self._table)
        pause_s = self._fetched_at_s + FETCH_PAUSE_S + shards / SHARDS_PER_PAUSE_S - loop.time()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        self._fetched_at_s = loop.time()
        try:
            table = await self._ask(cluster_pb2.CONSISTENCY_LINEARIZABLE, LEADER_TIMEOUT_S)
        except (NoLeader, NotLeader, TimedOut):
            table = await self._ask(cluster_pb2.CONSISTENCY_STALE, FETCH_TIMEOUT_S)
        if self._table is None or table.generation >= self._table.generation:
            self._table = table
        return self._table

    async def _ask(self, consistency: cluster_pb2.Consistency.ValueType, timeout_s: float) -> ShardTable:
        self.fetches += 1
        shards, nodes = await asyncio.gather(
            self._masters.call(
                lambda link: link.cluster.ListShards,
                cluster_pb2.ListShardsRequest(consistency=consistency),
                timeout_s,
            ),
            self._masters.call(
                lambda link: link.cluster.ListNodes,
                cluster_pb2.ListNodesRequest(consistency=consistency),
                timeout_s,
            ),
        )
        addresses = {view.node.id: view.node.grpc_address for view in nodes.nodes}
        return ShardTable(shards.shards, addresses, shards.generation)


def _look(fetch: asyncio.Task[ShardTable]) -> None:
    """Whoever waited for it may have gone: then its error is nobody's."""
    if not fetch.cancelled():
        fetch.exception()
