"""The planner: from the state to a plan, sticky and minimal.

Steps, the most urgent first (DESIGN.md section 6). Each sees the effect of those before it and of the moves
that run:

    REPAIR    a shard has too few copies          waits `hold_s` for a lost worker unless one copy is left
    DRAIN     a worker is to be emptied           an operator asked, so it goes on while rebalancing is paused
    ZONE      copies share a zone, another is free
    BALANCE   a worker is outside its band        not within `dwell_s` of the shard's last move
    TRANSFER  primary roles are uneven            likewise; nothing is copied
    SURPLUS   a shard has too many copies

Splits of what is too big and joins of what is small follow from figures that are in no state: control/reshape.py.
Shards that are not formed yet, or in quarantine, are left where they are.

Invariants: at most one move per shard; only workers that may receive are targets; no move leaves a shard
with fewer in-sync copies than min(wanted, workers that may receive), and none that is not a surplus copy is
dropped without a replacement; the same state and time give the same plan; applying plans until none is left
ends.

The plan holds the whole way; the budgets mark what may start now. The caller starts those and asks again
later.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import MoveKind, NodeState, WallMs
from coordinator.placement.balance import balance
from coordinator.placement.board import Board, is_drained
from coordinator.placement.initial import assign_fresh
from coordinator.placement.jobs import JobAssignment, JobPlacer
from coordinator.placement.plan import DrainCheck, LoadChange, Plan, within_budgets
from coordinator.placement.primaries import transfer
from coordinator.placement.ring import Ring, RingMember
from coordinator.placement.upkeep import drop_surplus, empty_drained, repair, spread_zones

RINGS_KEPT = 4


class Planner:
    """Plans placements. Keeps nothing but the rings of the last memberships, which follow from their members."""

    def __init__(self, settings: PlacementSettings) -> None:
        self._settings = settings
        self._rings: dict[tuple[RingMember, ...], Ring] = {}

    def ring_of(self, members: tuple[RingMember, ...]) -> Ring:
        """The ring of a membership, remembered."""
        ring = self._rings.pop(members, None) or Ring(members, self._settings.tokens_per_weight)
        self._rings[members] = ring
        while len(self._rings) > RINGS_KEPT:
            del self._rings[next(iter(self._rings))]
        return ring

    def plan(
        self,
        state: State,
        now_ms: WallMs,
        crowded: frozenset[str] = frozenset(),
        avoided: frozenset[str] = frozenset(),
    ) -> Plan:
        """All moves that the state calls for, at the wall time `now_ms`.

        Balance gives nothing to who is `crowded`, and nobody gives a copy to who is `avoided`.
        """
        return self._plan(state, now_ms, crowded, avoided)[0]

    def _plan(
        self,
        state: State,
        now_ms: WallMs,
        crowded: frozenset[str] = frozenset(),
        avoided: frozenset[str] = frozenset(),
    ) -> tuple[Plan, Board]:
        board = Board(state, self._settings, now_ms, self.ring_of)
        board.crowded, board.avoided = crowded | avoided, avoided
        paused = state.settings.rebalance_paused
        _refuse_unassigned(board)
        drop_surplus(board, paused=paused)
        repair(board)
        empty_drained(board)
        if not paused:
            spread_zones(board)
            balance(board)
            transfer(board)
        moves = within_budgets(sorted(board.planned, key=lambda move: move.kind.value), state, self._settings)
        plan = Plan(
            moves=moves,
            refusals=board.refusals.texts(),
            loads=_loads(board),
            peak_to_average_before=_peak(board, board.load_before),
            peak_to_average_after=_peak(board, board.load),
            key_share_moved=sum(move.key_share for move in moves if move.sender),
            wake_ms=board.wake_ms,
        )
        return plan, board

    def assign_initial(self, state: State) -> list[tuple[int, tuple[str, ...]]]:
        """First workers of shards that never had any: (shard id, workers with the primary first), by id.

        Empty while no worker may receive; fewer workers than wanted copies get what is possible.
        """
        return assign_fresh(state, self._settings, self.ring_of)

    def assign_jobs(self, state: State) -> list[JobAssignment]:
        """The cron jobs whose owner or backups must change: (job id, owner, backups), by job id."""
        return JobPlacer(state, self._settings, self.ring_of).decide()

    def drain_check(self, state: State, node_id: str, now_ms: WallMs) -> DrainCheck:
        """Is it safe to remove this worker? Plans as if it were being drained, and says what stands against it."""
        node = state.nodes.get(node_id)
        if node is None:
            return DrainCheck(False, (f"there is no worker {node_id}",))
        drained = replace(node, drain_requested=True)
        if node.state is NodeState.ACTIVE:
            drained = replace(drained, state=NodeState.DRAINING)
        plan, board = self._plan(replace(state, nodes=state.nodes.set(node_id, drained)), now_ms)
        problems = list(board.refusals.about(node_id))
        others = [other.id for other in board.nodes.values() if other.may_receive and not is_drained(other)]
        if not others and any(job.owner == node_id for job in state.jobs.values()):
            problems.append(f"no other worker can own the cron jobs of {node_id}")
        below = [
            shard.id
            for shard in board.free_shards()
            if node_id in shard.in_sync and len(shard.in_sync) < min(board.replicas, len(others) + 1)
        ]
        if below and not problems:
            problems.append(f"{len(below)} shards of {node_id} have too few copies already")
        moves = tuple(
            move
            for move in plan.moves
            if move.source == node_id
            or (move.kind is MoveKind.REPAIR and node_id in state.shards[move.shard_id].in_sync)
        )
        return DrainCheck(not problems, tuple(problems), moves)


def _refuse_unassigned(board: Board) -> None:
    for _, shard in sorted(board.state.shards.items()):
        if not shard.in_sync and shard.epoch == 0 and not board.receiving:
            board.refusals.shard(shard.id, "has|have no worker yet", "no worker can receive shards")
        elif not shard.in_sync and shard.epoch:
            board.refusals.shard(shard.id, "has|have lost every copy", "start a worker that held it again")


def _loads(board: Board) -> tuple[LoadChange, ...]:
    names = {node.id for node in board.nodes.values() if node.state is not NodeState.LEFT}
    names |= {name for name, load in board.load_before.items() if load} | {
        name for name, load in board.load.items() if load
    }
    return tuple(
        LoadChange(
            node_id=name,
            fair_share=board.fair_now.get(name, 0.0),
            replicas_before=board.load_before[name],
            replicas_after=board.load[name],
            primaries_before=board.primaries_before[name],
            primaries_after=board.primaries[name],
        )
        for name in sorted(names)
    )


def _peak(board: Board, loads: dict[str, int]) -> float:
    """Highest load over the average among workers that may receive, weighted; 0 when there is nothing to compare."""
    total = sum(loads[name] for name in board.receiving)
    fair_total = sum(board.fair_now.values())
    if not total or not fair_total:
        return 0.0
    return max(loads[name] / board.fair_now[name] for name in board.receiving) * fair_total / total
