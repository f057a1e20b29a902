"""clusterctl cron apply: jobs as code."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.api.v1 import cron_pb2
from coordinator.cli.cron_file import load_jobs
from coordinator.cli.session import Command, Session, pass_session
from coordinator.cli.table import paragraph
from coordinator.cli.words import names
from coordinator.machine.codec import job_spec_to_proto

INDENT = "    "
ABSENT = "(none)"


def applied_text(answer: cron_pb2.ApplyJobsResponse, dry_run: bool) -> str:
    """What changed, or would, field by field."""
    changes: dict[str, list[str]] = {}
    for change in answer.changes:
        changes.setdefault(change.job_id, []).append(_change_text(change, change.job_id in answer.created))
    lines: list[str] = []
    for done, would, job_ids in (
        ("created", "would create", answer.created),
        ("changed", "would change", answer.changed),
        ("forgot", "would forget", answer.deleted),
    ):
        for job_id in job_ids:
            lines += [f"{would if dry_run else done} {job_id}", *changes.get(job_id, [])]
    if answer.unchanged:
        lines.append(paragraph(names(answer.unchanged), "unchanged: "))
    return "\n".join(lines) or "nothing to do: the file has no job"


def _change_text(change: cron_pb2.JobFieldChange, is_new: bool) -> str:
    if is_new:
        return paragraph(f"{change.field} = {change.after}", INDENT)
    return paragraph(f"{change.field}: {change.before or ABSENT} -> {change.after or ABSENT}", INDENT)


@click.command("apply", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would change.")
@click.option(
    "--prune",
    is_flag=True,
    help="Also forget the jobs that were applied before and that the file does not name. Those of cluster.toml stay.",
)
@pass_session
def apply(session: Session, file: Path, dry_run: bool, prune: bool) -> None:
    """Create or change jobs as a file says: TOML, YAML or JSON, by its ending.

    All jobs are checked before the first is applied. A change never launches anything retroactively; what the
    schedule before it had not launched yet is recorded as skipped. What changes is told field by field; the
    fields are those of [[cron.jobs]] in cluster.toml, which explains them.

    \b
    A file with one job:
      jobs:
        - id: nightly_report
          schedule: "0 3 * * *"        also six fields with seconds first, "@daily", "@every 90s"
          time_zone: Europe/Vienna     UTC if left out
          command: [make-report, --full]
          timeout_s: 600
          overlap: skip                skip, queue, allow, cancel_previous
          catch_up: latest             none, latest, all
          retry: on_failure            never, on_lost, on_failure

    \b
    Examples:
      clusterctl cron apply jobs.yaml --dry-run
      clusterctl cron apply jobs.yaml
      clusterctl cron apply jobs.toml --prune --dry-run
    """
    jobs = [job_spec_to_proto(job) for job in load_jobs(file)]
    answer = session.client().apply_jobs(jobs, dry_run=dry_run, prune=prune)
    session.show(answer, lambda: applied_text(answer, dry_run))
