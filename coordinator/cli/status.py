"""clusterctl status: the cluster at a glance, what is wrong first."""

from __future__ import annotations

import click

from coordinator.api.v1 import cluster_pb2
from coordinator.cli.masters import masters_table
from coordinator.cli.session import Command, Session, pass_session
from coordinator.cli.table import facts, paragraph
from coordinator.cli.words import local_time
from coordinator.model.errors import IndefiniteError, NoLeader, NotLeader

STALE = cluster_pb2.CONSISTENCY_STALE


def status_text(answer: cluster_pb2.GetStatusResponse) -> str:
    """The status for people."""
    warnings = [paragraph(problem, "warning: ") for problem in answer.problems]
    states = ", ".join(f"{count} {state}" for state, count in sorted(answer.nodes_by_state.items()) if count)
    shards = f"{answer.shards}, {answer.settings.replicas} replicas each"
    if answer.shards_short_of_replicas:
        shards += f"; {answer.shards_short_of_replicas} short of replicas"
    if answer.shards_unavailable:
        shards += f"; {answer.shards_unavailable} unavailable"
    jobs = f"{answer.jobs}, {answer.launches_in_progress} launches in progress"
    if answer.jobs_without_owner:
        jobs += f"; {answer.jobs_without_owner} without an owner"
    if answer.settings.cron_paused:
        jobs += "; schedules are paused"
    moves = f"{answer.moves} in progress" + ("; rebalancing is paused" if answer.settings.rebalance_paused else "")
    pairs = [
        ("cluster", f"{answer.cluster_name} ({answer.cluster_id})" if answer.cluster_id else answer.cluster_name),
        ("health", f"{len(answer.problems)} problems, see above" if answer.problems else "good, nothing is wrong"),
        ("leader", f"{answer.leader_id or 'none'}, term {answer.term}, index {answer.index}"),
        ("workers", states or "none"),
        ("shards", shards),
        ("moves", moves),
        ("cron jobs", jobs),
        ("time", local_time(answer.time_unix_ms)),
    ]
    parts = [*warnings, *([""] if warnings else []), facts(pairs), "", masters_table(answer.masters)]
    return "\n".join(parts)


@click.command(cls=Command)
@pass_session
def status(session: Session) -> int:
    """Show the cluster at a glance: leader, masters, workers, shards, moves, jobs, and what is wrong.

    While nobody leads it shows what the asked master knows, with a warning, and exits with 1.

    \b
    Examples:
      clusterctl status
      clusterctl -o json status | jq '.problems'
    """
    client = session.client()
    try:
        answer, exit_status = client.get_status(), 0
    except (NoLeader, NotLeader, IndefiniteError) as error:
        answer, exit_status = client.get_status(consistency=STALE), 1
        answer.problems.insert(0, f"{error}; what follows is what one master knows, and may be old")
    session.show(answer, lambda: status_text(answer))
    return exit_status
