"""Balance: workers below their band are filled, workers above it are relieved, everybody else is left alone.

Who gives to whom is a matching, nearest first: every shard that may leave its worker is offered to the
taker that the ring prefers for it, and the offers are taken in the order of their distance on the ring. So
a newcomer gets the shards that it would have had from the start, and the same change always gives the same
plan.

    1. from workers above their band  to those that are being filled
    2. from workers above their share to those that are being filled
    3. from workers within the band   to those still below it
    4. from workers above their band  to anybody with room

A worker below its band is filled up to its fair share, over several rounds if the budgets make it so: one
that took a balance move within the dwell time counts as being filled. Workers above their band go down to
the band only.

It ends, and never swings: steps 1 and 4 lower the excess above the bands, steps 2 and 3 the lack below the
goals, and no step makes a worker leave its band at either end.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from coordinator.model import MoveKind, MovePhase, Shard
from coordinator.placement.board import FAIR, FULL, LOW, Board
from coordinator.placement.ring import Ring, shard_position

SUBSET_SHARE_MAX = 0.25
"""With fewer takers than this share of the members a ring of their own saves long walks."""

Test = Callable[[str], bool]


def balance(board: Board) -> None:
    """Plans the moves that bring every worker into its band."""
    if not board.replicas or len(board.receiving) < 2:
        return
    _Balancer(board).run()


class _Balancer:
    """One plan's balancing."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._movable: dict[str, list[Shard]] | None = None
        self._waits = 0
        """Shards that stay because they moved lately."""

    def run(self) -> None:
        board = self._board
        filling = self._being_filled()

        def is_over(name: str) -> bool:
            return board.load[name] > board.bands[name].high

        def is_under(name: str) -> bool:
            return board.level[name] == LOW

        def wants(name: str) -> bool:
            return name in filling and board.load[name] < board.bands[name].goal

        if filling:
            self._match(is_over, wants)
            self._match(lambda name: board.load[name] > board.bands[name].goal, wants)
            self._match(lambda name: board.load[name] > board.bands[name].low, is_under)
        if any(is_over(name) for name in board.receiving):
            self._match(is_over, lambda name: board.level[name] <= FAIR)
            self._match(is_over, lambda name: board.level[name] != FULL)
        self._explain()

    def _being_filled(self) -> set[str]:
        board = self._board
        filling = {name for name in board.receiving if board.level[name] == LOW}
        for move in chain(board.state.moves.values(), board.state.ended_moves.values()):
            if (
                move.kind is not MoveKind.BALANCE
                or move.phase is MovePhase.ABORTED
                or move.target not in board.receiving
            ):
                continue
            if not move.has_ended or board.was_lately(max(move.phase_since_ms, move.started_ms)):
                filling.add(move.target)
        return filling

    def _movable_by_worker(self) -> dict[str, list[Shard]]:
        """Shards that balance may move, by each worker that holds them."""
        if self._movable is None:
            self._movable = {name: [] for name in self._board.receiving}
            for shard in self._board.free_shards():
                if self._board.is_dwelling(shard):
                    self._waits += 1
                elif self._board.is_serving(shard.primary):
                    for name in shard.in_sync:
                        if name in self._movable:
                            self._movable[name].append(shard)
        return self._movable

    def _match(self, gives: Test, takes: Test) -> None:
        """Matches until nobody gives, nobody takes, or nothing fits."""
        board = self._board
        while True:
            givers = [name for name in board.receiving if gives(name)]
            takers = frozenset(name for name in board.receiving if takes(name) and name not in board.crowded)
            if not givers or not takers:
                return
            applied = 0
            for _, shard_id, giver, taker, shard in self._offers(givers, takers):
                if shard_id not in board.busy and gives(giver) and takes(taker):
                    board.add(shard, giver, taker, MoveKind.BALANCE, self._reason(giver, taker))
                    applied += 1
            if not applied:
                return

    def _offers(self, givers: list[str], takers: frozenset[str]) -> list[tuple[int, int, str, str, Shard]]:
        """(distance, shard id, giver, taker, shard) for each shard that may move, nearest first."""
        board = self._board
        is_few = len(takers) < SUBSET_SHARE_MAX * len(board.receiving)
        ring = board.ring.subset(takers) if is_few else board.ring
        taker_domains = {board.domains[name] for name in takers}
        movable = self._movable_by_worker()
        offers: list[tuple[int, int, str, str, Shard]] = []
        for giver in givers:
            for shard in movable[giver]:
                if shard.id not in board.busy:
                    found = self._taker_of(ring, shard, giver, takers, taker_domains)
                    if found is not None:
                        offers.append((found[0], shard.id, giver, found[1], shard))
        offers.sort(key=lambda offer: offer[:3])
        return offers

    def _taker_of(
        self, ring: Ring, shard: Shard, giver: str, takers: frozenset[str], taker_domains: set[str]
    ) -> tuple[int, str] | None:
        """The taker that the ring prefers for the shard; never one that brings two copies into one zone."""
        board = self._board
        domains = board.domains
        holders = shard.in_sync
        others = {board.domain(name) for name in holders if name != giver}
        if len(others | {board.domain(giver)}) > len(others):
            if taker_domains <= others:
                return None
            return ring.first(
                shard_position(shard.lo),
                lambda name: name in takers and name not in holders and domains[name] not in others,
            )
        if len(takers) <= len(holders) and takers.issubset(holders):
            return None
        return ring.first(shard_position(shard.lo), lambda name: name in takers and name not in holders)

    def _reason(self, giver: str, taker: str) -> str:
        board = self._board
        band = board.bands[taker]
        if board.load[giver] > board.bands[giver].high:
            return f"{giver} holds {board.load[giver]} copies, its bound is {board.bands[giver].high}"
        return f"{taker} holds {board.load[taker]} copies, its fair share is {band.fair:.1f}"

    def _explain(self) -> None:
        """Says who stays outside its band, and why."""
        board = self._board
        total = sum(board.load[name] for name in board.receiving)
        if total < sum(board.bands[name].low for name in board.receiving):
            return
        waits = f"{self._waits} shards moved less than {board.settings.dwell_s:g} s ago" if self._waits else ""
        why = waits or "every move would break a rule or another worker's bound"
        changing = board.changing()
        for name in sorted(board.receiving):
            load, band = board.load[name], board.bands[name]
            if name in changing or name in board.crowded:
                continue  # What moves now opens the way for more; the next plan will say.
            if load > band.high:
                board.refusals.sentence(f"{name} holds {load} copies, above its bound of {band.high}: {why}", name)
            elif load < band.low:
                board.refusals.sentence(f"{name} holds {load} copies, below its bound of {band.low}: {why}", name)
