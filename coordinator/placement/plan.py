"""What the planner answers: moves with their reasons, refusals, and what the moves do to the loads; and the budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import Move, MoveKind, WallMs

SHARDS_NAMED_MAX = 5


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """A move that the planner would start. Fields as in cluster.proto, the epoch as in `StartMove` of command.proto."""

    shard_id: int
    source: str
    target: str
    kind: MoveKind
    reason: str
    expected_epoch: int
    within_budget: bool = False
    key_share: float = 0.0
    """Share of the key space that the shard holds, above 0, at most 1."""
    sender: str = ""
    """Worker that the copy comes out of; empty when nothing is copied."""


@dataclass(frozen=True, slots=True)
class LoadChange:
    """A worker's load before and after the whole plan. Fields as in `LoadChange` of cluster.proto."""

    node_id: str
    fair_share: float
    replicas_before: int
    replicas_after: int
    primaries_before: int
    primaries_after: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole way from here to a good placement, in the order in which the moves would start."""

    moves: tuple[PlannedMove, ...] = ()
    refusals: tuple[str, ...] = ()
    """What would be desirable and is not possible now; one sentence each."""
    loads: tuple[LoadChange, ...] = ()
    """Sorted by worker."""
    peak_to_average_before: float = 0.0
    peak_to_average_after: float = 0.0
    key_share_moved: float = 0.0
    """Share of the key space that the plan copies."""
    wake_ms: WallMs | None = None
    """When waiting alone (a hold, a dwell) may change the plan; None when nothing waits."""

    @property
    def startable(self) -> tuple[PlannedMove, ...]:
        """The moves that the budgets let start now."""
        return tuple(move for move in self.moves if move.within_budget)


class DrainCheck(NamedTuple):
    """Is it safe to remove a worker? Fields as in `DrainNodeResponse` of cluster.proto."""

    safe: bool
    problems: tuple[str, ...] = ()
    moves: tuple[PlannedMove, ...] = ()


class Refusals:
    """Collects refusals; shards that are refused for the same reason share one sentence."""

    def __init__(self) -> None:
        self._shards: dict[tuple[str, str, str], list[int]] = {}
        self._sentences: list[tuple[str, str]] = []

    def shard(self, shard_id: int, what: str, why: str, node_id: str = "") -> None:
        """`what` has a verb for one shard, "needs|need 1 more replica"; `node_id` is the worker that it is about."""
        self._shards.setdefault((what, why, node_id), []).append(shard_id)

    def sentence(self, text: str, node_id: str = "") -> None:
        """A refusal that is about no single shard."""
        self._sentences.append((text, node_id))

    def about(self, node_id: str) -> tuple[str, ...]:
        """The refusals about one worker."""
        return tuple(text for text, about in self._all() if about == node_id)

    def texts(self) -> tuple[str, ...]:
        """All of them, in the order in which they came up."""
        return tuple(text for text, _ in self._all())

    def _all(self) -> list[tuple[str, str]]:
        grouped = []
        for (what, why, node_id), shard_ids in self._shards.items():
            words = [word.partition("|") for word in what.split(" ")]
            one = len(shard_ids) == 1
            verb = " ".join(first if one or not bar else last for first, bar, last in words)
            grouped.append((f"{name_shards(shard_ids)} {verb}: {why}", node_id))
        return grouped + self._sentences


def name_shards(shard_ids: Sequence[int]) -> str:
    """ "shard 7", "shards 1, 2 and 9", "120 shards (1, 2, 3, 4, 5, ...)"."""
    if len(shard_ids) == 1:
        return f"shard {shard_ids[0]}"
    if len(shard_ids) <= SHARDS_NAMED_MAX:
        return f"shards {', '.join(map(str, shard_ids[:-1]))} and {shard_ids[-1]}"
    return f"{len(shard_ids)} shards ({', '.join(map(str, shard_ids[:SHARDS_NAMED_MAX]))}, ...)"


class _Budget:
    """What may start beside the moves that run already.

    Copies count against the worker that receives and the one that sends (the primary, for a repair);
    handing a role over or dropping a copy moves no data and counts only in the cluster.
    """

    def __init__(self, state: State, settings: PlacementSettings) -> None:
        self._settings = settings
        self._running = 0
        self._into: Counter[str] = Counter()
        self._out_of: Counter[str] = Counter()
        self._share = 0.0
        for move in state.moves.values():
            if not move.has_ended:
                self._count_running(state, move)

    def _count_running(self, state: State, move: Move) -> None:
        self._running += 1
        shard = state.shards.get(move.shard_id)
        is_copied = move.kind not in (MoveKind.TRANSFER, MoveKind.SURPLUS) and not move.kind.is_reshape
        if shard is not None and is_copied:
            self._into[move.target] += 1
            self._out_of[move.source or shard.primary] += 1
        if move.kind is MoveKind.BALANCE and shard is not None:
            self._share += shard.key_share

    def admit(self, move: PlannedMove) -> bool:
        settings = self._settings
        if self._running >= settings.moves_max:
            return False
        is_copied = bool(move.sender)
        if is_copied and self._into[move.target] >= settings.moves_in_max:
            return False
        if is_copied and self._out_of[move.sender] >= settings.moves_out_max:
            return False
        if move.kind is MoveKind.BALANCE:
            # One move may always run, or a cluster of a few large shards could never be balanced.
            if self._share and self._share + move.key_share > settings.round_key_share_max:
                return False
            self._share += move.key_share
        self._running += 1
        if is_copied:
            self._into[move.target] += 1
            self._out_of[move.sender] += 1
        return True


def within_budgets(moves: Sequence[PlannedMove], state: State, settings: PlacementSettings) -> tuple[PlannedMove, ...]:
    """The moves in their order, each marked with whether it may start now."""
    budget = _Budget(state, settings)
    return tuple(replace(move, within_budget=True) if budget.admit(move) else move for move in moves)
