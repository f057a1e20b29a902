"""Balance of the primary role among workers that hold the shard already: nothing is copied.

A shard that two workers hold is an edge between them, and its primary says which way the edge points. A
worker with too many roles hands one to a neighbour; when all its neighbours have enough themselves, the
role is passed on along a path to the nearest worker with room. A breadth-first search finds the shortest
such path, and finds one whenever there is one (reversing paths solves the orientation of a graph with least
maximum degree).

As with copies, nothing moves within the band around the fair share, so small differences never swing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

from coordinator.model import MoveKind, Shard
from coordinator.placement.board import Board
from coordinator.placement.shares import Band

Edge = tuple[int, str, str]
"""A shard and the workers that its primary role goes from and to."""


class RoleGraph:
    """Shards whose role may be handed over.

    `load` counts each worker's primaries; whoever takes an edge keeps it up to date. With `once` a shard's
    role changes hands a single time, as fits a plan in which a shard has at most one move.
    """

    def __init__(
        self, roles: Mapping[int, tuple[str, tuple[str, ...]]], bands: Mapping[str, Band], *, once: bool
    ) -> None:
        """`roles` maps shard ids to primary and holders; workers without a band take no part."""
        self._bands = bands
        self._once = once
        self._primary = {shard_id: primary for shard_id, (primary, _) in roles.items()}
        self._holders = {shard_id: holders for shard_id, (_, holders) in roles.items()}
        self._held: dict[str, list[int]] = {name: [] for name in bands}
        for shard_id, holders in self._holders.items():
            for name in holders:
                if name in self._held:
                    self._held[name].append(shard_id)

    def level(self, load: Counter[str], take: Callable[[Edge], None]) -> None:
        """Hands roles over until everybody is within the band or nothing helps."""
        bands = self._bands
        for name in sorted(bands):
            while load[name] > bands[name].high:
                path = self._search(name, self._out_of, lambda end: load[end] < bands[end].middle)
                path = path or self._search(name, self._out_of, lambda end: load[end] < bands[end].high)
                if not path:
                    break
                self._apply(path, take)
        for name in sorted(bands):
            while load[name] < bands[name].low:
                path = self._search(name, self._into, lambda end: load[end] > bands[end].middle)
                path = path or self._search(name, self._into, lambda end: load[end] > bands[end].low)
                if not path:
                    break
                self._apply(path, take)

    def _apply(self, path: list[Edge], take: Callable[[Edge], None]) -> None:
        for edge in path:
            take(edge)
            if self._once:
                del self._primary[edge[0]]
            else:
                self._primary[edge[0]] = edge[2]

    def _out_of(self, name: str) -> Iterable[tuple[str, Edge]]:
        """Workers that `name` can hand a role to."""
        for shard_id in self._held[name]:
            if self._primary.get(shard_id) == name:
                for other in self._holders[shard_id]:
                    if other != name and other in self._held:
                        yield other, (shard_id, name, other)

    def _into(self, name: str) -> Iterable[tuple[str, Edge]]:
        """Workers that can hand a role to `name`."""
        for shard_id in self._held[name]:
            primary = self._primary.get(shard_id, name)
            if primary != name and primary in self._held:
                yield primary, (shard_id, primary, name)

    def _search(
        self, start: str, neighbours: Callable[[str], Iterable[tuple[str, Edge]]], is_end: Callable[[str], bool]
    ) -> list[Edge]:
        """The edges of a shortest path from `start` to a worker that is an end; empty when there is none."""
        came: dict[str, tuple[str, Edge]] = {}
        queue = deque([start])
        while queue:
            name = queue.popleft()
            for other, edge in neighbours(name):
                if other == start or other in came:
                    continue
                came[other] = (name, edge)
                if is_end(other):
                    path = []
                    while other != start:
                        other, edge = came[other]
                        path.append(edge)
                    return path
                queue.append(other)
        return []


def transfer(board: Board) -> None:
    """Plans the transfers that bring every worker's primaries into the band."""
    load = board.primaries
    bands = {name: band for name, band in board.primary_bands.items() if name not in board.crowded}
    if all(band.low <= load[name] <= band.high for name, band in bands.items()):
        return
    shards: dict[int, Shard] = {}
    for shard in board.free_shards():
        if len(shard.in_sync) > 1 and shard.primary in bands and not board.is_dwelling(shard):
            shards[shard.id] = shard

    def take(edge: Edge) -> None:
        shard_id, source, target = edge
        name = source if load[source] > bands[source].fair else target
        reason = f"{name} is primary of {load[name]} shards, its fair share is {bands[name].fair:.1f}"
        board.add(shards[shard_id], source, target, MoveKind.TRANSFER, reason)

    roles = {shard_id: (shard.primary, shard.in_sync) for shard_id, shard in shards.items()}
    RoleGraph(roles, bands, once=True).level(load, take)
