"""clusterctl cron: jobs, their owners, and their launches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from coordinator.api.v1 import cron_pb2, types_pb2
from coordinator.cli.completion import JOB
from coordinator.cli.cron_file import load_jobs
from coordinator.cli.session import Group, Session, now_unix_ms, pass_session
from coordinator.cli.table import Column, facts, table
from coordinator.cli.words import NOTHING, age, ahead, duration, local_time, names, word
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model.errors import RefusalReason, Refused

COLUMNS = (
    Column("JOB"),
    Column("SCHEDULE"),
    Column("CLASS"),
    Column("OWNER"),
    Column("BACKUPS", wrap=True),
    Column("NEXT", right=True),
    Column("LAST", wrap=True),
)
LAUNCH_COLUMNS = (
    Column("JOB"),
    Column("SCHEDULED AT"),
    Column("TRY", right=True),
    Column("WORKER"),
    Column("STATE"),
    Column("LATE", right=True),
    Column("TOOK", right=True),
    Column("WHY", wrap=True),
)


def latest_text(view: cron_pb2.CronJobView, now_ms: int) -> str:
    """How the latest launch stands and how long ago it was due."""
    if not view.HasField("latest"):
        return NOTHING
    state = word(types_pb2.LaunchState.DESCRIPTOR, view.latest.state)
    return f"{state} {age(view.latest.scheduled_at_unix_ms, now_ms)} ago"


def next_text(view: cron_pb2.CronJobView, now_ms: int) -> str:
    """When it is due next."""
    if view.job.paused:
        return "paused"
    return ahead(view.next_unix_ms[0], now_ms) if view.next_unix_ms else NOTHING


def jobs_table(views: Iterable[cron_pb2.CronJobView]) -> str:
    """Jobs for people."""
    now_ms = now_unix_ms()
    rows = [
        [
            view.job.spec.id,
            view.job.spec.schedule,
            f"P{view.job.spec.priority_class}",
            view.job.owner or NOTHING,
            names(view.job.backups),
            next_text(view, now_ms),
            latest_text(view, now_ms),
        ]
        for view in views
    ]
    return table(COLUMNS, rows) if rows else "no job"


def job_text(view: cron_pb2.CronJobView) -> str:
    """One job for people."""
    job, spec, now_ms = view.job, view.job.spec, now_unix_ms()
    overlap = word(types_pb2.OverlapPolicy.DESCRIPTOR, spec.overlap)
    catch_up = word(types_pb2.CatchUpPolicy.DESCRIPTOR, spec.catch_up)
    if spec.catch_up != types_pb2.CATCH_UP_POLICY_NONE:
        catch_up += f", back to {duration(spec.catch_up_window_s)}, at most {spec.catch_up_limit}"
    return facts(
        [
            ("job", f"{spec.id} (P{spec.priority_class}, from {job.source or 'unknown'})"),
            ("description", spec.description or NOTHING),
            ("schedule", f"{spec.schedule} ({spec.time_zone})"),
            ("runs", " ".join(spec.command) if spec.command else spec.python or NOTHING),
            ("environment", ", ".join(f"{key}={spec.environment[key]}" for key in sorted(spec.environment)) or NOTHING),
            ("owner", job.owner or NOTHING),
            ("backups", names(job.backups)),
            ("paused", "yes" if job.paused else "no"),
            ("next", ", ".join(local_time(at) for at in view.next_unix_ms) or NOTHING),
            ("last", latest_text(view, now_ms)),
            ("time limit", duration(spec.timeout_s)),
            ("when it still runs", overlap),
            ("when it was missed", f"{catch_up}; may start {duration(spec.start_deadline_s)} late"),
            ("retry", f"{word(types_pb2.RetryPolicy.DESCRIPTOR, spec.retry)}, {spec.attempts_max} attempts in all"),
            ("changed", local_time(job.updated_unix_ms)),
        ]
    )


def launches_table(launches: Iterable[types_pb2.Launch]) -> str:
    """Launches for people, those that never ran with their reason."""
    rows = []
    for launch in launches:
        ran = launch.started_unix_ms != 0
        late_ms = launch.started_unix_ms - launch.scheduled_at_unix_ms
        took_ms = launch.finished_unix_ms - launch.started_unix_ms
        state = word(types_pb2.LaunchState.DESCRIPTOR, launch.state)
        manual = launch.trigger == types_pb2.LAUNCH_TRIGGER_MANUAL
        why = [launch.reason] if launch.reason else []
        exit_status = f"exit status {launch.exit_status}"
        if launch.state == types_pb2.LAUNCH_STATE_FAILED and launch.exit_status and exit_status not in launch.reason:
            why.append(exit_status)
        rows.append(
            [
                launch.job_id,
                local_time(launch.scheduled_at_unix_ms),
                str(launch.attempt) if launch.worker else NOTHING,
                launch.worker or NOTHING,
                state,
                duration(late_ms / 1_000) if ran else NOTHING,
                duration(took_ms / 1_000) if ran and launch.finished_unix_ms else NOTHING,
                "; ".join([*(["by hand"] if manual else []), *why]) or NOTHING,
            ]
        )
    return table(LAUNCH_COLUMNS, rows) if rows else "no launch"


@click.group(cls=Group)
def cron() -> None:
    """See and change cron jobs, launch one now, and see what became of launches."""


@cron.command("list")
@pass_session
def list_jobs(session: Session) -> None:
    """List the jobs: schedule, priority class, owner, backups, next and latest launch.

    \b
    Examples:
      clusterctl cron list
      clusterctl cron list -o json | jq -r '.jobs[] | select(.job.owner == "") | .job.spec.id'
    """
    answer = session.client().list_jobs()
    session.show(answer, lambda: jobs_table(answer.jobs))


@cron.command("show")
@click.argument("job", type=JOB)
@click.option("--next", "next_count", type=click.IntRange(1, 100), default=3, show_default=True, help="Times to tell.")
@pass_session
def show_job(session: Session, job: str, next_count: int) -> None:
    """Show one job: its definition, who owns it, and its next times.

    \b
    Examples:
      clusterctl cron show loop_01
      clusterctl cron show loop_01 -o yaml > loop_01.yaml    to edit it, and `cron apply` it
    """
    answer = session.client().list_jobs(job_id=job, next=next_count)
    view = next((item for item in answer.jobs if item.job.spec.id == job), None)
    if view is None:
        raise Refused(RefusalReason.NOT_FOUND, f"no job is called {job!r}; `clusterctl cron list` names them")
    session.show(view, lambda: job_text(view))


@cron.command("apply")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would change.")
@pass_session
def apply(session: Session, file: Path, dry_run: bool) -> None:
    """Create or change jobs as a file says: TOML, YAML or JSON, by its ending.

    All jobs are checked before the first is applied. A change never launches anything retroactively.

    \b
    A file with one job:
      jobs:
        - id: nightly_report
          schedule: "0 3 * * *"        five fields, or six with seconds first
          time_zone: Europe/Vienna     UTC if left out
          command: [make-report, --full]
          timeout_s: 600
          overlap: skip                skip, allow
          catch_up: latest             none, latest, all

    \b
    Examples:
      clusterctl cron apply jobs.yaml --dry-run
      clusterctl cron apply jobs.yaml
    """
    jobs = [job_spec_to_proto(job) for job in load_jobs(file)]
    answer = session.client().apply_jobs(jobs, dry_run=dry_run)

    def text() -> str:
        said = "would be " if dry_run else ""
        parts = [("created", answer.created), ("changed", answer.changed), ("unchanged", answer.unchanged)]
        return "\n".join(f"{said if what != 'unchanged' else ''}{what}: {names(ids)}" for what, ids in parts if ids)

    session.show(answer, text)


@cron.command("delete")
@click.argument("job", type=JOB)
@pass_session
def delete(session: Session, job: str) -> None:
    """Forget a job and its history. A run that goes on is not stopped.

    \b
    Example:
      clusterctl cron delete nightly_report
    """
    answer = session.client().delete_job(job)
    session.show(answer, lambda: f"{job} is forgotten")


@cron.command("pause")
@click.argument("job", type=JOB)
@pass_session
def pause(session: Session, job: str) -> None:
    """Stop launching a job by its schedule, until `cron resume`.

    \b
    Example:
      clusterctl cron pause loop_01
    """
    answer = session.client().set_job_paused(job, True)
    session.show(answer, lambda: f"{job} is paused")


@cron.command("resume")
@click.argument("job", type=JOB)
@pass_session
def resume(session: Session, job: str) -> None:
    """Launch a paused job by its schedule again. What passed meanwhile is not made up for.

    \b
    Example:
      clusterctl cron resume loop_01
    """
    answer = session.client().set_job_paused(job, False)
    session.show(answer, lambda: f"{job} is launched by its schedule again")


@cron.command("trigger")
@click.argument("job", type=JOB)
@pass_session
def trigger(session: Session, job: str) -> None:
    """Launch a job now, beside its schedule, on its owner.

    \b
    Example:
      clusterctl cron trigger loop_01 && clusterctl cron history loop_01
    """
    answer = session.client().trigger_job(job)
    at = answer.scheduled_at_unix_ms
    session.show(answer, lambda: f"{job} is launched, as of {local_time(at)}; see `clusterctl cron history {job}`")


@cron.command("history")
@click.argument("job", type=JOB, default="")
@click.option("--missed", is_flag=True, help="Only what did not run, and why.")
@click.option("--latest", "-n", type=click.IntRange(min=1), default=20, show_default=True, help="How many.")
@click.option("--output-of-runs", is_flag=True, help="Also the last bytes that each run printed.")
@pass_session
def history(session: Session, job: str, missed: bool, latest: int, output_of_runs: bool) -> None:
    """Show the latest launches of a job, or of all: where, how late, how long, how it ended.

    Every scheduled time is there: those that did not run say why.

    \b
    Examples:
      clusterctl cron history loop_01
      clusterctl cron history --missed
      clusterctl cron history loop_01 -n 1 --output-of-runs
    """
    answer = session.client().list_launches(job_id=job, latest=latest, missed=missed)

    def text() -> str:
        parts = [launches_table(answer.launches)]
        if output_of_runs:
            for launch in answer.launches:
                printed = launch.output.decode("utf-8", errors="replace").rstrip()
                parts.append(f"\n{launch.job_id} at {local_time(launch.scheduled_at_unix_ms)}:\n{printed or NOTHING}")
        return "\n".join(parts)

    session.show(answer, text)
