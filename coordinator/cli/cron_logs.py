"""clusterctl cron logs: what runs printed, from the workers that ran them."""

from __future__ import annotations

import codecs
import json

import click
import yaml

from coordinator.api.v1 import launch_pb2, types_pb2
from coordinator.cli.completion import JOB
from coordinator.cli.moment import MOMENT
from coordinator.cli.session import Command, Session, pass_session
from coordinator.cli.words import local_time
from coordinator.model.errors import CoordinatorError, RefusalReason, Refused, TimedOut, Unreachable

LAUNCHES_MAX = 10_000
"""As many as a master tells at once."""


def find_launch(session: Session, job: str, at: int | None) -> types_pb2.Launch:
    """The launch at a time, to the second as people name it; else the latest that was given to a worker."""
    client = session.client()
    if at is None:
        launches = client.list_launches(job_id=job, latest=LAUNCHES_MAX).launches
        found = [launch for launch in launches if launch.worker or launch.earlier_attempts]
        missing = f"{job} has no launch that ran; `clusterctl cron history {job}` says why"
    else:
        since = at // 1_000 * 1_000
        launches = client.list_launches(job_id=job, latest=LAUNCHES_MAX, since_unix_ms=since).launches
        found = [launch for launch in launches if launch.scheduled_at_unix_ms // 1_000 == at // 1_000]
        missing = f"{job} has no launch scheduled at {local_time(at)}; `clusterctl cron history {job}` names them"
    if not found:
        raise Refused(RefusalReason.NOT_FOUND, missing)
    return max(found, key=lambda launch: launch.scheduled_at_unix_ms)


class Printer:
    """Prints pieces as they come: the bytes as they are for people, one document each for scripts."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0
        self.has_printed = False

    def show(self, piece: launch_pb2.ReadOutputResponse) -> None:
        """Prints a piece, and says where some of the output before it was not kept."""
        if not piece.data:
            return
        left_out = piece.offset_bytes - self._end
        self._end = piece.offset_bytes + len(piece.data)
        self.has_printed = True
        if self._output == "table":
            if left_out:
                click.echo(f"\n[{left_out:,} bytes were not kept]", err=True)
            click.echo(piece.data, nl=False)
            return
        document = {
            "attempt": piece.attempt,
            "offset_bytes": piece.offset_bytes,
            "text": self._decoder.decode(piece.data),
        }
        if self._output == "json":
            click.echo(json.dumps(document, ensure_ascii=False))
        else:
            click.echo("---\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100), nl=False)


@click.command("logs", cls=Command)
@click.argument("job", type=JOB)
@click.option("--at", type=MOMENT, help="The launch scheduled then, as `cron history` shows it; else the latest.")
@click.option("--attempt", type=click.IntRange(min=1), default=None, help="This attempt, else the latest.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run has ended.")
@pass_session
def logs(session: Session, job: str, at: int | None, attempt: int | None, follow: bool) -> None:
    """Show what a run printed, standard output and standard error together.

    The worker that ran it keeps the beginning and the end, within bounds (worker.run_output_bytes_max). Where it has
    nothing any more, or is away, the last bytes that the masters keep are shown.

    \b
    Examples:
      clusterctl cron logs loop_01
      clusterctl cron logs loop_01 --follow
      clusterctl cron logs loop_01 --at "2026-11-23 19:55:00+00:00" --attempt 1
    """
    launch, printer = find_launch(session, job, at), Printer(session.output)
    pieces = session.client().read_output(job, launch.scheduled_at_unix_ms, attempt=attempt or 0, follow=follow)
    try:
        for piece in pieces:
            printer.show(piece)
    except (Refused, Unreachable, TimedOut) as error:
        if printer.has_printed or not launch.output or attempt not in (None, launch.attempt):
            raise
        _show_tail(printer, launch, error)


def _show_tail(printer: Printer, launch: types_pb2.Launch, error: CoordinatorError) -> None:
    click.echo(f"{error}; here are the last {len(launch.output):,} bytes, which the masters keep:", err=True)
    printer.show(launch_pb2.ReadOutputResponse(attempt=launch.attempt, data=launch.output))
