"""How much is in the shards, as their primaries said last: soft state of one leader, shared by its controllers.

Only the word of a shard's present primary counts. What is told of a copy that runs becomes a rate, smoothed over the
latest reports, and an estimate; a copy that begins anew starts both over.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.api.v1 import session_pb2
from coordinator.control.interface import Applied, Event, FiguresReported
from coordinator.machine.state import MoveChanged, ShardChanged, State
from coordinator.model import Monotonic, Move, MovePhase, Shard

SMOOTHING = 0.5
"""Share of the latest report in the rates: with one every few seconds they follow a change within ten."""


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far the copy of a move is. Fields as in `MoveProgress` of cluster.proto."""

    move_id: int
    copied_rows: int
    copied_bytes: int
    copy_rows: int
    bytes_per_s: float
    """0 while nothing is known."""
    remaining_s: float
    """Negative while nothing is known."""


@dataclass(frozen=True, slots=True)
class DamagedCopy:
    """The last copy of a shard, of which some rows are damaged; the others are served."""

    shard_id: int
    node_id: str
    damage: str


@dataclass(slots=True)
class _Copy:
    at: Monotonic
    rows: int
    bytes: int
    rows_per_s: float = 0.0
    bytes_per_s: float = 0.0


class Figures:
    """The book of one leader. Whoever owns it shows it every event before anybody asks."""

    def __init__(self) -> None:
        self._figures: dict[int, tuple[str, session_pb2.ShardFigure]] = {}
        self._copies: dict[int, _Copy] = {}

    def take(self, now: Monotonic, event: Event) -> None:
        """Takes an event in; figures must be of the session that speaks for its worker."""
        match event:
            case FiguresReported():
                for figure in event.figures:
                    self._figures[figure.shard_id] = (event.node_id, figure)
                    self._note_copy(now, figure)
            case Applied():
                for change in event.changes:
                    if isinstance(change, ShardChanged) and change.after is None and change.before is not None:
                        self._figures.pop(change.before.id, None)
                        self._copies.pop(change.before.id, None)
                    elif isinstance(change, MoveChanged) and change.after.phase is not MovePhase.COPYING:
                        self._copies.pop(change.after.shard_id, None)
            case _:
                pass

    def _note_copy(self, now: Monotonic, figure: session_pb2.ShardFigure) -> None:
        before = self._copies.get(figure.shard_id)
        if not figure.copy_rows:
            self._copies.pop(figure.shard_id, None)
        elif before is None or figure.copied_rows < before.rows or figure.copied_bytes < before.bytes:
            self._copies[figure.shard_id] = _Copy(now, figure.copied_rows, figure.copied_bytes)
        elif now > before.at:
            elapsed_s = now - before.at
            rows_per_s = (figure.copied_rows - before.rows) / elapsed_s
            bytes_per_s = (figure.copied_bytes - before.bytes) / elapsed_s
            if before.bytes_per_s:
                rows_per_s = SMOOTHING * rows_per_s + (1 - SMOOTHING) * before.rows_per_s
                bytes_per_s = SMOOTHING * bytes_per_s + (1 - SMOOTHING) * before.bytes_per_s
            self._copies[figure.shard_id] = _Copy(
                now, figure.copied_rows, figure.copied_bytes, rows_per_s, bytes_per_s
            )

    def of(self, shard: Shard) -> session_pb2.ShardFigure | None:
        """What the shard's primary said last; None when it has said nothing under this leader."""
        node_id, figure = self._figures.get(shard.id, ("", None))
        return figure if node_id == shard.primary else None

    def damaged(self, state: State) -> tuple[DamagedCopy, ...]:
        """Last copies that are damaged and stay in service, by shard."""
        found = [
            DamagedCopy(shard_id, node_id, figure.damage)
            for shard_id, (node_id, figure) in sorted(self._figures.items())
            if figure.damage and (shard := state.shards.get(shard_id)) is not None and shard.primary == node_id
        ]
        return tuple(found)

    def progress(self, state: State, move: Move) -> CopyProgress | None:
        """How far the copy of a move is; None when nothing is copied, or nothing is known of it."""
        shard = state.shards.get(move.shard_id)
        figure = self.of(shard) if shard is not None else None
        copy = self._copies.get(move.shard_id)
        if move.phase is not MovePhase.COPYING or figure is None or copy is None:
            return None
        left_rows = max(0, figure.copy_rows - figure.copied_rows)
        return CopyProgress(
            move_id=move.id,
            copied_rows=figure.copied_rows,
            copied_bytes=figure.copied_bytes,
            copy_rows=figure.copy_rows,
            bytes_per_s=copy.bytes_per_s,
            remaining_s=left_rows / copy.rows_per_s if copy.rows_per_s > 0 else -1.0,
        )
