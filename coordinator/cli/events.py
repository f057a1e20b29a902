"""clusterctl events: the cluster's story."""

from __future__ import annotations

import json

import click

from coordinator.api.v1 import types_pb2
from coordinator.cli.session import Command, Session, pass_session
from coordinator.cli.structure import to_plain
from coordinator.cli.table import WIDTH, paragraph
from coordinator.cli.words import local_time

INDENT = "    "
HEAD_MAX = 60


def event_text(event: types_pb2.Event) -> str:
    """One event for people: its time, what it happened to, and what happened."""
    head = f"{local_time(event.at_unix_ms)}  {event.kind:<7}  {event.subject:<8}  "
    line = f"{head}{event.message}"
    if len(line) <= WIDTH:
        return line
    if len(head) <= HEAD_MAX:
        return paragraph(event.message, head)
    # A long name: the message gets lines of its own, or it would be squeezed into a column of one word.
    return f"{head.rstrip()}\n{paragraph(event.message, INDENT)}"


@click.command(cls=Command)
@click.option("--follow", "-f", is_flag=True, help="Stay, and print what happens as it happens, until Ctrl-C.")
@click.option("--kind", default="", help="Only events of this kind: node, shard, move, job, launch, settings, ...")
@click.option(
    "--latest", "-n", type=click.IntRange(min=1), default=50, show_default=True, help="How many of the past ones."
)
@click.option("--from", "from_sequence", type=click.IntRange(min=1), default=None, help="Begin with this sequence.")
@pass_session
def events(session: Session, follow: bool, kind: str, latest: int, from_sequence: int | None) -> None:
    """Show the latest events: what the cluster did, and to whom.

    With -o json each event is one line, so that a script can read them as they come.

    \b
    Examples:
      clusterctl events
      clusterctl events --follow --kind move
      clusterctl events -n 1000 -o json | jq -r 'select(.subject == "w1") | .message'
    """
    stream = session.client().stream_events(
        from_sequence=from_sequence or 0, latest=latest, follow=follow, kind=kind
    )
    for event in stream:
        if session.output == "json":
            click.echo(json.dumps(to_plain(event), ensure_ascii=False))
        else:
            # A YAML stream has a line of dashes between its documents.
            if session.output == "yaml":
                click.echo("---")
            session.show(event, lambda event=event: event_text(event))  # type: ignore[misc]
