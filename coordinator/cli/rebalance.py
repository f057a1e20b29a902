"""clusterctl rebalance: what the planner is doing, would do, and may do."""

from __future__ import annotations

from collections.abc import Iterable

import click

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.cli.moves import moves_table, planned_moves_table
from coordinator.cli.progress import Progress, wait_until
from coordinator.cli.session import Command, Session, pass_session
from coordinator.cli.structure import to_plain
from coordinator.cli.table import Column, paragraph, table
from coordinator.cli.words import duration, percent, size
from coordinator.client import ClusterClient

LOAD_COLUMNS = (
    Column("NODE"),
    Column("FAIR SHARE", right=True),
    Column("REPLICAS NOW", right=True),
    Column("AFTER", right=True),
    Column("PRIMARIES NOW", right=True),
    Column("AFTER", right=True),
)


def loads_table(loads: Iterable[cluster_pb2.LoadChange]) -> str:
    """Loads before and after a plan, for people."""
    rows = [
        [
            load.node_id,
            f"{load.fair_share:.1f}",
            str(load.replicas_before),
            str(load.replicas_after),
            str(load.primaries_before),
            str(load.primaries_after),
        ]
        for load in loads
    ]
    return table(LOAD_COLUMNS, rows)


def plan_text(plan: cluster_pb2.PlanRebalanceResponse) -> str:
    """The whole plan for people."""
    lines = [paragraph(refusal, "not possible: ") for refusal in plan.refusals]
    if plan.paused:
        lines.append("rebalancing is paused: only repairs would start")
    if plan.moves:
        now = sum(1 for move in plan.moves if move.within_budget)
        lines += [
            f"{len(plan.moves)} moves, {now} at once; they copy {percent(plan.key_share_moved)} of the key space",
            f"peak to average {plan.peak_to_average_before:.3f} now, {plan.peak_to_average_after:.3f} after",
            "",
            planned_moves_table(plan.moves),
        ]
    else:
        lines.append(f"nothing to move; peak to average {plan.peak_to_average_before:.3f}")
    return "\n".join([*lines, "", loads_table(plan.loads)])


def going_on_text(plan: cluster_pb2.PlanRebalanceResponse, moves: cluster_pb2.ListMovesResponse) -> str:
    """What the planner is doing, for people."""
    lines = [paragraph(refusal, "not possible: ") for refusal in plan.refusals]
    lines += [
        f"rebalancing is {'paused: only repairs start' if plan.paused else 'on'}",
        f"{len(moves.moves)} moves in progress, {len(plan.moves)} more planned",
        f"peak to average {plan.peak_to_average_before:.3f}",
    ]
    if moves.moves:
        lines += ["", moves_table(moves.moves, moves.progress)]
    return "\n".join([*lines, "", loads_table(plan.loads)])


def settings_text(settings: types_pb2.Settings) -> str:
    """What was set, for people."""
    said = "paused: only repairs start" if settings.rebalance_paused else "on"
    rate = f"{size(settings.copy_bytes_per_s)}/s per worker" if settings.copy_bytes_per_s else "not limited"
    return f"rebalancing is {said}; the rate of copies is {rate}"


def left_to_move(client: ClusterClient) -> str | None:
    """What is still to be moved, for people; None when the cluster is at rest."""
    running, plan = client.list_moves().moves, client.plan_rebalance()
    if not running and (not plan.moves or plan.paused):
        return None
    return f"{len(running)} moves in progress, {len(plan.moves)} planned, balance {plan.peak_to_average_before:.3f}"


@click.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Show the exact plan, and what it would do to the balance.")
@click.option("--pause", "paused", flag_value="yes", help="Let the planner only repair, until --resume.")
@click.option("--resume", "paused", flag_value="no", help="Let the planner balance again.")
@click.option(
    "--copy-rate", type=click.IntRange(min=0), default=None, metavar="BYTES",
    help="How fast each worker may send copies, in bytes per second; 0 for as fast as it can.",
)
@click.option("--wait", is_flag=True, help="Stay until nothing moves and nothing is planned.")
@click.option("--wait-timeout", type=float, default=3600.0, show_default=True, help="Seconds to wait with --wait.")
@pass_session
def rebalance(
    session: Session, dry_run: bool, paused: str | None, copy_rate: int | None, wait: bool, wait_timeout: float
) -> int:
    """See what the planner is doing; see its plan; pause and resume it; slow its copies down.

    The cluster balances itself all the time; this command never has to be used for that.
    Paused, it still repairs shards that lack a replica.

    \b
    Examples:
      clusterctl rebalance                what is going on
      clusterctl rebalance --dry-run      what would move, why, and the balance before and after
      clusterctl rebalance --pause        for example before an upgrade of many workers
      clusterctl rebalance --resume --wait
      clusterctl rebalance --copy-rate 20000000    20 MB per second and worker, from now on
    """
    if dry_run and (paused or wait or copy_rate is not None):
        raise click.UsageError(
            "--dry-run changes nothing and cannot be used with --pause, --resume, --copy-rate or --wait"
        )
    client = session.client()
    if paused is not None or copy_rate is not None:
        answer = client.change_settings(
            rebalance_paused=None if paused is None else paused == "yes", copy_bytes_per_s=copy_rate
        )
        session.show(answer, lambda: settings_text(answer.settings))
    if wait:
        with Progress() as progress:
            if not wait_until(lambda: left_to_move(client), wait_timeout, progress):
                click.echo(f"error: {left_to_move(client)} after {duration(wait_timeout)}; it goes on", err=True)
                return 1
            session.say(f"nothing moves and nothing is planned, after {duration(progress.elapsed_s)}")
    elif dry_run:
        plan = client.plan_rebalance()
        session.show(plan, lambda: plan_text(plan))
    elif paused is None and copy_rate is None:
        plan, moves = client.plan_rebalance(), client.list_moves(with_progress=True)
        session.show({"plan": to_plain(plan), **to_plain(moves)}, lambda: going_on_text(plan, moves))
    return 0
