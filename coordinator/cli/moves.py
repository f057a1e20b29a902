"""clusterctl moves: the migrations of replicas, those that run and those that ended."""

from __future__ import annotations

from collections.abc import Iterable

import click

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.cli.session import Group, Session, now_unix_ms, pass_session
from coordinator.cli.table import Column, facts, table
from coordinator.cli.words import NOTHING, age, local_time, word
from coordinator.model.errors import RefusalReason, Refused

COLUMNS = (
    Column("MOVE", right=True),
    Column("SHARD", right=True),
    Column("KIND"),
    Column("FROM"),
    Column("TO"),
    Column("PHASE"),
    Column("SINCE", right=True),
    Column("WHY", wrap=True),
)
PLANNED_COLUMNS = (
    Column("SHARD", right=True),
    Column("KIND"),
    Column("FROM"),
    Column("TO"),
    Column("NOW"),
    Column("WHY", wrap=True),
)


def moves_table(moves: Iterable[types_pb2.Move]) -> str:
    """Moves for people."""
    now_ms = now_unix_ms()
    rows = [
        [
            str(move.id),
            str(move.shard_id),
            word(types_pb2.MoveKind.DESCRIPTOR, move.kind),
            move.source or NOTHING,
            move.target or NOTHING,
            word(types_pb2.MovePhase.DESCRIPTOR, move.phase),
            age(move.phase_since_unix_ms, now_ms),
            f"{move.reason}; {move.outcome}" if move.outcome else move.reason,
        ]
        for move in moves
    ]
    return table(COLUMNS, rows) if rows else "no move"


def planned_moves_table(moves: Iterable[cluster_pb2.PlannedMove]) -> str:
    """Planned moves for people; NOW is "yes" where the budgets let it start at once."""
    rows = [
        [
            str(move.shard_id),
            word(types_pb2.MoveKind.DESCRIPTOR, move.kind),
            move.source or NOTHING,
            move.target or NOTHING,
            "yes" if move.within_budget else "later",
            move.reason,
        ]
        for move in moves
    ]
    return table(PLANNED_COLUMNS, rows)


def move_text(move: types_pb2.Move) -> str:
    """One move for people."""
    phase = word(types_pb2.MovePhase.DESCRIPTOR, move.phase)
    return facts(
        [
            ("move", str(move.id)),
            ("shard", str(move.shard_id)),
            ("kind", word(types_pb2.MoveKind.DESCRIPTOR, move.kind)),
            ("from", move.source or NOTHING),
            ("to", move.target or NOTHING),
            ("phase", f"{phase}, since {local_time(move.phase_since_unix_ms)}"),
            ("started", local_time(move.started_unix_ms)),
            ("why", move.reason or NOTHING),
            ("outcome", move.outcome or NOTHING),
            ("cause", move.cause or NOTHING),
        ]
    )


@click.group(cls=Group)
def moves() -> None:
    """See the moves of shards between workers, and roll one back."""


@moves.command("list")
@click.option("--all", "include_ended", is_flag=True, help="Also the latest moves that have ended, and how.")
@pass_session
def list_moves(session: Session, include_ended: bool) -> None:
    """List the moves that run.

    \b
    Examples:
      clusterctl moves list
      clusterctl moves list --all -o json | jq '.moves[] | select(.phase == "aborted")'
    """
    answer = session.client().list_moves(include_ended=include_ended)
    session.show(answer, lambda: moves_table(answer.moves))


@moves.command("show")
@click.argument("move", type=click.IntRange(min=1))
@pass_session
def show_move(session: Session, move: int) -> None:
    """Show one move: how far it is, why it was started, and what started it.

    \b
    Example:
      clusterctl moves show 17
    """
    answer = session.client().list_moves(include_ended=True, move_id=move)
    found = next((item for item in answer.moves if item.id == move), None)
    if found is None:
        raise Refused(RefusalReason.NOT_FOUND, f"no move {move} is known; only the latest that ended are kept")
    session.show(found, lambda: move_text(found))


@moves.command("abort")
@click.argument("move", type=click.IntRange(min=1))
@click.option("--reason", default="an operator asked for it", show_default=True, help="Why; kept with the move.")
@pass_session
def abort(session: Session, move: int, reason: str) -> None:
    """Roll a move back. After its cutover a move can only go forward, and is refused.

    The planner may start it again: pause it first with `clusterctl rebalance --pause` if it should not.

    \b
    Example:
      clusterctl moves abort 17 --reason "w2 is about to be replaced"
    """
    answer = session.client().abort_move(move, reason)
    session.show(answer, lambda: f"move {move} is rolled back")
