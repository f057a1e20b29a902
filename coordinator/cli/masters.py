"""clusterctl masters: the masters, their Raft figures, who leads, and whose disk votes."""

from __future__ import annotations

from collections.abc import Iterable

import click

from coordinator.api.v1 import cluster_pb2
from coordinator.cli.session import Group, Session, now_unix_ms, pass_session
from coordinator.cli.table import Column, paragraph, table
from coordinator.cli.words import NOTHING, age, size
from coordinator.model.clock import offset_words

COLUMNS = (
    Column("MASTER"),
    Column("ROLE"),
    Column("ADDRESS"),
    Column("TERM", right=True),
    Column("COMMIT", right=True),
    Column("APPLIED", right=True),
    Column("LOG", right=True),
    Column("PEERS", right=True),
    Column("VERSION"),
    Column("UP", right=True),
)


def masters_table(masters: Iterable[cluster_pb2.Master]) -> str:
    """The masters for people; why one is unreachable comes below the table."""
    now_ms, rows, problems = now_unix_ms(), [], []
    for master in masters:
        figures = [
            str(master.term),
            str(master.commit_index),
            str(master.applied_index),
            size(master.log_bytes) if master.log_bytes else f"{master.log_entries}",
            str(len(master.connected_peers)),
            master.version or NOTHING,
            age(master.started_unix_ms, now_ms),
        ]
        answered = master.role != "unreachable"
        rows.append([master.id, master.role, master.grpc_address, *(figures if answered else [NOTHING] * 7)])
        if master.problem:
            problems.append(paragraph(master.problem, f"{master.id}: "))
        if master.clock_is_off or master.refuses_to_lead:
            problems.append(paragraph(clock_words(master), f"{master.id}: "))
    return "\n".join([table(COLUMNS, rows), *problems])


def clock_words(master: cluster_pb2.Master) -> str:
    """What is wrong with a master's wall clock."""
    what = f"its wall clock is {offset_words(master.clock_offset_ms / 1_000)} the other masters'"
    return f"{what}, so it refuses to lead" if master.refuses_to_lead else what


@click.group(cls=Group)
def masters() -> None:
    """See the masters: who leads, how far each has come; choose who leads; replace a lost disk."""


@masters.command("list")
@pass_session
def list_masters(session: Session) -> None:
    """List the masters with their role, term, commit and applied index, log and connected peers.

    Works without a leader too: any master that answers tells what it knows.

    \b
    Examples:
      clusterctl masters list
      clusterctl masters list -o json | jq -r '.masters[] | select(.role == "leader") | .id'
    """
    answer = session.client().list_masters()
    session.show(answer, lambda: masters_table(answer.masters))


@masters.command("transfer")
@click.argument("master", default="")
@pass_session
def transfer(session: Session, master: str) -> None:
    """Hand the leadership to MASTER, or to the follower that has most of the log.

    Takes about the time of one message; clients and workers find the new leader by themselves. Use it before work
    on the leader's machine. Nothing is done when MASTER leads already.

    \b
    Examples:
      clusterctl masters transfer
      clusterctl masters transfer m2
    """
    answer = session.client().transfer_leadership(master)
    session.show(answer, lambda: f"{answer.leader_id} leads in term {answer.term}")


@masters.command("replace")
@click.argument("master")
@click.option("--with", "address", default="", metavar="HOST:PORT", help="Where its peer port is now, if it moved.")
@pass_session
def replace(session: Session, master: str, address: str) -> None:
    """Give MASTER, whose disk was lost, its place back with a new one.

    Start it with an empty data directory first: it takes in the state from the others, but its disk does not vote
    (role learner), because an empty disk does not know what the lost one promised. This command waits until it has
    everything, then admits the new disk; from then on the lost one counts nowhere, should it turn up again. A majority
    of the other masters has to run. When MASTER moved to another machine, change its addresses in the configuration
    of all masters and workers as well, and restart them one after the other when it suits you.

    \b
    Examples:
      clusterctl masters replace m2
      clusterctl masters replace m2 --with 10.0.0.7:7152
    """
    answer = session.client().replace_master(master, address)
    session.show(answer, lambda: f"{master} votes with its new disk {answer.disk_id}")
