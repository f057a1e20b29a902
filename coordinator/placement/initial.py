"""The first workers of shards that never had any.

Shard by shard the ring chooses, with bounded loads and distinct zones. The last shards may find the only
free places on a worker that they have already, or in one zone; a few rounds of the planner's own mending
and balancing, on paper, put that right. So does an evening out of the primary roles. A new cluster begins
with nothing to move wherever that is possible.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import Shard
from coordinator.placement.balance import balance
from coordinator.placement.board import Board, RingOf
from coordinator.placement.primaries import Edge, RoleGraph
from coordinator.placement.upkeep import spread_zones

POLISH_ROUNDS_MAX = 5

Choice = tuple[str, tuple[str, ...]]
"""The primary and all holders of a shard."""


def assign_fresh(state: State, settings: PlacementSettings, ring_of: RingOf) -> list[tuple[int, tuple[str, ...]]]:
    """(shard id, workers with the primary first), by shard id; empty while no worker may receive."""
    fresh = [shard for _, shard in sorted(state.shards.items()) if not shard.in_sync and shard.epoch == 0]
    if not fresh:
        return []
    board = Board(state, settings, state.time_ms, ring_of, shard_count=len(state.shards))
    if not board.receiving or not board.replicas:
        return []
    chosen = {shard.id: _choose(board, shard) for shard in fresh}
    for _ in range(POLISH_ROUNDS_MAX):
        polished = _polish(state, settings, ring_of, chosen)
        if polished is None:
            break
        board, chosen = polished
    primaries = _level_roles(board, chosen)
    return [
        (shard_id, (primaries[shard_id], *(name for name in holders if name != primaries[shard_id])))
        for shard_id, (_, holders) in chosen.items()
    ]


def _choose(board: Board, shard: Shard) -> Choice:
    holders: tuple[str, ...] = ()
    while len(holders) < min(board.replicas, len(board.receiving)):
        name = board.choose(shard.lo, holders, overflow=True)
        assert name is not None, "there are more workers than the shard has"
        board.add_load(name, 1)
        holders = (*holders, name)
    primary = min(holders, key=lambda name: (board.primaries[name] + 1) / board.fair_now[name])
    board.primaries[primary] += 1
    return primary, holders


def _polish(
    state: State, settings: PlacementSettings, ring_of: RingOf, chosen: dict[int, Choice]
) -> tuple[Board, dict[int, Choice]] | None:
    """One round of mending on paper; None when nothing was to be mended."""
    shards = {
        shard_id: replace(
            state.shards[shard_id], epoch=1, primary=primary, in_sync=tuple(sorted(holders)), is_formed=True
        )
        for shard_id, (primary, holders) in chosen.items()
    }
    trial = replace(state, shards=state.shards.update(shards))
    board = Board(trial, settings, state.time_ms, ring_of)
    board.busy.update(shard.id for shard in board.shards if shard.id not in chosen)
    spread_zones(board)
    balance(board)
    if not board.planned:
        return None
    for move in board.planned:
        shard = shards[move.shard_id]
        chosen[move.shard_id] = (board.primary(shard), board.holders(shard))
    return board, chosen


def _level_roles(board: Board, chosen: dict[int, Choice]) -> dict[int, str]:
    """The primaries of new shards, evened out."""
    primaries = {shard_id: primary for shard_id, (primary, _) in chosen.items()}

    def take(edge: Edge) -> None:
        shard_id, source, target = edge
        primaries[shard_id] = target
        board.primaries[source] -= 1
        board.primaries[target] += 1

    RoleGraph(chosen, board.primary_bands, once=False).level(board.primaries, take)
    return primaries
