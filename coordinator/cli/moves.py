"""clusterctl moves: the migrations of replicas, those that run and those that ended."""

from __future__ import annotations

from collections.abc import Iterable

import click

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.cli.session import Group, Session, now_unix_ms, pass_session
from coordinator.cli.structure import to_plain
from coordinator.cli.table import Column, facts, table
from coordinator.cli.words import NOTHING, age, duration, local_time, percent, size, word
from coordinator.model.errors import RefusalReason, Refused

COLUMNS = (
    Column("MOVE", right=True),
    Column("SHARD", right=True),
    Column("KIND"),
    Column("FROM"),
    Column("TO"),
    Column("PHASE"),
    Column("SINCE", right=True),
    Column("COPIED", right=True),
    Column("RATE", right=True),
    Column("LEFT", right=True),
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


def copied(progress: cluster_pb2.MoveProgress | None) -> str:
    """Share of a copy that was sent: "42.0%"; the whole is an estimate."""
    if progress is None or not progress.copy_rows:
        return NOTHING
    return percent(min(1.0, progress.copied_rows / progress.copy_rows))


def rate(progress: cluster_pb2.MoveProgress | None) -> str:
    """How fast a copy goes: "1.2 MiB/s"."""
    return f"{size(progress.bytes_per_s)}/s" if progress is not None and progress.bytes_per_s else NOTHING


def left(progress: cluster_pb2.MoveProgress | None) -> str:
    """How long a copy will take: "12s"."""
    return duration(progress.remaining_s) if progress is not None and progress.remaining_s >= 0 else NOTHING


def copy_text(progress: cluster_pb2.MoveProgress | None) -> str:
    """How far a copy is, in full."""
    if progress is None:
        return NOTHING
    speed = f", {rate(progress)}" if progress.bytes_per_s else ""
    rest = f", {left(progress)} left" if progress.remaining_s >= 0 else ""
    rows = f"{progress.copied_rows} of about {progress.copy_rows} rows ({copied(progress)})"
    return f"{rows}, {size(progress.copied_bytes)}{speed}{rest}"


def moves_table(moves: Iterable[types_pb2.Move], progress: Iterable[cluster_pb2.MoveProgress] = ()) -> str:
    """Moves for people."""
    now_ms = now_unix_ms()
    of_move = {item.move_id: item for item in progress}
    rows = [
        [
            str(move.id),
            shards_of(move),
            word(types_pb2.MoveKind.DESCRIPTOR, move.kind),
            move.source or NOTHING,
            move.target or NOTHING,
            word(types_pb2.MovePhase.DESCRIPTOR, move.phase),
            age(move.phase_since_unix_ms, now_ms),
            copied(of_move.get(move.id)),
            rate(of_move.get(move.id)),
            left(of_move.get(move.id)),
            f"{move.reason}; {move.outcome}" if move.outcome else move.reason,
        ]
        for move in moves
    ]
    return table(COLUMNS, rows) if rows else "no move"


def shards_of(move: types_pb2.Move) -> str:
    """The shard of a move, or both of a merge: "17+18"."""
    return f"{move.shard_id}+{move.other_shard_id}" if move.other_shard_id else str(move.shard_id)


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


def move_text(move: types_pb2.Move, progress: cluster_pb2.MoveProgress | None = None) -> str:
    """One move for people."""
    phase = word(types_pb2.MovePhase.DESCRIPTOR, move.phase)
    return facts(
        [
            ("move", str(move.id)),
            ("shard", shards_of(move)),
            ("kind", word(types_pb2.MoveKind.DESCRIPTOR, move.kind)),
            ("from", move.source or NOTHING),
            ("to", move.target or NOTHING),
            ("phase", f"{phase}, since {local_time(move.phase_since_unix_ms)}"),
            ("started", local_time(move.started_unix_ms)),
            ("copied", copy_text(progress)),
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
    """List the moves that run, how far and how fast their copies are, and how long they will take.

    \b
    Examples:
      clusterctl moves list
      clusterctl moves list --all -o json | jq '.moves[] | select(.phase == "aborted")'
    """
    answer = session.client().list_moves(include_ended=include_ended, with_progress=True)
    session.show(answer, lambda: moves_table(answer.moves, answer.progress))


@moves.command("show")
@click.argument("move", type=click.IntRange(min=1))
@pass_session
def show_move(session: Session, move: int) -> None:
    """Show one move: how far it is, why it was started, and what started it.

    \b
    Example:
      clusterctl moves show 17
    """
    answer = session.client().list_moves(include_ended=True, move_id=move, with_progress=True)
    found = next((item for item in answer.moves if item.id == move), None)
    if found is None:
        raise Refused(RefusalReason.NOT_FOUND, f"no move {move} is known; only the latest that ended are kept")
    progress = next(iter(answer.progress), None)
    plain = {**to_plain(found), "progress": to_plain(progress) if progress is not None else None}
    session.show(plain, lambda: move_text(found, progress))


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
